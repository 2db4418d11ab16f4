//! From the tree that a client sends to the records that are stored.
//!
//! Members are linked, never changed: one that is known is linked whatever its fields say, one
//! that comes complete and is not known is created with it, and a bare id must be known.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::Created;
use super::error::Error;
use super::object::{BLOB, Link, Record, Target, bits, encode, encode_link, levels, to_text};
use super::objects::{Draft, MAX_DEPTH, MAX_EXTENT, Objects};
use crate::shard::ids::{InstanceId, ObjectId, Signature};

/// Bytes of metadata that an error shows.
const SHOWN: usize = 4096;

/// What an object needs to know of a member.
struct Member {
    id: ObjectId,
    typename: Arc<str>,
    signature: Option<Signature>,
    instance: InstanceId,
    is_global: bool,
    depth: u16,
    extent: u64,
}

/// Adds to `draft` what a new object `id` with this metadata takes. `signature` is for one that
/// brings none; `now` is in milliseconds since the epoch.
pub(super) fn draft(
    objects: &Objects,
    content: Value,
    (signature, id): (Signature, ObjectId),
    now: u64,
    draft: &mut Draft,
) -> Result<Created, Error> {
    let Value::Object(mut fields) = content else {
        return Err(Error::NotAnObject);
    };
    let typename = match fields.get("typename") {
        Some(Value::String(typename)) => typename.clone(),
        Some(_) | None => return Err(Error::NoTypename),
    };
    if typename == BLOB {
        return Err(Error::BlobHasNoMetadata);
    }
    let instance = instance(&fields)?;
    let signature = given_signature(&fields)?.unwrap_or(signature);
    fields.insert("__timestamp".into(), now.into());
    let mut builder = Builder { objects, draft };
    let record = builder.build(id, fields, typename, signature, instance, 1)?;
    let instance_id = record.instance;
    builder.draft.records.insert(id, record);
    Ok(Created {
        id,
        signature,
        instance_id,
    })
}

fn instance(fields: &Map<String, Value>) -> Result<InstanceId, Error> {
    let value = fields.get("instance_id").ok_or(Error::NoInstanceId)?;
    let wrong = Error::Field {
        field: "instance_id",
        expected: "an integer",
    };
    bits(value).map(InstanceId).ok_or(wrong)
}

fn given_signature(fields: &Map<String, Value>) -> Result<Option<Signature>, Error> {
    let wrong = Error::Field {
        field: "signature",
        expected: "an integer",
    };
    let bits = fields
        .get("signature")
        .map(|value| bits(value).ok_or(wrong));
    Ok(bits.transpose()?.map(Signature))
}

/// Metadata in the words of an error.
fn shown(fields: &Map<String, Value>) -> String {
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    if serde::Serialize::serialize(fields, &mut serializer).is_err() {
        return String::new();
    }
    let mut text = String::from_utf8_lossy(&text).into_owned();
    if text.len() > SHOWN {
        let end = (0..=SHOWN).rev().find(|&end| text.is_char_boundary(end));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text
}

struct Builder<'a> {
    objects: &'a Objects,
    draft: &'a mut Draft,
}

