//! What a store promises as a whole.

use std::collections::HashSet;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use serde_json::{Map, Value, json};

use super::{Config, DeleteOptions, Error, Payload, Store, Transport};
use crate::shard::ids::{InstanceId, ObjectId};

const MIB: u64 = 1 << 20;

fn store_of(memory_limit: u64) -> Store {
    Store::open(Config {
        memory_limit,
        arena_dir: None,
        reserve_memory: false,
        deployment: "local".into(),
        hostname: "vm".into(),
        nodename: "node".into(),
        ipc_socket: "/run/v.sock".into(),
        rpc_endpoint: "vm:9600".into(),
    })
    .unwrap()
}

fn store() -> Store {
    store_of(MIB)
}

fn create(store: &Store, content: Value) -> ObjectId {
    store.create_object(content).unwrap().id
}

fn plain() -> Value {
    json!({"typename": "x::A", "instance_id": 0, "k": 1})
}

fn with(member: Value) -> Value {
    json!({"typename": "x::B", "instance_id": 0, "m": member})
}

fn only(id: ObjectId) -> Value {
    json!({"id": id.to_string()})
}

/// The text of the refusal.
fn refused(store: &Store, content: Value) -> String {
    store.create_object(content).unwrap_err().to_string()
}

fn shown(store: &Store, id: ObjectId) -> Value {
    store.get_objects(&[id]).remove(&id.to_string()).unwrap()
}

// The texts are those of vineyardd 0.24.2, which was asked the same.
#[test]
fn refusals_are_worded_as_clients_know_them() {
    let store = store();
    let a = create(&store, plain());
    let global = json!({"typename": "x", "instance_id": 0, "global": true, "m": only(a)});
    let global = create(&store, global);
    let check = |content: Value, text: &str| assert_eq!(refused(&store, content), text);

    check(json!({"k": 1}), "No 'typename' field in incoming metadata");
    check(
        json!({"typename": 5}),
        "No 'typename' field in incoming metadata",
    );
    check(
        json!({"typename": "vineyard::Blob", "instance_id": 0}),
        "type != \"vineyard::Blob\": Blob has no metadata",
    );
    check(
        json!({"typename": "x::Y", "k": 1}),
        "tree.contains(\"instance_id\"): The instance_id filed must be presented",
    );
    check(with(json!({})), "failed to diff meta tree: in metadata: {}");
    check(
        with(json!({"typename": "q"})),
        "failed to diff meta tree: in metadata: {\n    \"typename\": \"q\"\n}",
    );
    check(
        with(only(ObjectId(0x12_3456))),
        "failed to diff meta tree: get subtree failed: o0000000000123456",
    );
    check(
        with(json!({"id": "garbage"})),
        "failed to diff meta tree: get subtree failed: garbage",
    );
    check(
        with(json!({"id": "oe000000000000001"})),
        "failed to diff meta tree: The blobs cannot be added as a 'placeholder'.",
    );
    check(
        json!({"typename": "x", "instance_id": 1, "m": only(a)}),
        "failed to diff meta tree: Local object cannot refer remote objects",
    );
    check(
        json!({"typename": "x", "instance_id": 0, "global": true, "m": only(global)}),
        "failed to diff meta tree: Global object cannot have nested structure",
    );
    check(
        with(json!({"id": "o0000000000000abd", "instance_id": 0, "signature": 4})),
        "failed to diff meta tree: in metadata: {\n    \"id\": \"o0000000000000abd\",\n    \
         \"instance_id\": 0,\n    \"signature\": 4\n}",
    );
}

#[test]
fn what_would_kill_the_original_is_refused() {
    let store = store();
    for content in [json!(null), json!([1]), json!("x"), json!(7)] {
        assert_eq!(store.create_object(content), Err(Error::NotAnObject));
    }
    for (field, value) in [
        ("signature", json!("s1")),
        ("signature", json!(null)),
        ("instance_id", json!("0")),
        ("instance_id", json!(0.5)),
        ("global", json!("yes")),
    ] {
        let mut content = plain();
        content[field] = value;
        let text = refused(&store, content);
        assert!(text.starts_with(&format!("the field '{field}'")), "{text}");
    }
    refused(&store, with(json!({"id": 5, "typename": "q"})));
    assert!(store.list_objects("*", false, 9).is_empty());
}

