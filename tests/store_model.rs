//! Random operations on a store agree with a model that is too simple to be wrong.
//!
//! The model keeps lists and looks through them. After every step the store must show what the
//! model shows: usage to the byte, what exists, every tree, every name, every figure, and the
//! bytes of every blob.

// A test may fail anywhere, and each step function leaves to the next what is not its own.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Map, Value, json};
use vinelet::shard::ids::ObjectId;
use vinelet::shard::store::{
    Config, DeleteOptions, Error, Lease, Payload, Region, Store, Transport,
};

const LIMIT: u64 = 20_000;
const CONNECTIONS: usize = 3;

#[derive(Clone, Debug)]
enum Op {
    CreateBlobs(usize, Vec<u64>),
    Seal(usize, Index),
    Get(usize, Vec<Index>, bool),
    Release(usize, Index),
    Drop(Index),
    Shrink(Index, u64),
    CreateObject(Vec<Index>, bool),
    Delete(Vec<Index>, DeleteOptions),
    Persist(Index),
    Label(Index, String),
    Copy(Index),
    PutName(Index, String),
    DropName(String),
    Disconnect(usize),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let conn = || 0..CONNECTIONS;
    let one = any::<Index>;
    let some = || prop::collection::vec(any::<Index>(), 1..4);
    let name = || prop::sample::select(vec!["0", "a/b", "~", "name", ""]).prop_map(str::to_owned);
    let size = prop_oneof![1 => Just(0), 12 => 1..3_000_u64, 1 => Just(LIMIT), 1 => Just(u64::MAX)];
    let options = any::<[bool; 4]>().prop_map(|[force, deep, trim, fastpath]| DeleteOptions {
        force,
        deep,
        trim,
        fastpath,
    });
    prop_oneof![
        8 => (conn(), prop::collection::vec(size, 1..4)).prop_map(|(c, s)| Op::CreateBlobs(c, s)),
        6 => (conn(), one()).prop_map(|(c, b)| Op::Seal(c, b)),
        3 => (conn(), some(), any::<bool>()).prop_map(|(c, b, u)| Op::Get(c, b, u)),
        2 => (conn(), one()).prop_map(|(c, b)| Op::Release(c, b)),
        1 => one().prop_map(Op::Drop),
        2 => (one(), 0..3_000_u64).prop_map(|(b, s)| Op::Shrink(b, s)),
        10 => (some(), any::<bool>()).prop_map(|(m, f)| Op::CreateObject(m, f)),
        5 => (some(), options).prop_map(|(i, o)| Op::Delete(i, o)),
        3 => one().prop_map(Op::Persist),
        2 => (one(), name()).prop_map(|(o, k)| Op::Label(o, k)),
        2 => one().prop_map(Op::Copy),
        4 => (one(), name()).prop_map(|(o, n)| Op::PutName(o, n)),
        1 => name().prop_map(Op::DropName),
        2 => conn().prop_map(Op::Disconnect),
        1 => Just(Op::Clear),
    ]
}

struct Blob {
    payload: Payload,
    writer: usize,
}

#[derive(Clone)]
struct Object {
    id: ObjectId,
    signature: u64,
    timestamp: Value,
    members: Vec<ObjectId>,
    persisted: bool,
    labels: BTreeMap<String, String>,
    name: Option<String>,
}

struct World {
    store: Store,
    leases: Vec<Lease>,
    blobs: Vec<Blob>,
    objects: Vec<Object>,
    /// Every id there ever was, and some that never were.
    ids: Vec<ObjectId>,
    names: BTreeMap<String, ObjectId>,
    held: Vec<BTreeSet<ObjectId>>,
}

/// A deletion under way.
struct Request<'a> {
    ids: &'a [ObjectId],
    gone: RefCell<BTreeSet<ObjectId>>,
}

fn fill(payload: &Payload) -> u8 {
    (payload.id.0 % 251) as u8
}

fn fields() -> Value {
    json!({"value": [1, "two", 3.5], "text": "vl", "": null, "a/b": -1, "max": u64::MAX})
}

fn blob_tree(id: ObjectId, length: u64) -> Value {
    json!({"id": id.to_string(), "typename": "vineyard::Blob", "instance_id": 0,
           "length": length, "nbytes": length, "transient": true})
}

