//! One object's record: its fields as vineyard encodes them, and the links to its members.
//!
//! A field that is a string begins with `v`, a member is a string that begins with `l` and holds
//! a [`Link`]; numbers, booleans, null and arrays are as they are. That is the form other
//! instances read in etcd.
//!
//! A record keeps this form as one JSON text, without what it knows by itself: ten thousand
//! small objects take megabytes as text and tens of megabytes as trees of values.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::shard::ids::{InstanceId, ObjectId, Signature, bits64};

/// The typename of blobs.
pub(super) const BLOB: &str = "vineyard::Blob";

/// Whom a link leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// By id.
    Object(ObjectId),
    /// By signature, as the members of global objects: whichever copy is nearest.
    Signature(Signature),
}

/// A reference from an object to its member: `<id>.<type>`, `<signature>.<type>` or
/// `<id>.vineyard::Blob@<instance>`, where the type ends before its first `<`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link<'a> {
    pub(super) target: Target,
    pub(super) typename: &'a str,
    /// Where a blob is; none for objects.
    pub(super) instance: Option<InstanceId>,
}

impl<'a> Link<'a> {
    /// Reads a link. Ids have a fixed width, so the first dot ends them and types may have dots.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let (id, rest) = text.split_once('.')?;
        let target = match id.as_bytes().first()? {
            b'o' if id.len() == 17 => Target::Object(id.parse().ok()?),
            b's' if id.len() == 17 => {
                let hex = &id[1..];
                if !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return None;
                }
                Target::Signature(Signature(u64::from_str_radix(hex, 16).ok()?))
            }
            _ => return None,
        };
        let (typename, instance) = match rest.rsplit_once('@') {
            Some((typename, number))
                if number.bytes().all(|b| b.is_ascii_digit()) && !number.is_empty() =>
            {
                (typename, Some(InstanceId(number.parse().ok()?)))
            }
            _ => (rest, None),
        };
        (!typename.is_empty()).then_some(Self {
            target,
            typename,
            instance,
        })
    }

    /// The part of a typename that links show.
    pub(super) fn short(typename: &str) -> &str {
        typename.split('<').next().unwrap_or(typename)
    }
}

impl fmt::Display for Link<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.target {
            Target::Object(id) => write!(f, "{id}")?,
            Target::Signature(signature) => write!(f, "{signature}")?,
        }
        write!(f, ".{}", Self::short(self.typename))?;
        match self.instance {
            Some(instance) => write!(f, "@{}", instance.0),
            None => Ok(()),
        }
    }
}

/// A field as it is stored.
pub(super) enum Field<'a> {
    /// A string.
    Text(&'a str),
    /// A number, a boolean, null or an array, as it is.
    Plain,
    /// A member.
    Member(Link<'a>),
    /// None of these.
    Garbage,
}

/// Understands an encoded value.
pub(super) fn decode(value: &Value) -> Field<'_> {
    let Value::String(text) = value else {
        return Field::Plain;
    };
    if let Some(text) = text.strip_prefix('v') {
        Field::Text(text)
    } else {
        let link = text.strip_prefix('l').and_then(Link::parse);
        link.map_or(Field::Garbage, Field::Member)
    }
}

/// Encodes a value that is no member.
pub(super) fn encode(value: Value) -> Value {
    match value {
        Value::String(text) => encode_text(&text),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value
        }
    }
}

/// Encodes a string.
pub(super) fn encode_text(text: &str) -> Value {
    Value::String(format!("v{text}"))
}

/// Encodes a member.
pub(super) fn encode_link(link: &Link<'_>) -> Value {
    Value::String(format!("l{link}"))
}

/// What the server alone says of an object; not part of [`Record::fields`].
pub(super) const OWN: [&str; 5] = ["id", "typename", "signature", "instance_id", "transient"];

/// One object.
#[derive(Clone, Debug)]
pub(super) struct Record {
    /// Shared among the objects of a type.
    pub(super) typename: Arc<str>,
    pub(super) signature: Signature,
    /// Where the object and its members are, if in one place.
    pub(super) instance: InstanceId,
    /// Known here only.
    pub(super) is_transient: bool,
    /// Links to members by signature.
    pub(super) is_global: bool,
    /// Levels of the tree that begins here, at least 1.
    pub(super) depth: u16,
    /// About how many bytes the whole tree is as text.
    pub(super) extent: u64,
    /// The encoded fields but those in [`OWN`], as JSON.
    pub(super) text: Box<str>,
}