#[test]
fn many_objects_are_created_together_or_not_at_all() {
    let store = store();
    let contents = vec![plain(), with(only(ObjectId(7))), plain()];
    store.create_objects(contents).unwrap_err();
    assert!(store.list_objects("*", false, 9).is_empty());
    let created = store.create_objects(vec![plain(), plain()]).unwrap();
    assert_eq!(store.list_objects("x::*", false, 9).len(), 2);
    assert_ne!(created[0].id, created[1].id);
    assert_eq!(store.create_objects(Vec::new()), Ok(Vec::new()));
}

#[test]
fn what_clients_may_not_say_is_said_by_the_server() {
    let store = store();
    let mut content = plain();
    content["transient"] = false.into();
    content["id"] = "o0000000000000001".into();
    content["__timestamp"] = 5.into();
    content["signature"] = (-1).into();
    let created = store.create_object(content).unwrap();
    assert_eq!(created.signature.0, u64::MAX);
    let tree = shown(&store, created.id);
    assert_eq!(tree["transient"], true);
    assert_eq!(tree["id"], created.id.to_string());
    assert!(tree["__timestamp"].as_u64().unwrap() > 5);
}

#[test]
fn a_complete_member_that_is_unknown_comes_with_the_object() {
    let store = store();
    let leaf = json!({"id": "o00000000000000aa", "typename": "y.z@w", "instance_id": 0,
                      "signature": 3, "transient": false, "k": [1, 2]});
    let inner = json!({"id": "o00000000000000bb", "typename": "x::In", "instance_id": 0,
                       "signature": 4, "leaf": leaf});
    let outer = create(&store, with(inner));
    let tree = shown(&store, outer);
    assert_eq!(tree["m"]["leaf"]["k"], json!([1, 2]));
    assert_eq!(tree["m"]["leaf"]["transient"], true);
    assert_eq!(tree["m"]["leaf"], shown(&store, ObjectId(0xaa)));
    // A tree that has itself as a member ends there.
    let itself = json!({"id": "o00000000000000cc", "typename": "x", "instance_id": 0,
        "signature": 5, "m": {"id": "o00000000000000cc", "typename": "x", "instance_id": 0,
        "signature": 5, "k": 1}});
    let outer = create(&store, with(itself));
    assert_eq!(shown(&store, outer)["m"]["k"], 1);
    let options = DeleteOptions {
        deep: true,
        ..DeleteOptions::default()
    };
    store.delete(&[outer], options).unwrap();
    assert!(!store.exists(ObjectId(0xcc)));
}

#[test]
fn global_objects_find_their_members_by_signature() {
    let store = store();
    let here = store.create_object(plain()).unwrap();
    let there = json!({"id": "o00000000000000aa", "typename": "x::A", "instance_id": 9,
                       "signature": 3, "k": 2});
    let blob = json!({"id": "oe000000000000001", "typename": "vineyard::Blob", "instance_id": 9,
                      "signature": 77});
    let content = json!({"typename": "x::G", "instance_id": 0, "global": true,
                         "a": only(here.id), "b": there, "c": blob});
    let global = store.create_object(content).unwrap();
    assert_eq!(global.instance_id, InstanceId::UNSPECIFIED);
    let tree = shown(&store, global.id);
    assert_eq!((&tree["a"]["k"], &tree["b"]["k"]), (&json!(1), &json!(2)));
    assert_eq!(tree["c"]["id"], "oe000000000000001");
    assert_eq!(tree["c"]["instance_id"], 9);
    // A copy of a member that takes its signature does not take its place when it goes.
    let copy = store.shallow_copy(here.id, Map::new()).unwrap();
    store.delete(&[copy], DeleteOptions::default()).unwrap();
    assert_eq!(shown(&store, global.id)["a"]["id"], here.id.to_string());
    // A local object may have a global one as a member.
    let local = json!({"typename": "x", "instance_id": u64::MAX, "m": only(global.id)});
    create(&store, local);
}

#[test]
fn a_member_without_signature_cannot_be_global() {
    let store = store();
    let blob = json!({"id": "oe000000000000001", "typename": "vineyard::Blob", "instance_id": 0});
    let content = json!({"typename": "x", "instance_id": 0, "global": true, "m": blob});
    refused(&store, content);
}