impl World {
    fn new() -> Self {
        let store = Store::open(Config {
            memory_limit: LIMIT,
            arena_dir: None,
            reserve_memory: false,
            deployment: "local".into(),
            hostname: "host".into(),
            nodename: "node".into(),
            ipc_socket: "/s".into(),
            rpc_endpoint: "0.0.0.0:0".into(),
        })
        .unwrap();
        Self {
            leases: (0..CONNECTIONS)
                .map(|_| store.connect(Transport::Ipc))
                .collect(),
            store,
            blobs: Vec::new(),
            objects: Vec::new(),
            ids: vec![
                ObjectId(4711),
                ObjectId::EMPTY_BLOB,
                ObjectId(1 << 63 | 4711),
            ],
            names: BTreeMap::new(),
            held: vec![BTreeSet::new(); CONNECTIONS],
        }
    }

    fn used(&self) -> u64 {
        self.blobs.iter().map(|blob| blob.payload.size).sum()
    }

    fn pick(&self, index: &Index) -> ObjectId {
        *index.get(&self.ids)
    }

    fn pick_all(&self, indexes: &[Index]) -> Vec<ObjectId> {
        indexes.iter().map(|index| self.pick(index)).collect()
    }

    fn blob(&mut self, id: ObjectId) -> Option<&mut Payload> {
        let payloads = self.blobs.iter_mut().map(|blob| &mut blob.payload);
        payloads.into_iter().find(|payload| payload.id == id)
    }

    fn object(&mut self, id: ObjectId) -> Option<&mut Object> {
        self.objects.iter_mut().find(|object| object.id == id)
    }

    fn tree(&self, id: ObjectId) -> Option<Value> {
        if id == ObjectId::EMPTY_BLOB {
            return Some(blob_tree(id, 0));
        }
        if id.is_blob() {
            let payloads = self.blobs.iter().map(|blob| blob.payload);
            let found = payloads
                .into_iter()
                .find(|payload| payload.id == id && payload.is_sealed);
            return found.map(|payload| blob_tree(id, payload.size));
        }
        let object = self.objects.iter().find(|object| object.id == id)?;
        let mut tree = fields();
        tree["id"] = id.to_string().into();
        tree["typename"] = "test::Object<int>".into();
        tree["signature"] = object.signature.into();
        tree["instance_id"] = 0.into();
        tree["__timestamp"] = object.timestamp.clone();
        tree["transient"] = (!object.persisted).into();
        for (index, &member) in object.members.iter().enumerate() {
            let shown = match member.is_blob() {
                true => blob_tree(member, 0),
                false => self.tree(member)?,
            };
            tree[format!("member-{index}")] = shown;
        }
        if !object.labels.is_empty() {
            tree["__labels"] = serde_json::to_string(&object.labels).unwrap().into();
        }
        if let Some(name) = &object.name {
            tree["__name"] = name.replace('~', "~0").replace('/', "~1").into();
        }
        Some(tree)
    }

    fn create_blobs(&mut self, connection: usize, sizes: &[u64]) {
        let result = self.leases[connection].create_blobs(sizes);
        let mut used = self.used();
        for &size in sizes {
            if used.checked_add(size).is_none_or(|sum| sum > LIMIT) {
                let limit = LIMIT;
                assert_eq!(result, Err(Error::NotEnoughMemory { size, limit, used }));
                return;
            }
            used += size;
        }
        for (payload, &size) in result.unwrap().into_iter().zip(sizes) {
            assert_eq!((payload.size, payload.is_sealed), (size, false));
            if size == 0 {
                assert_eq!(payload.id, ObjectId::EMPTY_BLOB);
                continue;
            }
            assert!(payload.id.is_blob() && !self.ids.contains(&payload.id));
            assert!(payload.offset.is_multiple_of(64));
            assert!(payload.offset + size <= self.store.arena_size());
            let bytes = vec![fill(&payload); usize::try_from(size).unwrap()];
            self.store.write_blob(&payload, 0, &bytes).unwrap();
            self.ids.push(payload.id);
            self.blobs.push(Blob {
                payload,
                writer: connection,
            });
        }
    }

