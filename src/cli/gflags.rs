//! The command-line syntax of vineyardd, which is that of gflags; pure.
//!
//! One or two dashes, `--f=v` or `--f v`, booleans `--f`, `--nof` or `--f=true`; the last one
//! wins. A boolean never takes the next argument: `--f false` switches `f` on and leaves `false`
//! behind, which is ignored like every argument that is no flag. `--` ends the flags. Dashes
//! within a name are underscores.

use std::collections::HashMap;
use std::fmt::Write as _;

/// What a flag's value has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Int32,
    Double,
    String,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::Int32 => "int32",
            Self::Double => "double",
            Self::String => "string",
        }
    }

    /// Whether gflags would take `value`.
    fn accepts(self, value: &str) -> bool {
        match self {
            Self::Bool => boolean(value).is_some(),
            Self::Int32 => int32(value).is_some(),
            Self::Double => value.trim().parse::<f64>().is_ok(),
            Self::String => true,
        }
    }
}

/// A flag there is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flag {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) default: &'static str,
    pub(super) help: &'static str,
}

/// Why arguments are refused. The texts are those of gflags.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GflagsError {
    #[error("unknown command line flag '{0}'")]
    Unknown(String),
    #[error("flag '{0}' is missing its argument")]
    MissingArgument(String),
    #[error("illegal value '{value}' specified for {kind} flag '{name}'")]
    IllegalValue {
        name: &'static str,
        kind: &'static str,
        value: String,
    },
}

/// What was said, over what is so by default.
#[derive(Clone, Debug)]
pub(super) struct Values {
    table: &'static [Flag],
    given: HashMap<&'static str, String>,
}

/// Reads arguments, the program's name left out.
pub(super) fn parse<'a>(
    table: &'static [Flag],
    arguments: impl IntoIterator<Item = &'a str>,
) -> Result<Values, GflagsError> {
    let mut given = HashMap::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            break;
        }
        let Some(spelled) = argument
            .strip_prefix("--")
            .or_else(|| argument.strip_prefix('-'))
            .filter(|spelled| !spelled.is_empty())
        else {
            continue;
        };
        let (name, value) = match spelled.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (spelled, None),
        };
        let (flag, value) = match (find(table, name), value) {
            (Some(flag), Some(value)) => (flag, value),
            (Some(flag), None) if flag.kind == Kind::Bool => (flag, "true"),
            (Some(flag), None) => {
                let missing = || GflagsError::MissingArgument(argument.to_owned());
                (flag, arguments.next().ok_or_else(missing)?)
            }
            (None, None) => (negated(table, name).ok_or_else(|| unknown(name))?, "false"),
            (None, Some(_)) => return Err(unknown(name)),
        };
        if !flag.kind.accepts(value) {
            return Err(GflagsError::IllegalValue {
                name: flag.name,
                kind: flag.kind.name(),
                value: value.to_owned(),
            });
        }
        given.insert(flag.name, value.to_owned());
    }
    Ok(Values { table, given })
}

fn unknown(name: &str) -> GflagsError {
    GflagsError::Unknown(name.to_owned())
}