#[test]
fn hostile_depth_and_breadth_are_refused() {
    let store = store();
    let mut id = create(&store, plain());
    let mut levels = 1;
    let err = loop {
        match store.create_object(with(only(id))) {
            Ok(created) => id = created.id,
            Err(err) => break err,
        }
        levels += 1;
    };
    assert_eq!((levels, err), (120, Error::TooDeep(120)));
    let text = serde_json::to_string(&json!({"reply": {"content": store.get_objects(&[id])}}));
    serde_json::from_str::<Value>(&text.unwrap()).unwrap();

    let mut nested = json!([]);
    for _ in 0..121 {
        nested = json!([nested]);
    }
    let mut content = plain();
    content["k"] = nested;
    assert_eq!(store.create_object(content), Err(Error::TooDeep(120)));

    // Each has the one before twice: the tree doubles, what was sent does not.
    let mut id = create(&store, plain());
    let err = loop {
        let twice = json!({"typename": "x", "instance_id": 0, "a": only(id), "b": only(id)});
        match store.create_object(twice) {
            Ok(created) => id = created.id,
            Err(err) => break err,
        }
    };
    assert!(matches!(err, Error::TooLarge(_)));
}

#[test]
fn signatures_that_lead_in_a_circle_hide_the_object() {
    let store = store();
    let mut a = plain();
    a["signature"] = 42.into();
    let a = create(&store, a);
    let global = json!({"typename": "x", "instance_id": 0, "global": true, "m": only(a)});
    let global = create(&store, global);
    // An object with the signature of the member has the global object as its own member, and
    // becomes known by that signature.
    let circle = json!({"id": "o00000000000000aa", "typename": "x", "instance_id": 0,
                        "signature": 42, "m": only(global)});
    create(
        &store,
        json!({"typename": "x", "instance_id": 0, "global": true, "m": circle}),
    );
    assert!(store.get_objects(&[global]).is_empty());
    assert!(store.exists(global));
}

#[test]
fn persisting_takes_the_members_along() {
    let store = store();
    let a = create(&store, plain());
    let b = create(&store, with(only(a)));
    store.persist(b).unwrap();
    store.persist(b).unwrap();
    assert_eq!(shown(&store, b)["transient"], false);
    assert_eq!(shown(&store, b)["m"]["transient"], false);
    assert_eq!(store.is_persisted(a), Ok(true));
    assert_eq!(
        store.persist(ObjectId(999)),
        Err(Error::Unknown(ObjectId(999)))
    );
}

#[test]
fn a_copy_shares_members_and_keeps_them_alive() {
    let store = store();
    let lease = store.connect(Transport::Ipc);
    let blob = lease.create_blob(24).unwrap();
    lease.seal(blob.id).unwrap();
    let member = json!({"id": blob.id.to_string(), "typename": "vineyard::Blob", "instance_id": 0});
    let original = create(&store, with(member));
    let extra = json!({"tag": "x", "num": 3, "none": null, "transient": false, "typename": "z"});
    let Value::Object(extra) = extra else {
        unreachable!()
    };
    let copy = store.shallow_copy(original, extra).unwrap();
    store
        .delete(
            &[original],
            DeleteOptions {
                deep: true,
                ..Default::default()
            },
        )
        .unwrap();
    assert!(store.exists(blob.id));
    let tree = shown(&store, copy);
    assert_eq!(
        (&tree["tag"], &tree["num"], &tree["none"]),
        (&json!("x"), &json!(3), &json!(null))
    );
    assert_eq!(
        (&tree["transient"], &tree["typename"]),
        (&json!(true), &json!("z"))
    );
    assert_eq!(tree["m"]["id"], blob.id.to_string());
    store.delete(&[copy], DeleteOptions::default()).unwrap();
    assert_eq!(store.status().memory_usage, 0);
    for extra in [json!([1]), json!({})] {
        let extra = Map::from_iter([("list".to_owned(), extra)]);
        assert_eq!(
            store.shallow_copy(copy, extra.clone()),
            Err(Error::Unknown(copy))
        );
        let id = create(&store, plain());
        assert_eq!(store.shallow_copy(id, extra), Err(Error::CopyExtra));
    }
}