    fn get_blobs(&mut self, connection: usize, ids: &[ObjectId], allow_unsealed: bool) {
        let result = self.leases[connection].get_blobs(ids, allow_unsealed);
        let mut found = Vec::new();
        for &id in ids {
            let empty = Payload {
                region: Region::Arena,
                id,
                offset: 0,
                size: 0,
                is_sealed: false,
            };
            match self.blob(id).copied() {
                Some(payload) if !payload.is_sealed && !allow_unsealed => {
                    assert_eq!(result, Err(Error::NotSealed(id)));
                    return;
                }
                Some(payload) => found.push(payload),
                None if id == ObjectId::EMPTY_BLOB => found.push(empty),
                None => {}
            }
        }
        assert_eq!(result, Ok(found));
        let kept = ids.iter().filter(|&&id| id != ObjectId::EMPTY_BLOB);
        self.held[connection].extend(kept);
    }

    fn create_object(&mut self, members: Vec<ObjectId>, full: bool) {
        let mut content = fields();
        content["typename"] = "test::Object<int>".into();
        content["instance_id"] = 0.into();
        content["transient"] = false.into();
        content["id"] = "whatever".into();
        let mut unknown = None;
        for (index, &member) in members.iter().enumerate() {
            let id = member.to_string();
            let is_known = self.object(member).is_some();
            content[format!("member-{index}")] = if member.is_blob() {
                json!({"id": id, "typename": "vineyard::Blob", "instance_id": 0, "length": 9})
            } else if full && is_known {
                // What is said of a member that exists changes nothing.
                json!({"id": id, "typename": "other", "instance_id": 0, "value": "new"})
            } else {
                json!({"id": id})
            };
            if !member.is_blob() && !is_known {
                unknown = unknown.or(Some(id));
            }
        }
        let result = self.store.create_object(content);
        if let Some(unknown) = unknown {
            assert_eq!(result, Err(Error::MemberUnknown(unknown)));
            return;
        }
        let created = result.unwrap();
        assert!(!created.id.is_blob() && !self.ids.contains(&created.id));
        self.ids.push(created.id);
        let tree = &self.store.get_objects(&[created.id])[&created.id.to_string()];
        assert!(
            tree["__timestamp"].as_u64().unwrap() > 1_700_000_000_000,
            "milliseconds"
        );
        self.objects.push(Object {
            id: created.id,
            timestamp: tree["__timestamp"].clone(),
            signature: created.signature.0,
            members,
            persisted: false,
            labels: BTreeMap::new(),
            name: None,
        });
    }

    fn forget_blob(&mut self, id: ObjectId) -> bool {
        let before = self.blobs.len();
        self.blobs.retain(|blob| blob.payload.id != id);
        before > self.blobs.len()
    }

    /// Who has it as a member; for the empty blob that does not count.
    fn users(&self, id: ObjectId) -> Vec<ObjectId> {
        if id == ObjectId::EMPTY_BLOB {
            return Vec::new();
        }
        let users = self
            .objects
            .iter()
            .filter(|object| object.members.contains(&id));
        users.map(|object| object.id).collect()
    }

    /// The rule as the protocol has it, by recursion; what goes is gone at once.
    fn delete(&mut self, id: ObjectId, request: &Request<'_>, force: bool, deep: bool) {
        let is_gone = |id| request.gone.borrow().contains(id);
        if is_gone(&id) {
            return;
        }
        for user in self.users(id) {
            if request.ids.contains(&user) {
                self.delete(user, request, force, deep);
            }
        }
        let users = self.users(id);
        if is_gone(&id) || !(force || users.is_empty()) {
            return;
        }
        request.gone.borrow_mut().insert(id);
        let members = self.object(id).map(|object| object.members.clone());
        self.objects.retain(|object| object.id != id);
        self.forget_blob(id);
        let is_tried = |member: &ObjectId| deep || member.is_blob();
        for member in members.into_iter().flatten().filter(is_tried) {
            if member != ObjectId::EMPTY_BLOB {
                self.delete(member, request, false, true);
            }
        }
        for user in users {
            self.delete(user, request, true, false);
        }
    }

