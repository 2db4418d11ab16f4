//! All objects: records by id, and the trees that clients see them as.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::error::Error;
use super::graph::Graph;
use super::name::escaped;
use super::object::{
    self, BLOB, Field, Link, OWN, Record, Target, blob_tree, decode, encode, encode_text,
};
use super::pattern::Pattern;
use crate::shard::ids::{InstanceId, ObjectId, Signature};

/// Levels a tree may have, from its root to its deepest array or member. A reply wraps it in a
/// few more, and common parsers give up at 128.
pub(super) const MAX_DEPTH: u16 = 120;

/// Bytes a tree may have as text, with all its members: what a peer reads as one reply. Members
/// can be shared, so trees grow much faster than what was sent to make them.
pub(super) const MAX_EXTENT: u64 = 64 << 20;

/// What a tree costs beside its fields: braces, and what the record knows by itself.
const OVERHEAD: u64 = 160;

/// Why an object has no tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// It, or an object below it, does not exist.
    Missing(ObjectId),
    /// Signatures lead in a circle, or further than is followed.
    TooDeep,
    /// Labels have made it larger than a reply.
    TooLarge,
}

/// Records made but not yet stored, all or none.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) records: BTreeMap<ObjectId, Record>,
    pub(super) signatures: Vec<((Signature, InstanceId), ObjectId)>,
    pub(super) edges: Vec<(ObjectId, ObjectId)>,
}

/// All objects.
#[derive(Debug)]
pub(super) struct Objects {
    pub(super) own: InstanceId,
    records: BTreeMap<ObjectId, Record>,
    typenames: HashSet<Arc<str>>,
    signatures: BTreeMap<(Signature, InstanceId), ObjectId>,
    graph: Graph,
}

impl Objects {
    pub(super) fn new(own: InstanceId) -> Self {
        Self {
            own,
            records: BTreeMap::new(),
            typenames: HashSet::new(),
            signatures: BTreeMap::new(),
            graph: Graph::default(),
        }
    }

    pub(super) fn get(&self, id: ObjectId) -> Option<&Record> {
        self.records.get(&id)
    }

    pub(super) fn contains(&self, id: ObjectId) -> bool {
        self.records.contains_key(&id)
    }

    /// Stores what was drafted: the ids that exist from now on.
    pub(super) fn commit(&mut self, draft: Draft) -> Vec<ObjectId> {
        let ids = draft.records.keys().copied().collect();
        for (id, mut record) in draft.records {
            match self.typenames.get(&record.typename) {
                Some(known) => record.typename = Arc::clone(known),
                None => _ = self.typenames.insert(Arc::clone(&record.typename)),
            }
            self.records.insert(id, record);
        }
        self.signatures.extend(draft.signatures);
        for (parent, child) in draft.edges {
            self.graph.insert(parent, child);
        }
        ids
    }

    /// The object with all its members.
    pub(super) fn tree(&self, id: ObjectId) -> Result<Value, Broken> {
        // Twice what creation allows: labels and names come later.
        self.assemble(id, MAX_DEPTH, &mut (2 * MAX_EXTENT))
    }

    fn assemble(&self, id: ObjectId, levels: u16, budget: &mut u64) -> Result<Value, Broken> {
        let record = self.records.get(&id).ok_or(Broken::Missing(id))?;
        let levels = levels.checked_sub(1).ok_or(Broken::TooDeep)?;
        *budget = budget
            .checked_sub(record.text.len() as u64 + OVERHEAD)
            .ok_or(Broken::TooLarge)?;
        let mut tree = record.fields();
        for value in tree.values_mut() {
            let plain = match decode(value) {
                Field::Plain => continue,
                Field::Text(_) => None,
                Field::Member(link) => Some(self.member(&link, levels, budget)?),
                Field::Garbage => Some(Value::Null),
            };
            match (plain, &mut *value) {
                (Some(member), value) => *value = member,
                (None, Value::String(text)) => _ = text.remove(0),
                (None, _) => {}
            }
        }
        tree.extend(record.head(id));
        Ok(Value::Object(tree))
    }

    fn member(&self, link: &Link<'_>, levels: u16, budget: &mut u64) -> Result<Value, Broken> {
        let id = self.resolve(link.target);
        if id.is_blob() {
            let instance = link.instance.unwrap_or(InstanceId::UNSPECIFIED);
            return Ok(blob_tree(id, instance, 0));
        }
        self.assemble(id, levels, budget)
    }

    /// Whom a link leads to: of the objects with a signature ours first, then those of other
    /// instances, ordered as their ids are as text.
    fn resolve(&self, target: Target) -> ObjectId {
        let signature = match target {
            Target::Object(id) => return id,
            Target::Signature(signature) => signature,
        };
        if let Some(&id) = self.signatures.get(&(signature, self.own)) {
            return id;
        }
        let span = (signature, InstanceId(0))..=(signature, InstanceId(u64::MAX));
        self.signatures
            .range(span)
            .min_by_key(|((_, instance), _)| instance.to_string())
            .map_or(ObjectId::INVALID, |(_, &id)| id)
    }

    /// The first `limit` objects whose typename matches and that have a tree, ascending by id.
    pub(super) fn list(&self, pattern: &Pattern, limit: u64) -> Map<String, Value> {
        let mut found = Map::new();
        let mut known: HashMap<&str, bool> = HashMap::new();
        for (&id, record) in &self.records {
            if found.len() as u64 >= limit {
                break;
            }
            let matches = *known
                .entry(&record.typename)
                .or_insert_with(|| pattern.matches(&record.typename));
            if matches && let Ok(tree) = self.tree(id) {
                found.insert(id.to_string(), tree);
            }
        }
        found
    }