impl Builder<'_> {
    fn build(
        &mut self,
        id: ObjectId,
        fields: Map<String, Value>,
        typename: String,
        signature: Signature,
        instance: InstanceId,
        level: u16,
    ) -> Result<Record, Error> {
        if level > MAX_DEPTH {
            return Err(Error::TooDeep(MAX_DEPTH));
        }
        let is_global = match fields.get("global") {
            None => false,
            Some(Value::Bool(global)) => *global,
            Some(_) => {
                return Err(Error::Field {
                    field: "global",
                    expected: "a boolean",
                });
            }
        };
        let mut encoded = Map::new();
        let mut computed = instance;
        let mut below = 0;
        let mut extent: u64 = 0;
        let mut children = Vec::new();
        for (key, value) in fields {
            if Objects::is_own(&key) {
                continue;
            }
            let Value::Object(member) = value else {
                below = below.max(levels(&value));
                encoded.insert(key, encode(value));
                continue;
            };
            let member = self.member(member, level + 1)?;
            if !is_global && member.instance != instance {
                return Err(Error::RemoteMember);
            }
            if is_global && member.is_global {
                return Err(Error::NestedGlobal);
            }
            if member.instance != computed {
                computed = InstanceId::UNSPECIFIED;
            }
            let at = member.id.is_blob().then_some(member.instance);
            let target = if is_global {
                let signature = member
                    .signature
                    .ok_or(Error::MemberWithoutSignature(member.id))?;
                self.draft
                    .signatures
                    .push(((signature, member.instance), member.id));
                Target::Signature(signature)
            } else {
                Target::Object(member.id)
            };
            let link = Link {
                target,
                typename: &member.typename,
                instance: at,
            };
            encoded.insert(key, encode_link(&link));
            if self.objects.owns(member.id, at) {
                children.push(member.id);
            }
            below = below.max(member.depth.into());
            extent = extent.saturating_add(member.extent);
        }
        let depth = u16::try_from(below + 1).unwrap_or(u16::MAX);
        if depth > MAX_DEPTH {
            return Err(Error::TooDeep(MAX_DEPTH));
        }
        let text = to_text(&encoded);
        let extent = extent.saturating_add(Objects::extent(&text));
        if extent > MAX_EXTENT {
            return Err(Error::TooLarge(MAX_EXTENT));
        }
        // Where a tree has itself as a member, the innermost is the one that counts.
        if !self.draft.records.contains_key(&id) {
            self.draft
                .edges
                .extend(children.into_iter().map(|child| (id, child)));
        }
        Ok(Record {
            typename: typename.into(),
            signature,
            instance: computed,
            is_transient: true,
            is_global,
            depth,
            extent,
            text,
        })
    }

    fn member(&mut self, fields: Map<String, Value>, level: u16) -> Result<Member, Error> {
        let text = match fields.get("id") {
            None => return Err(Error::MemberWithoutId(shown(&fields))),
            Some(Value::String(text)) => text.clone(),
            Some(other) => return Err(Error::MemberId(other.to_string())),
        };
        let is_placeholder = fields.len() == 1;
        let id: ObjectId = match text.parse() {
            Ok(id) => id,
            Err(_) if is_placeholder => return Err(Error::MemberUnknown(text)),
            Err(_) => return Err(Error::MemberId(text)),
        };
        if is_placeholder {
            return match self.known(id) {
                Some(member) => Ok(member),
                None if id.is_blob() => Err(Error::BlobPlaceholder),
                None => Err(Error::MemberUnknown(text)),
            };
        }
        if id.is_blob() {
            return Ok(Member {
                id,
                typename: BLOB.into(),
                signature: given_signature(&fields)?,
                instance: instance(&fields)?,
                is_global: false,
                depth: 1,
                extent: Objects::extent(BLOB),
            });
        }
        if let Some(member) = self.known(id) {
            return Ok(member);
        }
        let typename = match fields.get("typename") {
            None => return Err(Error::MemberWithoutType(shown(&fields))),
            Some(Value::String(typename)) if typename != BLOB => typename.clone(),
            Some(_) => {
                let expected = "a string, and not a blob's for an object";
                return Err(Error::Field {
                    field: "typename",
                    expected,
                });
            }
        };
        let instance = instance(&fields)?;
        let signature = given_signature(&fields)?.ok_or(Error::MemberWithoutSignature(id))?;
        let record = self.build(id, fields, typename, signature, instance, level)?;
        self.draft.records.entry(id).or_insert(record);
        self.known(id).ok_or(Error::MemberUnknown(text))
    }

    fn known(&self, id: ObjectId) -> Option<Member> {
        let record = self
            .objects
            .get(id)
            .or_else(|| self.draft.records.get(&id))?;
        Some(Member {
            id,
            typename: Arc::clone(&record.typename),
            signature: Some(record.signature),
            instance: record.instance,
            is_global: record.is_global,
            depth: record.depth,
            extent: record.extent,
        })
    }
}