    fn step_blobs(&mut self, op: &Op) {
        match op {
            Op::CreateBlobs(connection, sizes) => self.create_blobs(*connection, sizes),
            Op::Seal(connection, index) => {
                let id = self.pick(index);
                let result = self.leases[*connection].seal(id);
                if let Some(payload) = self.blob(id) {
                    payload.is_sealed = true;
                    self.held[*connection].insert(id);
                    assert_eq!(result, Ok(()));
                } else if id == ObjectId::EMPTY_BLOB {
                    assert_eq!(result, Ok(()));
                } else {
                    assert_eq!(result, Err(Error::SealUnknown(id)));
                }
            }
            Op::Get(connection, indexes, allow_unsealed) => {
                self.get_blobs(*connection, &self.pick_all(indexes), *allow_unsealed);
            }
            Op::Release(connection, index) => {
                let id = self.pick(index);
                let result = self.leases[*connection].release(id);
                let held = &mut self.held[*connection];
                let expected = match id {
                    ObjectId::EMPTY_BLOB => Ok(()),
                    _ if held.is_empty() => Err(Error::NothingHeld),
                    _ => held.remove(&id).then_some(()).ok_or(Error::NotHeld(id)),
                };
                assert_eq!(result, expected);
            }
            Op::Drop(index) => {
                let id = self.pick(index);
                let result = self.leases[0].drop_blob(id);
                let is_dropped = self.forget_blob(id) || id == ObjectId::EMPTY_BLOB;
                assert_eq!(
                    result,
                    is_dropped.then_some(()).ok_or(Error::DropUnknown(id))
                );
            }
            Op::Shrink(index, size) => {
                let (id, size) = (self.pick(index), *size);
                let result = self.leases[0].shrink_blob(id, size);
                let expected = match self.blob(id) {
                    None => Err(Error::ShrinkUnknown(id)),
                    Some(payload) if payload.is_sealed => Err(Error::ShrinkSealed),
                    Some(payload) if payload.size < size => Err(Error::ShrinkGrows {
                        size,
                        current: payload.size,
                    }),
                    Some(payload) => {
                        payload.size = size;
                        Ok(())
                    }
                };
                assert_eq!(result, expected);
            }
            _ => self.step_objects(op),
        }
    }

    fn step_objects(&mut self, op: &Op) {
        match op {
            Op::CreateObject(indexes, full) => self.create_object(self.pick_all(indexes), *full),
            Op::Delete(indexes, options) => {
                let ids = self.pick_all(indexes);
                let result = self.store.delete(&ids, *options);
                let request = Request {
                    ids: &ids,
                    gone: RefCell::default(),
                };
                if !options.fastpath {
                    for &id in &ids {
                        self.delete(id, &request, options.force, options.deep);
                    }
                } else if ids.iter().all(|id| id.is_blob()) {
                    request.gone.borrow_mut().extend(&ids);
                    ids.iter().for_each(|&id| _ = self.forget_blob(id));
                } else {
                    assert_eq!(result, Err(Error::FastpathObject));
                    return;
                }
                let mut gone = request.gone.into_inner();
                gone.retain(|id| id.is_blob());
                assert_eq!(result.unwrap().into_iter().collect::<BTreeSet<_>>(), gone);
            }
            Op::Persist(index) => {
                let id = self.pick(index);
                let result = self.store.persist(id);
                if id.is_blob() {
                    assert_eq!(result, Err(Error::PersistBlob));
                } else if self.object(id).is_none() {
                    assert_eq!(result, Err(Error::Unknown(id)));
                }
                let mut rest = vec![id];
                while let Some(id) = rest.pop() {
                    if let Some(object) = self.object(id) {
                        object.persisted = true;
                        rest.extend(&object.members);
                    }
                }
            }
            Op::Copy(index) => {
                let id = self.pick(index);
                let extra = Map::from_iter([("text".to_owned(), "vl".into())]);
                let result = self.store.shallow_copy(id, extra);
                match self.object(id).cloned() {
                    _ if id.is_blob() => assert_eq!(result, Err(Error::CopyBlob)),
                    None => assert_eq!(result, Err(Error::Unknown(id))),
                    Some(original) => {
                        let id = result.unwrap();
                        assert!(!self.ids.contains(&id));
                        self.ids.push(id);
                        self.objects.push(Object { id, ..original });
                    }
                }
            }
            _ => self.step_names(op),
        }
    }

