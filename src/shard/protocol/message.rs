//! What a frame's body is: JSON with a command in it, or a mistake.
//!
//! Whatever a client sends, the outcome is a value: a body that is no UTF-8, no JSON, no object
//! or has no usable `type` is a [`MessageError`], which is answered and forgotten.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::code::Code;
use super::reply::Reply;

/// The most of a client's words that is put into an answer.
const QUOTED: usize = 128;

/// Why a body is no request. `Display` is the text clients get, its beginnings are the real
/// server's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Not JSON, or a field is missing or of a wrong type.
    #[error("Failed to parse the JSON message: json error: {0}")]
    Json(String),
    /// An object without `type`, or no object.
    #[error("Invalid message: no 'type' field")]
    NoType,
    /// A command that does not exist.
    #[error("Got unexpected command: {0}")]
    Unexpected(String),
    /// A command before `register_request`.
    #[error("The connection is not registered yet, command is: {0}")]
    NotRegistered(String),
}

impl MessageError {
    pub(super) fn unexpected(command: &str) -> Self {
        Self::Unexpected(shortened(command))
    }

    /// `command` came before `register_request`.
    pub fn not_registered(command: &str) -> Self {
        Self::NotRegistered(shortened(command))
    }
}

impl From<&MessageError> for Reply {
    /// All of them are the code 1.
    fn from(error: &MessageError) -> Self {
        Self::Error {
            code: Code::Invalid,
            message: error.to_string(),
        }
    }
}

impl From<serde_json::Error> for MessageError {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(shortened(&error.to_string()))
    }
}

/// A client may have put megabytes into the place of a word.
fn shortened(text: &str) -> String {
    if text.len() <= QUOTED {
        return text.to_owned();
    }
    let end = (0..=QUOTED)
        .rev()
        .find(|&end| text.is_char_boundary(end))
        .unwrap_or(0);
    format!("{}…", &text[..end])
}

/// A body known to be a JSON object with a string `type`; its fields are not read yet.
#[derive(Debug)]
pub struct Message<'a> {
    /// The `type`.
    pub command: Cow<'a, str>,
    pub(super) text: &'a str,
}

impl<'a> Message<'a> {
    /// Looks at a frame's body.
    pub fn read(body: &'a [u8]) -> Result<Self, MessageError> {
        let text = std::str::from_utf8(body).map_err(|error| {
            MessageError::Json(format!(
                "invalid UTF-8 byte at index {}",
                error.valid_up_to()
            ))
        })?;
        match serde_json::from_str(text)? {
            Head::Command(command) => Ok(Self { command, text }),
            Head::Mistyped => Err(MessageError::Json("type must be string".to_owned())),
            Head::None => Err(MessageError::NoType),
        }
    }
}

/// The `type` of a body, and the knowledge that all of it is JSON. Values beside it are passed
/// over without recursion or allocation, however deep.
enum Head<'a> {
    Command(Cow<'a, str>),
    Mistyped,
    None,
}

impl<'de> Deserialize<'de> for Head<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(HeadVisitor)
    }
}

struct HeadVisitor;

impl<'de> Visitor<'de> for HeadVisitor {
    type Value = Head<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Head<'de>, A::Error> {
        let mut head = Head::None;
        while let Some(key) = map.next_key::<Word<'de>>()? {
            if matches!(&key, Word::Text(key) if key == "type") {
                head = match map.next_value()? {
                    Word::Text(command) => Head::Command(command),
                    Word::Other => Head::Mistyped,
                };
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(head)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Head<'de>, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Head::None)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Head<'de>, E> {
        Ok(Head::None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Head<'de>, E> {
        Ok(Head::None)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Head<'de>, E> {
        Ok(Head::None)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Head<'de>, E> {
        Ok(Head::None)
    }

    fn visit_str<E>(self, _: &str) -> Result<Head<'de>, E> {
        Ok(Head::None)
    }

    fn visit_unit<E>(self) -> Result<Head<'de>, E> {
        Ok(Head::None)
    }
}

/// A string, borrowed from the body where it has no escapes; anything else is passed over.
enum Word<'a> {
    Text(Cow<'a, str>),
    Other,
}

impl<'de> Deserialize<'de> for Word<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WordVisitor)
    }
}

struct WordVisitor;

impl<'de> Visitor<'de> for WordVisitor {
    type Value = Word<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Word<'de>, E> {
        Ok(Word::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Word<'de>, E> {
        Ok(Word::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Word<'de>, E> {
        Ok(Word::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Word<'de>, E> {
        Ok(Word::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Word<'de>, E> {
        Ok(Word::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Word<'de>, E> {
        Ok(Word::Other)
    }

    fn visit_unit<E>(self) -> Result<Word<'de>, E> {
        Ok(Word::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Word<'de>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Word::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Word<'de>, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Word::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(body: &[u8], begins: &str) {
        let error = Message::read(body).unwrap_err();
        let reply = Reply::from(&error);
        let Reply::Error { code, message } = &reply else {
            panic!("{reply:?}");
        };
        assert_eq!(*code, Code::Invalid);
        assert!(message.starts_with(begins), "{message:?}");
        assert!(message.len() < 300);
    }

    const JSON: &str = "Failed to parse the JSON message: json error: ";
    const NO_TYPE: &str = "Invalid message: no 'type' field";

    #[test]
    fn what_is_not_json_is_answered_as_such() {
        refused(b"", JSON);
        refused(b"not json at all", JSON);
        refused(br#"{"type":"x""#, JSON);
        refused(br#"{"type":"x"} trailing"#, JSON);
        refused(b"{\"type\":\"x\",\"junk\":\"\xff\xfe\"}", JSON);
        refused(b"\x80\x81\x82", JSON);
        refused(b"{\"type\":\"\\ud800\"}", JSON);
    }

    #[test]
    fn a_message_without_a_type_is_answered_as_such() {
        for body in [
            r#"{"no":"type"}"#,
            "{}",
            "[1, 2]",
            "null",
            "5",
            "-5",
            "1.5",
            "true",
            r#""x""#,
        ] {
            refused(body.as_bytes(), NO_TYPE);
        }
    }

    #[test]
    fn a_type_that_is_no_string_is_an_error_of_its_message_only() {
        for value in [
            "5",
            "-5",
            "0.5",
            "null",
            "true",
            "{}",
            "[]",
            r#"{"a":[1]}"#,
            r#"[[2],{}]"#,
        ] {
            refused(format!(r#"{{"type":{value}}}"#).as_bytes(), JSON);
        }
    }

    #[test]
    fn depth_and_length_are_no_danger() {
        let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
        refused(deep.as_bytes(), NO_TYPE);
        refused("[".repeat(200_000).as_bytes(), JSON);
        refused("{\"type\":".repeat(200_000).as_bytes(), JSON);
        let message = format!(r#"{{"deep":{deep},"type":"x"}}"#);
        assert_eq!(Message::read(message.as_bytes()).unwrap().command, "x");

        let long = "é".repeat(1_000_000);
        assert!(MessageError::unexpected(&long).to_string().len() < 300);
        refused(long.as_bytes(), JSON);
    }

    #[test]
    fn the_command_is_found_wherever_it_stands() {
        for body in [
            r#"{"type":"a_request"}"#,
            r#" { "type" : "a_request" , "x" : {"type":"no"} } "#,
            r#"{"x":[{"type":"no"}],"type":"a_request"}"#,
            r#"{"typ\u0065":"\u0061_request"}"#,
        ] {
            assert_eq!(Message::read(body.as_bytes()).unwrap().command, "a_request");
        }
    }
}