#[test]
fn listing_appends_sealed_blobs_where_there_is_room() {
    let store = store();
    let lease = store.connect(Transport::Ipc);
    let object = create(&store, plain());
    let blobs = lease.create_blobs(&[10, 20, 30]).unwrap();
    lease.seal(blobs[0].id).unwrap();
    lease.seal(blobs[2].id).unwrap();
    let keys = |pattern, regex, limit| {
        store
            .list_objects(pattern, regex, limit)
            .keys()
            .cloned()
            .collect::<Vec<_>>()
    };
    let text = |id: ObjectId| id.to_string();
    assert_eq!(
        keys("*", false, 9),
        [text(object), text(blobs[0].id), text(blobs[2].id)]
    );
    assert_eq!(keys("*", false, 2), [text(object), text(blobs[0].id)]);
    assert_eq!(keys("*", false, 0), [""; 0]);
    assert_eq!(keys("vineyard::Blob", false, 1), [text(blobs[0].id)]);
    // As upstream: the blobs go by wildcard even then.
    assert_eq!(keys("vineyard::Blob", true, 1), [text(blobs[0].id)]);
    assert_eq!(keys("vineyard::.*", true, 9), [""; 0]);
    assert_eq!(keys("(((", true, 9), [""; 0]);
    let shown = store.list_objects("vineyard::Blob", false, 9);
    assert_eq!(shown[&text(blobs[2].id)]["length"], 30);
}

#[test]
fn the_two_special_blobs_answer_as_clients_expect() {
    let store = store();
    let (empty, invalid) = (ObjectId::EMPTY_BLOB, ObjectId::INVALID);
    let found = store.get_objects(&[empty, invalid]);
    let blob = |id: ObjectId, length| {
        json!({"id": id.to_string(), "instance_id": 0, "length": length, "nbytes": length,
               "transient": true, "typename": "vineyard::Blob"})
    };
    assert_eq!(found[&empty.to_string()], blob(empty, 0));
    assert_eq!(found[&invalid.to_string()], blob(invalid, MIB));
    let lease = store.connect(Transport::Ipc);
    assert_eq!(lease.create_blob(0).unwrap().id, empty);
    lease.seal(empty).unwrap();
    lease.drop_blob(empty).unwrap();
    lease.release(empty).unwrap();
    assert_eq!(lease.get_blobs(&[empty, invalid], false).unwrap().len(), 1);
    assert!(lease.seal(invalid).is_err() && lease.drop_blob(invalid).is_err());
    // Objects share it, and are not tied together by it.
    let member = json!({"id": empty.to_string(), "typename": "vineyard::Blob", "instance_id": 0});
    let id = create(&store, with(member));
    store
        .delete(
            &[empty],
            DeleteOptions {
                force: true,
                ..Default::default()
            },
        )
        .unwrap();
    assert!(store.exists(id) && !store.exists(empty));
}

/// Polls once, without a runtime.
fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn who_waits_for_objects_is_woken_when_the_last_of_them_exists() {
    let store = store();
    let lease = store.connect(Transport::Ipc);
    let blob = lease.create_blob(8).unwrap();
    let ids = [blob.id, ObjectId(0xaa)];
    let mut wait = pin!(store.wait_objects(&ids));
    assert!(poll(wait.as_mut()).is_pending());
    assert_eq!(store.status().deferred_requests, 1);
    lease.seal(blob.id).unwrap();
    assert!(poll(wait.as_mut()).is_pending());
    let late = json!({"id": "o00000000000000aa", "typename": "x", "instance_id": 0,
                      "signature": 1});
    create(&store, with(late));
    let Poll::Ready(found) = poll(wait) else {
        panic!("both exist")
    };
    assert_eq!(found.len(), 2);
    assert_eq!(store.status().deferred_requests, 0);
    // What exists already is not waited for.
    let mut again = pin!(store.wait_objects(&ids));
    assert!(poll(again.as_mut()).is_ready());
    assert!(poll(pin!(store.wait_objects(&[]))).is_ready());
}

#[test]
fn what_is_deleted_while_another_is_awaited_is_awaited_again() {
    let store = store();
    let lease = store.connect(Transport::Ipc);
    let [first, second] = [8, 8].map(|size| lease.create_blob(size).unwrap().id);
    lease.seal(first).unwrap();
    let ids = [first, second];
    let mut wait = pin!(store.wait_objects(&ids));
    assert!(poll(wait.as_mut()).is_pending());
    lease.drop_blob(first).unwrap();
    lease.seal(second).unwrap();
    assert!(poll(wait.as_mut()).is_pending());
    assert_eq!(store.status().deferred_requests, 1);
}