    fn step_names(&mut self, op: &Op) {
        match op {
            Op::Label(index, key) => {
                let id = self.pick(index);
                let labels = vec![(key.clone(), "x\"y".to_owned())];
                let result = self.store.label(id, labels);
                match self.object(id) {
                    _ if id.is_blob() => assert_eq!(result, Err(Error::LabelBlob)),
                    None => assert_eq!(result, Err(Error::LabelUnknown(id))),
                    Some(object) => _ = object.labels.insert(key.clone(), "x\"y".to_owned()),
                }
            }
            Op::PutName(index, name) => {
                let id = self.pick(index);
                let result = self.store.put_name(id, name);
                let expected = match self.object(id) {
                    _ if id.is_blob() => Err(Error::NameBlob),
                    None => Err(Error::NameUnknown(id)),
                    Some(object) if !object.persisted => Err(Error::NameTransient),
                    Some(_) if name.is_empty() => Err(Error::NameEmpty),
                    Some(object) => {
                        object.name = Some(name.clone());
                        self.names.insert(name.clone(), id);
                        Ok(())
                    }
                };
                assert_eq!(result, expected);
            }
            Op::DropName(name) => {
                self.store.drop_name(name).unwrap();
                let id = self.names.remove(name);
                if let Some(object) = id.and_then(|id| self.object(id)) {
                    object.name = None;
                }
            }
            Op::Disconnect(connection) => {
                self.leases[*connection] = self.store.connect(Transport::Ipc);
                let keep = |blob: &Blob| blob.payload.is_sealed || blob.writer != *connection;
                self.blobs.retain(keep);
                self.held[*connection].clear();
            }
            Op::Clear => {
                self.store.clear();
                self.blobs.clear();
                self.objects.clear();
            }
            _ => unreachable!("{op:?}"),
        }
    }

    fn check(&mut self) {
        let status = self.store.status();
        assert_eq!(
            (status.memory_usage, status.memory_limit),
            (self.used(), LIMIT)
        );
        assert_eq!(
            (status.ipc_connections, status.deferred_requests),
            (CONNECTIONS as u64, 0)
        );
        for id in self.ids.clone() {
            let is_there = self.blob(id).is_some() || self.object(id).is_some();
            assert_eq!(self.store.exists(id), is_there, "{id}");
            let expected = match self.object(id) {
                Some(object) => Ok(object.persisted),
                None if id.is_blob() => Ok(false),
                None => Err(Error::Unknown(id)),
            };
            assert_eq!(self.store.is_persisted(id), expected);
        }
        let trees = self
            .ids
            .iter()
            .filter_map(|&id| Some((id.to_string(), self.tree(id)?)));
        let mut trees = Map::from_iter(trees);
        assert_eq!(self.store.get_objects(&self.ids), trees);
        trees.remove(&ObjectId::EMPTY_BLOB.to_string());
        let listed = self.store.list_objects("*", false, u64::MAX);
        assert_eq!(
            listed.keys().collect::<Vec<_>>(),
            trees.keys().collect::<Vec<_>>()
        );
        assert_eq!(self.store.list_names("*", false, u64::MAX), self.names);
        for (name, &id) in &self.names {
            assert_eq!(self.store.get_name(name), Ok(id));
        }
        for blob in &self.blobs {
            let mut bytes = vec![0; usize::try_from(blob.payload.size).unwrap()];
            self.store.read_blob(&blob.payload, 0, &mut bytes).unwrap();
            assert!(
                bytes.iter().all(|&byte| byte == fill(&blob.payload)),
                "foreign bytes"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_store_agrees_with_the_model(ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World::new();
        for op in ops {
            world.step_blobs(&op);
            world.check();
        }
        world.store.clear();
        prop_assert_eq!(world.store.status().memory_usage, 0);
        // Nothing stays taken: one blob can have all of it.
        world.leases[0].create_blob(LIMIT).unwrap();
    }
}