fn find(table: &'static [Flag], name: &str) -> Option<&'static Flag> {
    table.iter().find(|flag| {
        flag.name.len() == name.len()
            && flag
                .name
                .bytes()
                .zip(name.bytes())
                .all(|(ours, theirs)| ours == theirs || (ours == b'_' && theirs == b'-'))
    })
}

/// The boolean that `no…` switches off.
fn negated(table: &'static [Flag], name: &str) -> Option<&'static Flag> {
    let flag = find(table, name.strip_prefix("no")?)?;
    (flag.kind == Kind::Bool).then_some(flag)
}

fn boolean(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "t" | "true" | "y" | "yes" => Some(true),
        "0" | "f" | "false" | "n" | "no" => Some(false),
        _ => None,
    }
}

fn int32(value: &str) -> Option<i32> {
    let value = value.trim();
    match value
        .strip_prefix("0x")
        .or_else(|| value.strip_prefix("0X"))
    {
        Some(hex) => i32::from_str_radix(hex, 16).ok(),
        None => value.parse().ok(),
    }
}

impl Values {
    /// Whether the flag was given at all.
    pub(super) fn is_given(&self, name: &str) -> bool {
        self.given.contains_key(name)
    }

    /// The value as text; empty where there is no such flag.
    pub(super) fn text(&self, name: &str) -> &str {
        match self.given.get(name) {
            Some(value) => value,
            None => self
                .table
                .iter()
                .find(|flag| flag.name == name)
                .map_or("", |flag| flag.default),
        }
    }

    /// The value of a boolean.
    pub(super) fn is_on(&self, name: &str) -> bool {
        boolean(self.text(name)).unwrap_or(false)
    }

    /// The value of an int32.
    pub(super) fn number(&self, name: &str) -> i32 {
        int32(self.text(name)).unwrap_or(0)
    }
}

/// The flags there are, as `--help` shows them.
pub(super) fn help(table: &[Flag]) -> String {
    let mut text = String::new();
    for flag in table {
        let default = match flag.kind {
            Kind::String => format!("\"{}\"", flag.default),
            Kind::Bool | Kind::Int32 | Kind::Double => flag.default.to_owned(),
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "    -{} ({}) type: {} default: {default}",
            flag.name,
            flag.help,
            flag.kind.name()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Flag] = &[
        flag("socket", Kind::String, ""),
        flag("rpc", Kind::Bool, "true"),
        flag("sync_crds", Kind::Bool, "false"),
        flag("rpc_socket_port", Kind::Int32, "9600"),
        flag("rate", Kind::Double, "0.8"),
    ];

    const fn flag(name: &'static str, kind: Kind, default: &'static str) -> Flag {
        Flag {
            name,
            kind,
            default,
            help: "",
        }
    }

    #[track_caller]
    fn check(arguments: &[&str], name: &str, expected: &str) {
        let values = parse(TABLE, arguments.iter().copied()).unwrap();
        assert_eq!(values.text(name), expected, "{arguments:?}");
    }

    #[track_caller]
    fn refused(arguments: &[&str], expected: &str) {
        let error = parse(TABLE, arguments.iter().copied()).unwrap_err();
        assert_eq!(error.to_string(), expected, "{arguments:?}");
    }

    #[test]
    fn a_value_follows_or_is_attached_after_one_dash_or_two() {
        for arguments in [
            &["--socket", "/s"][..],
            &["-socket", "/s"],
            &["--socket=/s"],
            &["-socket=/s"],
            &["--socket", "/first", "--socket", "/s"],
        ] {
            check(arguments, "socket", "/s");
        }
        check(&["--socket=a=b"], "socket", "a=b");
        check(&["--socket", "--rpc"], "socket", "--rpc");
        check(&["--rpc-socket-port=7"], "rpc_socket_port", "7");
        check(&["--socket="], "socket", "");
        check(&[], "rpc_socket_port", "9600");
    }

    #[test]
    fn booleans_never_take_the_next_argument() {
        for (arguments, expected) in [
            (&["--rpc"][..], true),
            (&["--norpc"], false),
            (&["--rpc=false"], false),
            (&["--rpc=F"], false),
            (&["--rpc=no"], false),
            (&["--rpc=1"], true),
            (&["--norpc", "--rpc"], true),
            (&["--rpc", "false"], true),
        ] {
            let values = parse(TABLE, arguments.iter().copied()).unwrap();
            assert_eq!(values.is_on("rpc"), expected, "{arguments:?}");
        }
        let values = parse(TABLE, ["--sync_crds", "false"]).unwrap();
        assert!(values.is_on("sync_crds") && !values.is_on("nothing"));
    }

    #[test]
    fn what_is_no_flag_is_ignored() {
        check(&["stray", "-", "--socket", "/s", "stray"], "socket", "/s");
        check(&["--socket", "/s", "--", "--unknown"], "socket", "/s");
    }

    #[test]
    fn numbers_are_numbers() {
        let port =
            |text| parse(TABLE, ["--rpc_socket_port", text]).map(|v| v.number("rpc_socket_port"));
        assert_eq!(port("1234"), Ok(1234));
        assert_eq!(port("0x10"), Ok(16));
        assert_eq!(port("-1"), Ok(-1));
        check(&["--rate", "0.5"], "rate", "0.5");
    }

    #[test]
    fn refusals_use_the_words_of_gflags() {
        refused(&["--nosuch"], "unknown command line flag 'nosuch'");
        refused(&["--nosuch=5"], "unknown command line flag 'nosuch'");
        refused(&["--nosocket"], "unknown command line flag 'nosocket'");
        refused(&["--norpc=true"], "unknown command line flag 'norpc'");
        refused(&["--socket"], "flag '--socket' is missing its argument");
        refused(
            &["--rpc_socket_port", "abc"],
            "illegal value 'abc' specified for int32 flag 'rpc_socket_port'",
        );
        refused(
            &["--rpc_socket_port=99999999999"],
            "illegal value '99999999999' specified for int32 flag 'rpc_socket_port'",
        );
        refused(
            &["--rpc=maybe"],
            "illegal value 'maybe' specified for bool flag 'rpc'",
        );
        refused(
            &["--rate=x"],
            "illegal value 'x' specified for double flag 'rate'",
        );
    }
}