#[test]
fn who_waits_for_a_name_is_woken_by_it_and_may_give_up() {
    let store = store();
    let id = create(&store, plain());
    store.persist(id).unwrap();
    let mut one = pin!(store.wait_name("n"));
    let mut two = pin!(store.wait_name("n"));
    let mut other = Box::pin(store.wait_name("other"));
    assert!(poll(one.as_mut()).is_pending());
    assert!(poll(two.as_mut()).is_pending());
    assert!(poll(other.as_mut()).is_pending());
    assert_eq!(store.status().deferred_requests, 3);
    drop(other);
    assert_eq!(store.status().deferred_requests, 2);
    store.put_name(id, "n").unwrap();
    assert_eq!((poll(one), poll(two)), (Poll::Ready(id), Poll::Ready(id)));
    assert_eq!(store.status().deferred_requests, 0);
    store.put_name(id, "other").unwrap();
}

#[test]
fn dropping_any_name_of_an_object_takes_the_shown_one_away() {
    let store = store();
    let id = create(&store, plain());
    store.persist(id).unwrap();
    store.put_name(id, "a/b~c").unwrap();
    assert_eq!(shown(&store, id)["__name"], "a~1b~0c");
    store.put_name(id, "second").unwrap();
    store.drop_name("a/b~c").unwrap();
    assert!(shown(&store, id).get("__name").is_none());
    assert_eq!(
        store.get_name("a/b~c").unwrap_err().to_string(),
        "failed to find name: a/b~c"
    );
    // A name outlives its object, and a clearing.
    store.clear();
    assert_eq!(store.get_name("second"), Ok(id));
    store.drop_name("second").unwrap();
}

#[test]
fn bytes_stay_in_place_while_they_are_copied() {
    let store = store();
    let lease = store.connect(Transport::Rpc);
    let blob = lease.create_blob(MIB).unwrap();
    store.write_blob(&blob, 100, b"abc").unwrap();
    let pin = store.pin(blob.id).unwrap();
    lease.drop_blob(blob.id).unwrap();
    assert_eq!(store.status().memory_usage, 0);
    let other = lease.create_blob(MIB / 4).unwrap();
    store.write_blob(&other, 0, &[1; 300]).unwrap();
    let mut bytes = [0; 3];
    store.read_blob(pin.payload(), 100, &mut bytes).unwrap();
    assert_eq!(&bytes, b"abc");
    drop(pin);
    assert_eq!(
        store.read_blob(&blob, 0, &mut bytes),
        Err(Error::BlobGone(blob.id))
    );
    lease.drop_blob(other.id).unwrap();
    lease.create_blob(MIB).unwrap();
}

#[test]
fn bytes_beyond_a_blob_are_out_of_reach() {
    let store = store();
    let lease = store.connect(Transport::Rpc);
    let blob = lease.create_blob(100).unwrap();
    for (at, length) in [(98, 3), (101, 0), (u64::MAX, 1)] {
        let bytes = vec![0; length];
        assert!(matches!(
            store.write_blob(&blob, at, &bytes),
            Err(Error::OutOfBounds { .. })
        ));
    }
    let forged = Payload { size: 1000, ..blob };
    assert_eq!(
        store.write_blob(&forged, 0, &[0; 1000]),
        Err(Error::BlobGone(blob.id))
    );
    store.write_blob(&blob, 100, &[]).unwrap();
    lease.shrink_blob(blob.id, 10).unwrap();
    assert_eq!(
        store.write_blob(&blob, 0, &[0; 50]),
        Err(Error::BlobGone(blob.id))
    );
}

#[test]
fn a_shrink_credits_what_it_cuts_off() {
    let store = store();
    let lease = store.connect(Transport::Ipc);
    let blob = lease.create_blob(MIB).unwrap();
    lease.shrink_blob(blob.id, 100).unwrap();
    assert_eq!(store.status().memory_usage, 100);
    let rest = lease.create_blob(MIB - 100).unwrap();
    assert_ne!(rest.offset, blob.offset);
    drop(lease);
    assert_eq!(store.status().memory_usage, 0);
}

#[test]
fn pages_are_given_back_when_asked_for_and_before_they_pile_up() {
    let store = store_of(8 * MIB);
    let lease = store.connect(Transport::Ipc);
    let pages = || rustix::fs::fstat(store.arena()).unwrap().st_blocks as u64 * 512;
    let full = |size| {
        let blob = lease.create_blob(size).unwrap();
        store
            .write_blob(&blob, 0, &vec![1; usize::try_from(size).unwrap()])
            .unwrap();
        blob
    };
    let trimmed = DeleteOptions {
        trim: true,
        ..Default::default()
    };
    let blob = full(MIB);
    store.delete(&[blob.id], DeleteOptions::default()).unwrap();
    assert!(pages() >= MIB);
    let blob = full(MIB);
    store.delete(&[blob.id], trimmed).unwrap();
    assert!(pages() <= 2 * 4096);
    // Small ones come from below and large ones from above: both would stay.
    for size in [MIB, 4 * MIB] {
        let blobs: Vec<_> = (0..8 * MIB / size).map(|_| full(size).id).collect();
        store.delete(&blobs, DeleteOptions::default()).unwrap();
    }
    full(4096);
    assert!(pages() <= 10 * MIB, "{} MiB", pages() / MIB);
}