    /// What deleting `ids` would delete.
    pub(super) fn delete_set(&self, ids: &[ObjectId], force: bool, deep: bool) -> Vec<ObjectId> {
        self.graph.delete_set(ids, force, deep)
    }

    /// What an object uses directly.
    pub(super) fn members(&self, id: ObjectId) -> impl Iterator<Item = ObjectId> {
        self.graph.children(id)
    }

    /// Forgets objects, among `ids` that may be anything.
    pub(super) fn remove(&mut self, ids: &[ObjectId]) {
        for &id in ids {
            let Some(record) = self.records.remove(&id) else {
                continue;
            };
            self.graph.remove(id);
            // A shallow copy has the signature of its original; that stays the original's.
            let key = (record.signature, record.instance);
            if self.signatures.get(&key) == Some(&id) {
                self.signatures.remove(&key);
            }
            // The last but the set's own.
            if Arc::strong_count(&record.typename) == 2 {
                self.typenames.remove(&record.typename);
            }
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new(self.own);
    }

    /// Makes an object and all transient objects below it known cluster-wide.
    pub(super) fn persist(&mut self, id: ObjectId) -> Result<(), Error> {
        let record = self.get(id).ok_or(Error::Unknown(id))?;
        if !record.is_transient {
            return Ok(());
        }
        if !record.is_global {
            self.signatures.insert((record.signature, self.own), id);
        }
        let mut found = BTreeSet::from([id]);
        let mut rest = vec![id];
        while let Some(id) = rest.pop() {
            let children: Vec<ObjectId> = self.graph.children(id).collect();
            let is_global = self.get(id).is_some_and(|record| record.is_global);
            for child in children {
                let Some(record) = self.records.get(&child) else {
                    continue;
                };
                if is_global {
                    self.signatures
                        .insert((record.signature, record.instance), child);
                }
                if record.is_transient && found.insert(child) {
                    rest.push(child);
                }
            }
        }
        for id in found {
            if let Some(record) = self.records.get_mut(&id) {
                record.is_transient = false;
            }
        }
        Ok(())
    }

    /// Adds labels to those an object has.
    pub(super) fn label(
        &mut self,
        id: ObjectId,
        labels: Vec<(String, String)>,
    ) -> Result<(), Error> {
        let record = self.records.get_mut(&id).ok_or(Error::LabelUnknown(id))?;
        let mut fields = record.fields();
        let mut all: Map<String, Value> = match fields.get("__labels").map(decode) {
            Some(Field::Text(text)) => serde_json::from_str(text).unwrap_or_default(),
            Some(Field::Plain | Field::Member(_) | Field::Garbage) | None => Map::new(),
        };
        all.extend(labels.into_iter().map(|(key, value)| (key, value.into())));
        fields.insert("__labels".into(), encode_text(&object::to_text(&all)));
        let text = object::to_text(&fields);
        if record.extent + text.len() as u64 > MAX_EXTENT + record.text.len() as u64 {
            return Err(Error::TooLarge(MAX_EXTENT));
        }
        record.text = text;
        Ok(())
    }

    /// Writes the name an object was last given into its metadata, or takes it out.
    pub(super) fn set_name(&mut self, id: ObjectId, name: Option<&str>) {
        let Some(record) = self.records.get_mut(&id) else {
            return;
        };
        let mut fields = record.fields();
        match name {
            Some(name) => fields.insert("__name".into(), encode_text(&escaped(name))),
            None => fields.remove("__name"),
        };
        record.text = object::to_text(&fields);
    }

    /// A second object with the fields, members and signature of the first, and some more.
    pub(super) fn copy(
        &self,
        id: ObjectId,
        extra: Map<String, Value>,
        target: ObjectId,
    ) -> Result<Draft, Error> {
        let mut record = self.get(id).ok_or(Error::Unknown(id))?.clone();
        let mut fields = record.fields();
        for (key, value) in extra {
            match (key.as_str(), &value) {
                (_, Value::Array(_) | Value::Object(_)) => return Err(Error::CopyExtra),
                // Whose copy it is, where, and how far it is known is not for the client to say.
                ("id" | "instance_id" | "signature" | "transient" | "global", _) => {}
                ("typename", Value::String(typename)) if typename != BLOB => {
                    record.typename = typename.as_str().into();
                }
                ("typename", _) => return Err(Error::NoTypename),
                _ => _ = fields.insert(key, encode(value)),
            }
        }
        let mut draft = Draft::default();
        let old = record.text.len() as u64;
        record.text = object::to_text(&fields);
        record.extent = record.extent.saturating_sub(old) + record.text.len() as u64;
        if record.extent > MAX_EXTENT {
            return Err(Error::TooLarge(MAX_EXTENT));
        }
        for value in fields.values() {
            if let Field::Member(link) = decode(value) {
                let child = self.resolve(link.target);
                if self.owns(child, link.instance) {
                    draft.edges.push((target, child));
                }
            }
        }
        draft.records.insert(target, record);
        Ok(draft)
    }

    /// Whether a member lives and dies with its users here: objects do, and blobs of ours. The
    /// ids of other instances' blobs may be ours as well; Go's client says of ours that their
    /// instance is unknown.
    pub(super) fn owns(&self, id: ObjectId, instance: Option<InstanceId>) -> bool {
        match id {
            ObjectId::EMPTY_BLOB | ObjectId::INVALID => false,
            _ if id.is_blob() => instance
                .is_none_or(|instance| [self.own, InstanceId::UNSPECIFIED].contains(&instance)),
            _ => true,
        }
    }

    /// How large a record's tree is at least, beside its members.
    pub(super) fn extent(text: &str) -> u64 {
        text.len() as u64 + OVERHEAD
    }

    /// Whether a field is the server's to set.
    pub(super) fn is_own(key: &str) -> bool {
        OWN.contains(&key)
    }
}