impl Record {
    /// The encoded fields but those in [`OWN`].
    pub(super) fn fields(&self) -> Map<String, Value> {
        // The text was written from such a map, no deeper than a parser follows.
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    /// A tree of this object without its plain fields and members.
    pub(super) fn head(&self, id: ObjectId) -> Map<String, Value> {
        let mut tree = Map::new();
        tree.insert("id".into(), id.to_string().into());
        tree.insert("typename".into(), (*self.typename).into());
        tree.insert("signature".into(), self.signature.0.into());
        tree.insert("instance_id".into(), self.instance.0.into());
        tree.insert("transient".into(), self.is_transient.into());
        tree
    }
}

/// Fields as the text that a record keeps.
pub(super) fn to_text(fields: &Map<String, Value>) -> Box<str> {
    // Keys are strings and numbers are finite: such a map always has a text.
    serde_json::to_string(fields)
        .unwrap_or_default()
        .into_boxed_str()
}

/// A blob as a tree.
pub(super) fn blob_tree(id: ObjectId, instance: InstanceId, length: u64) -> Value {
    let mut tree = Map::new();
    tree.insert("id".into(), id.to_string().into());
    tree.insert("typename".into(), BLOB.into());
    tree.insert("instance_id".into(), instance.0.into());
    tree.insert("length".into(), length.into());
    tree.insert("nbytes".into(), length.into());
    tree.insert("transient".into(), true.into());
    Value::Object(tree)
}

/// How many levels of arrays and objects a value has; 0 for what has none.
pub(super) fn levels(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(levels).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(levels).max().unwrap_or(0),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
}

/// An integer of 64 bits by its bits: `-1` is `u64::MAX`. Java sends negative ones.
pub(super) fn bits(value: &Value) -> Option<u64> {
    bits64(value).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(text: &str, target: Target, typename: &str, instance: Option<u64>) {
        let instance = instance.map(InstanceId);
        let link = Link {
            target,
            typename,
            instance,
        };
        assert_eq!(Link::parse(text), Some(link.clone()));
        assert_eq!(link.to_string(), text);
    }

    #[test]
    fn links_read_as_other_instances_write_them() {
        let tensor = Target::Object(ObjectId(0x6880_9b97_4b40_0002));
        check(
            "o68809b974b400002.vineyard::Tensor",
            tensor,
            "vineyard::Tensor",
            None,
        );
        let by_signature = Target::Signature(Signature(0x6880_9b97_4b40_0001));
        check(
            "s68809b974b400001.vineyard::Tensor",
            by_signature,
            "vineyard::Tensor",
            None,
        );
        let blob = Target::Object(ObjectId(0xe880_9b97_4a80_0000));
        check("oe8809b974a800000.vineyard::Blob@0", blob, BLOB, Some(0));
        let far = Some(u64::MAX);
        check(
            "oe8809b974a800000.vineyard::Blob@18446744073709551615",
            blob,
            BLOB,
            far,
        );
    }

    #[test]
    fn a_type_may_have_dots_and_at_signs() {
        let id = Target::Object(ObjectId(1));
        check(
            "o0000000000000001.org.apache.Arrow",
            id,
            "org.apache.Arrow",
            None,
        );
        check("o0000000000000001.a@b", id, "a@b", None);
        check("o0000000000000001.a@", id, "a@", None);
    }

    #[test]
    fn a_link_shows_a_type_without_its_arguments() {
        let link = Link {
            target: Target::Object(ObjectId(1)),
            typename: "vineyard::Tensor<int64>",
            instance: None,
        };
        assert_eq!(link.to_string(), "o0000000000000001.vineyard::Tensor");
    }

    #[test]
    fn what_is_no_link_is_refused() {
        for bad in [
            "",
            ".",
            "o1.x",
            "o0000000000000001",
            "o0000000000000001.",
            "x0000000000000001.x",
            "o000000000000000g.x",
            "s+000000000000001.x",
            "o0000000000000001.x@99999999999999999999",
        ] {
            assert_eq!(Link::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn fields_come_back_as_they_were() {
        for value in [
            json!("abc"),
            json!(""),
            json!("lo1"),
            json!("v"),
            json!("naïve \u{0}"),
        ] {
            match decode(&encode(value.clone())) {
                Field::Text(text) => assert_eq!(value, text),
                Field::Plain | Field::Member(_) | Field::Garbage => panic!("{value}"),
            }
        }
        for value in [
            json!(1),
            json!(2.0),
            json!(true),
            json!(null),
            json!([1, "a", {"b": 1}]),
        ] {
            let encoded = encode(value.clone());
            assert!(matches!(decode(&encoded), Field::Plain));
            assert_eq!(encoded, value);
        }
        assert!(matches!(decode(&json!("x")), Field::Garbage));
    }

    #[test]
    fn levels_count_what_is_nested() {
        assert_eq!(levels(&json!(1)), 0);
        assert_eq!(levels(&json!([])), 1);
        assert_eq!(levels(&json!({"a": [1, [2]], "b": {}})), 3);
    }
}
