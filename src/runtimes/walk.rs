//! A walk over a YAML document that knows every field it may meet.
//!
//! Invariant: no field is passed over in silence. What a table does not name is complained about
//! by its path, and the walk goes on, so that one reading finds everything that is wrong.

use std::fmt;

use serde_norway::{Mapping, Value};

/// What is wrong with one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The way to the field: `spec.tieredstore.levels[0].quota`.
    pub path: String,
    /// What is wrong, and what would be right.
    pub what: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.what)
    }
}

/// What is done with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Read and obeyed.
    Read,
    /// Of no meaning on a node: anything is fine.
    Ignored,
    /// A field of the API that cannot be obeyed yet: refused where it says anything.
    Later,
}

/// The fields of one mapping.
pub(super) type Table = &'static [(&'static str, Known)];

/// Collects complaints on the way.
#[derive(Debug, Default)]
pub(super) struct Walk {
    errors: Vec<FieldError>,
}

/// One mapping on the way, with its path.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    path: String,
    mapping: Option<&'a Mapping>,
}

impl<'a> Fields<'a> {
    /// The path of a field of this mapping.
    pub(super) fn path_of(&self, name: &str) -> String {
        match self.path.is_empty() {
            true => name.to_owned(),
            false => format!("{}.{name}", self.path),
        }
    }

    /// The value of a field; null counts as absent, as in the Kubernetes API.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.mapping
            .and_then(|mapping| mapping.get(name))
            .filter(|value| !value.is_null())
    }
}

impl Walk {
    /// Notes that a field is wrong.
    pub(super) fn complain(&mut self, path: impl Into<String>, what: impl Into<String>) {
        self.errors.push(FieldError {
            path: path.into(),
            what: what.into(),
        });
    }

    /// What was found, or everything that is wrong.
    pub(super) fn finish<T>(self, found: Option<T>) -> Result<T, Vec<FieldError>> {
        match found {
            Some(found) if self.errors.is_empty() => Ok(found),
            _ => Err(self.errors),
        }
    }

    /// Enters a mapping, if it is there, and checks its fields against the table.
    pub(super) fn mapping<'a>(
        &mut self,
        path: impl Into<String>,
        value: Option<&'a Value>,
        table: Table,
    ) -> Fields<'a> {
        let mut fields = Fields {
            path: path.into(),
            mapping: None,
        };
        match value {
            None | Some(Value::Null) => {}
            Some(Value::Mapping(mapping)) => fields.mapping = Some(mapping),
            Some(other) => {
                let what = format!("a mapping is wanted here, not {}", described(other));
                self.complain(fields.path.as_str(), what);
            }
        }
        for (key, value) in fields.mapping.into_iter().flatten() {
            let Some(name) = key.as_str() else {
                let what = format!("a field's name is wanted here, not {}", described(key));
                self.complain(fields.path.as_str(), what);
                continue;
            };
            match table.iter().find(|(known, _)| *known == name) {
                Some((_, Known::Read | Known::Ignored)) => {}
                Some((_, Known::Later)) if says_nothing(value) => {}
                Some((_, Known::Later)) => {
                    self.complain(fields.path_of(name), "not supported yet");
                }
                None => self.complain(fields.path_of(name), unknown(name, table)),
            }
        }
        fields
    }

    /// A field that must be text.
    pub(super) fn text<'a>(&mut self, fields: &Fields<'a>, name: &str) -> Option<&'a str> {
        let value = fields.get(name)?;
        let text = value.as_str();
        if text.is_none() {
            let what = format!("text is wanted here, not {}", described(value));
            self.complain(fields.path_of(name), what);
        }
        text
    }

    /// A field that must be `true` or `false`.
    pub(super) fn boolean(&mut self, fields: &Fields<'_>, name: &str) -> Option<bool> {
        let value = fields.get(name)?;
        let truth = value.as_bool();
        if truth.is_none() {
            let what = format!("true or false is wanted here, not {}", described(value));
            self.complain(fields.path_of(name), what);
        }
        truth
    }

    /// A field that must be a whole number between two bounds.
    pub(super) fn integer(
        &mut self,
        fields: &Fields<'_>,
        name: &str,
        least: i64,
        most: i64,
    ) -> Option<i64> {
        let value = fields.get(name)?;
        let number = value.as_i64().filter(|n| (least..=most).contains(n));
        if number.is_none() {
            let what = format!(
                "a whole number from {least} to {most} is wanted here, not {}",
                described(value)
            );
            self.complain(fields.path_of(name), what);
        }
        number
    }
}

/// A value as a reader of the file sees it.
pub(super) fn described(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("the text {:?}", shortened(text)),
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "a mapping".to_owned(),
        Value::Tagged(tagged) => format!("something tagged {}", tagged.tag),
    }
}

/// The beginning of a text, short enough for a line of a log.
fn shortened(text: &str) -> String {
    const MOST: usize = 64;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Whether a value leaves everything at its default: `env: {}`, `volumes: []`, `resources:`.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Mapping(mapping) => mapping.is_empty(),
        Value::Sequence(sequence) => sequence.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::Tagged(_) => false,
    }
}

fn unknown(name: &str, table: Table) -> String {
    let nearest = table
        .iter()
        .map(|(known, _)| (distance(name, known), *known))
        .filter(|(distance, known)| *distance <= 2 && *distance < known.len())
        .min();
    match nearest {
        Some((_, known)) => format!("no such field; did you mean {known}?"),
        None => "no such field".to_owned(),
    }
}

/// Edits between two names, capitals not counted: letters put in, left out, replaced.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.to_lowercase().chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    // Nobody mistypes a name this long; without a bound a megabyte of key would be compared.
    for (i, a) in one.to_lowercase().chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: Table = &[
        ("worker", Known::Read),
        ("status", Known::Ignored),
        ("image", Known::Later),
    ];

    fn complaints(yaml: &str) -> Vec<String> {
        let value: Value = serde_norway::from_str(yaml).unwrap();
        let mut walk = Walk::default();
        walk.mapping("spec", Some(&value), TABLE);
        let errors = walk.finish(None::<()>).unwrap_err();
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_field_is_known_or_complained_about() {
        assert_eq!(complaints("{worker: 1, status: {a: b}}"), [""; 0]);
        assert_eq!(
            complaints("{image: vineyardd}"),
            ["spec.image: not supported yet"]
        );
        assert_eq!(
            complaints("{wroker: 1}"),
            ["spec.wroker: no such field; did you mean worker?"]
        );
        assert_eq!(
            complaints("{Worker: 1}"),
            ["spec.Worker: no such field; did you mean worker?"]
        );
        assert_eq!(complaints("{color: red}"), ["spec.color: no such field"]);
        assert_eq!(
            complaints("{1: 2}"),
            ["spec: a field's name is wanted here, not 1"]
        );
        assert_eq!(
            complaints("[a]"),
            ["spec: a mapping is wanted here, not a list"]
        );
    }

    #[test]
    fn a_later_field_that_says_nothing_is_fine() {
        for yaml in ["{image: }", "{image: {}}", "{image: []}", "{image: ''}"] {
            assert_eq!(complaints(yaml), [""; 0], "{yaml}");
        }
        assert_eq!(
            complaints("{image: false}"),
            ["spec.image: not supported yet"]
        );
    }

    #[test]
    fn suggestions_are_near_the_name() {
        assert_eq!(distance("wroker", "worker"), 2);
        assert_eq!(distance("quoto", "quota"), 1);
        assert_eq!(distance("mediumType", "mediumtype"), 0);
        assert_eq!(distance("", "rpc"), 3);
    }
}