#[test]
fn a_dead_client_gives_back_what_it_had_not_sealed() {
    let store = store();
    let (one, two) = (store.connect(Transport::Ipc), store.connect(Transport::Rpc));
    let kept = one.create_blob(10).unwrap();
    one.seal(kept.id).unwrap();
    let sealed_by_another = one.create_blob(20).unwrap();
    two.seal(sealed_by_another.id).unwrap();
    let lost = one.create_blobs(&[100, 200]).unwrap();
    // Another client may look at it, but that keeps nothing alive.
    assert_eq!(two.get_blobs(&[lost[0].id], true).unwrap().len(), 1);
    assert_eq!(
        (
            store.status().ipc_connections,
            store.status().rpc_connections
        ),
        (1, 1)
    );
    drop(one);
    assert_eq!(store.status().memory_usage, 30);
    assert!(!store.exists(lost[0].id) && store.exists(kept.id));
    assert_eq!(
        (
            store.status().ipc_connections,
            store.status().rpc_connections
        ),
        (0, 1)
    );
    two.release(lost[0].id).unwrap();
}

#[test]
fn the_cluster_is_this_instance() {
    let store = store();
    let meta = store.cluster_meta();
    let instance = &meta["i0"];
    assert_eq!((meta.len(), instance["hostname"].as_str()), (1, Some("vm")));
    assert_eq!(instance["nodename"], "node");
    assert_eq!(instance["ipc_socket"], "/run/v.sock");
    assert_eq!(instance["rpc_endpoint"], "vm:9600");
    assert!(instance["hostid"].as_u64().unwrap() < 1 << 48);
    let timestamp = instance["timestamp"].as_u64().unwrap();
    assert!(timestamp >> 32 > 1_700_000_000 && timestamp & 0xffff_ffff < 1_000_000);
}

#[test]
fn threads_share_a_store_without_harm() {
    fn is_shared<T: Send + Sync + 'static>(_: &T) {}
    let store = store_of(4 * MIB);
    is_shared(&store);
    is_shared(&store.connect(Transport::Ipc));
    let work = |thread: u8| {
        let lease = store.connect(Transport::Ipc);
        let mut ids = Vec::new();
        for round in 0..200_u64 {
            let Ok(blob) = lease.create_blob(1 + round * 97 % 60_000) else {
                continue;
            };
            ids.push(blob.id);
            let bytes = vec![thread; usize::try_from(blob.size).unwrap()];
            store.write_blob(&blob, 0, &bytes).unwrap();
            lease.seal(blob.id).unwrap();
            let member =
                json!({"id": blob.id.to_string(), "typename": "vineyard::Blob", "instance_id": 0});
            let object = create(&store, with(member));
            ids.push(object);
            let mut read = vec![0; bytes.len()];
            store.read_blob(&blob, 0, &mut read).unwrap();
            assert!(read == bytes, "another thread wrote here");
            let options = DeleteOptions {
                trim: round % 3 == 0,
                ..Default::default()
            };
            if round % 4 != 0 {
                store.delete(&[object], options).unwrap();
                assert!(!store.exists(blob.id));
            }
        }
        ids
    };
    let ids: Vec<ObjectId> = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=4)
            .map(|thread| scope.spawn(move || work(thread)))
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(
        ids.iter().collect::<HashSet<_>>().len(),
        ids.len(),
        "ids are unique"
    );
    store.clear();
    assert_eq!(store.status().memory_usage, 0);
    store.connect(Transport::Ipc).create_blob(4 * MIB).unwrap();
}

#[test]
fn an_impossible_store_says_why() {
    let mut config = store().config().clone();
    config.memory_limit = u64::MAX;
    let err = Store::open(config.clone()).unwrap_err();
    assert_eq!(
        err.to_string(),
        format!("a store of {} bytes is larger than any file", u64::MAX)
    );
    config.memory_limit = MIB;
    config.arena_dir = Some("/nonexistent".into());
    assert_eq!(
        Store::open(config).unwrap_err().to_string(),
        "opening the arena"
    );
}
