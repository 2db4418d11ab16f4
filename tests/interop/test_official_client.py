"""The official Python client against our shard and against the real vineyardd.

What stands here is true of both, so the suite is also its own check: a claim that the real server
does not keep fails too. `test_the_client_sees_what_vineyardd_would_show` goes further and compares
whole conversations, answer by answer.
"""

import gc
import re
import threading

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import vineyard
from vineyard._C import VineyardException

from harness import Task, eventually, memory_usage, vineyard_call
from servers import PROGRAMS, Server

MIB = 1 << 20
LIMIT = 64 * MIB


@pytest.fixture(params=sorted(PROGRAMS))
def server(request, scratch):
    server = Server(request.param, scratch)
    yield server
    server.stop()


@pytest.fixture
def ours(scratch):
    """Where vineyardd is known to do worse, only our own shard is held to the promise."""
    server = Server("vinelet", scratch)
    yield server
    server.stop()


@pytest.fixture
def client(server):
    client = server.connect()
    yield client
    client.close()


# --- values ------------------------------------------------------------------------------------


def same(left, right):
    """Equality of whatever the client can carry, types included."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and np.array_equal(left, right)
    if isinstance(left, pd.DataFrame):
        pd.testing.assert_frame_equal(left, right)
        return True
    if isinstance(left, pd.Series):
        pd.testing.assert_series_equal(left, right)
        return True
    if isinstance(left, (pa.Table, pa.RecordBatch)):
        return left.to_pydict() == right.to_pydict()  # strings come back as large strings
    if left is True:
        return right == 1  # so says the client's own resolver
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return type(left) is type(right) and left == right


DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "bool", "c16"]
VALUES = {
    "int": 42,
    "negative int": -(1 << 62),
    "float": 3.25,
    "string": "grüße, 世界",
    "empty string": "",
    "long string": "x" * 100_000,
    "bool": True,
    "none": None,
    "tuple": (1, "two", 3.0),
    "empty tuple": (),
    "nested tuple": (1, (2, (3, "deep")), "end"),
    "list": [1, 2, 3],
    "dict": {"one": 1, "two": "zwei", "three": [3]},
    "dict with an array": {"a": np.arange(10), "b": "text"},
    **{f"array of {d}": np.arange(1000).astype(d) for d in DTYPES},
    "empty array": np.zeros((0,)),
    "array with an empty axis": np.zeros((3, 0, 2), dtype="i4"),
    "0-d array": np.array(7.5),
    "matrix": np.random.default_rng(1).random((100, 37)),
    "fortran order": np.asfortranarray(np.arange(12).reshape(3, 4)),
    "array of strings": np.array(["a", "bcd", ""], dtype=object),
    "datetimes": np.array(["2024-01-01", "2025-02-03"], dtype="datetime64[ns]"),
    "series": pd.Series([1.5, 2.5, float("nan")], name="s"),
    "frame": pd.DataFrame({"i": [1, 2, 3], "f": [0.1, 0.2, 0.3]}),
    "frame with an index": pd.DataFrame({"v": np.arange(5)}, index=[10, 20, 30, 40, 50]),
    "frame with strings": pd.DataFrame({"n": [1, 2], "s": ["a", "b"]}),
    "empty frame": pd.DataFrame({"a": np.array([], dtype="i8")}),
    "arrow table": pa.table({"x": [1, 2, None], "y": ["a", None, "c"]}),
    "arrow batch": pa.RecordBatch.from_arrays([pa.array([1, 2]), pa.array(["p", "q"])], names=["n", "s"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_by_id_and_by_name_on_another_connection(server, client, name):
    value = VALUES[name]
    object_id = client.put(value, persist=True, name="the-value")
    other = server.connect()
    assert same(value, other.get(object_id))
    assert same(value, other.get(name="the-value"))
    assert other.get_name("the-value") == object_id
    other.close()


@pytest.mark.parametrize("value", [b"\x00\xff" * 1000, b""], ids=["some", "none"])
def test_bytes_are_a_bare_blob(server, client, value):
    object_id = client.put(value)
    assert bytes(server.connect().get(object_id)) == value
    with pytest.raises(VineyardException, match="The blobs cannot be persisted"):
        client.persist(object_id)


def test_an_array_is_the_shared_memory_itself(client):
    array = client.get(client.put(np.arange(MIB)))
    address = array.__array_interface__["data"][0]
    assert any(
        low <= address < high and "s" in permissions
        for low, high, permissions, _ in _mappings()
    )


def _mappings():
    for line in open("/proc/self/maps"):
        span, permissions, _, _, inode, *path = line.split()
        low, high = (int(end, 16) for end in span.split("-"))
        yield low, high, permissions, (inode, " ".join(path))


# --- blobs and memory ------------------------------------------------------------------------------


def usage(client):
    return client.status.memory_usage


def test_memory_is_counted_as_requested_and_given_back(client):
    assert (usage(client), client.status.memory_limit) == (0, LIMIT)
    object_id = client.put(np.zeros(MIB, dtype="u1"))
    assert usage(client) == MIB
    client.delete(object_id)
    assert usage(client) == 0


def test_more_than_the_limit_is_not_enough_memory_and_changes_nothing(client):
    kept = client.put(np.ones(MIB, dtype="u1"))
    before = usage(client)
    with pytest.raises(vineyard.NotEnoughMemoryException) as error:
        client.create_blob(LIMIT)
    assert (f"Failed to allocate memory of size {LIMIT}, total available memory size are {LIMIT}, "
            f"and {before} are already in use") in str(error.value)
    assert usage(client) == before
    assert client.get(kept).sum() == MIB


def test_the_limit_can_be_used_up_and_used_again(client):
    for _ in range(3):
        blobs = [client.put(np.zeros(8 * MIB, dtype="u1")) for _ in range(8)]
        with pytest.raises(vineyard.NotEnoughMemoryException):
            client.create_blob(8 * MIB)
        assert usage(client) == LIMIT
        assert client.get(client.put(12)) == 12, "metadata needs no blob memory"
        client.delete(blobs)
        assert usage(client) == 0


def test_a_create_of_many_that_fails_part_way_leaks_nothing(ours):
    message = {"type": "create_buffers_request", "num": 2, "sizes": [1024, LIMIT + 1], "size": [1024, LIMIT + 1]}
    reply = vineyard_call(ours.socket, message)[-1]
    assert reply.get("code") == 41, reply
    assert memory_usage(ours.socket) == 0


def test_an_aborted_blob_gives_its_memory_back(client):
    builder = client.create_blob(1000)
    assert usage(client) == 1000
    builder.abort(client.ipc_client)
    assert usage(client) == 0


def test_a_shrunk_blob_has_the_new_size(client):
    builder = client.create_blob(MIB)
    builder.copy(0, b"abcd" * 25)
    builder.shrink(client.ipc_client, 100)
    blob = builder.seal(client)
    assert bytes(client.get_blob(blob.id)) == b"abcd" * 25


def test_what_a_blob_shrinks_by_can_be_used_again(ours):
    client = ours.connect()
    builder = client.create_blob(LIMIT)
    builder.shrink(client.ipc_client, 100)
    blob = builder.seal(client)
    assert usage(client) == 100
    client.create_blob(LIMIT // 2).abort(client.ipc_client)
    client.delete(blob.id)
    assert usage(client) == 0


def test_a_blob_is_seen_when_it_is_sealed(server, client):
    builder = client.create_blob(64)
    builder.copy(0, b"!" * 64)
    other = server.connect()
    with pytest.raises(VineyardException, match="Object not sealed"):
        other.get_blob(builder.id)
    builder.seal(client)
    assert bytes(other.get_blob(builder.id)) == b"!" * 64
    other.close()


def test_an_empty_blob_needs_no_memory(client):
    blob = client.create_blob(0).seal(client)
    assert bytes(client.get_blob(blob.id)) == b""
    assert usage(client) == 0


def test_many_blobs_come_back_together(client):
    ids = []
    for number in range(50):
        builder = client.create_blob(100 + number)
        builder.copy(0, bytes([number]) * (100 + number))
        ids.append(builder.seal(client).id)
    for number, blob in enumerate(client.get_blobs(ids)):
        assert bytes(blob) == bytes([number]) * (100 + number)


def test_clear_leaves_nothing(client):
    for number in range(10):
        client.put(np.arange(number + 1), persist=True, name=f"n{number}")
    client.clear()
    assert usage(client) == 0
    assert client.list_objects("*", limit=100) == []


def test_what_a_dead_client_had_not_sealed_is_given_back(ours):
    code = "import vineyard; c = vineyard.connect(socket); b = [c.create_blob(1 << 20) for _ in range(4)]; result = c.status.memory_usage"
    task = Task()
    assert task.run(code, socket=str(ours.socket)) == 4 * MIB
    task.kill()
    eventually(lambda: memory_usage(ours.socket) == 0, 5, "unsealed blobs given back")


def test_what_a_dead_client_had_sealed_stays(server):
    code = "import vineyard, numpy; c = vineyard.connect(socket); result = int(c.put(numpy.arange(1000)))"
    task = Task()
    object_id = task.run(code, socket=str(server.socket))
    task.kill()
    client = server.connect()
    assert client.get(vineyard.ObjectID(object_id)).sum() == 499500
    client.close()


# --- metadata ------------------------------------------------------------------------------------


def test_an_object_is_made_of_members(server, client):
    first, second = client.put(np.arange(10)), client.put("leaf")
    meta = vineyard.ObjectMeta()
    meta["typename"] = "test::Pair"
    meta["answer"] = 42
    meta["ratio"] = 0.5
    meta["words"] = "a b"
    meta.add_member("first", client.get_meta(first))
    meta.add_member("second", second)
    made = client.create_metadata(meta)
    other = server.connect()  # the client's metadata does not outlive its connection
    seen = other.get_meta(made.id)
    assert seen.typename == "test::Pair"
    assert (seen["answer"], seen["ratio"], seen["words"]) == (42, 0.5, "a b")
    assert seen.get_member("first").id == first
    assert seen.get_member("second").id == second


def test_labels_come_back(server, client):
    object_id = client.put(1)
    client.label(object_id, "color", "red")
    client.label(object_id, {"shape": "round", "color": "blue"})
    assert server.connect().get_meta(object_id).labels == {"color": "blue", "shape": "round"}


def test_transient_until_persisted(server, client):
    object_id = client.put(np.arange(3))
    assert client.get_meta(object_id)["transient"] is True
    client.persist(object_id)
    client.persist(object_id)
    assert server.connect().get_meta(object_id)["transient"] is False


def test_a_shallow_copy_shares_the_blobs(client):
    object_id = client.put(np.arange(1000))
    before = usage(client)
    copy = client.shallow_copy(object_id, {"note": "mine"})
    assert copy != object_id
    assert usage(client) == before
    assert np.array_equal(client.get(copy), np.arange(1000))
    assert client.get_meta(copy)["note"] == "mine"


def test_listing_knows_patterns_and_limits(client):
    for number in range(5):
        client.put(number)
        client.put(str(number))
    assert len(client.list_metadatas("vineyard::Scalar<int>", limit=100)) == 5
    assert len(client.list_metadatas(r"vineyard::Scalar<i.*", regex=True, limit=100)) == 5
    assert len(client.list_objects("vineyard::Scalar*", limit=3)) == 3
    assert client.list_metadatas("no::such*", limit=100) == []


def test_a_member_in_use_survives_the_deletion_of_one_user(client):
    leaf = client.put(np.arange(100))
    pair = client.create_metadata(_holder(client, leaf)).id
    client.delete(leaf)  # without force: used by `pair`, nothing happens
    assert client.exists(leaf) and client.exists(pair)
    client.delete(pair, deep=False)
    assert not client.exists(pair) and client.exists(leaf)
    client.delete(leaf)
    assert not client.exists(leaf)
    assert usage(client) == 0


def test_force_deletes_the_users_too(client):
    leaf = client.put(np.arange(100))
    pair = client.create_metadata(_holder(client, leaf)).id
    client.delete(leaf, force=True)
    assert not client.exists(leaf) and not client.exists(pair)
    assert usage(client) == 0


def test_deep_deletes_members_that_nobody_else_uses(client):
    shared, own = client.put(np.arange(100)), client.put(np.arange(50))
    one = client.create_metadata(_holder(client, shared, own)).id
    two = client.create_metadata(_holder(client, shared)).id
    client.delete(one, deep=True)
    assert not client.exists(own)
    assert client.exists(shared) and client.exists(two)


def _holder(client, *members):
    meta = vineyard.ObjectMeta()
    meta["typename"] = "test::Holder"
    for number, member in enumerate(members):
        meta.add_member(f"member_{number}", client.get_meta(member))
    return meta


# --- names ---------------------------------------------------------------------------------------


def test_a_name_needs_an_object_that_is_persisted(client):
    object_id = client.put(1)
    with pytest.raises(VineyardException):
        client.ipc_client.put_name(object_id, "early")
    client.persist(object_id)
    client.put_name(object_id, "late")
    assert client.get_name("late") == object_id


def test_a_name_moves_and_goes(client):
    first, second = client.put(1, persist=True), client.put(2, persist=True)
    client.put_name(first, "it")
    client.put_name(second, "it")
    assert client.get_name("it") == second
    client.drop_name("it")
    with pytest.raises(vineyard.ObjectNotExistsException):
        client.get_name("it")


def test_names_are_listed_by_pattern(client):
    for name in ("alpha", "alpine", "beta"):
        client.put(1, persist=True, name=name)
    assert set(client.list_names("al*", limit=10)) == {"alpha", "alpine"}
    assert set(client.list_names(".*a$", regex=True, limit=10)) == {"alpha", "beta"}


def test_who_waits_for_a_name_is_served_when_it_comes(server, client):
    found = []
    waiting = server.connect()
    thread = threading.Thread(target=lambda: found.append(waiting.get_name("later", wait=True)), daemon=True)
    thread.start()
    eventually(lambda: client.status.deferred_requests == 1, 5, "a deferred request")
    object_id = client.put("here", persist=True, name="later")
    thread.join(10)
    assert found == [object_id]


# --- several at once -------------------------------------------------------------------------------


def test_processes_share_what_they_put(server):
    work = (
        "import vineyard, numpy\n"
        "client = vineyard.connect(socket)\n"
        "for number in range(20):\n"
        "    client.put(numpy.full(1000, rank * 100 + number), persist=True, name=f'{rank}-{number}')\n"
        "result = [int(client.get(name=f'{other}-{n}', fetch=False)[0]) for other in (rank,) for n in range(20)]\n"
    )
    look = "result = sorted(int(client.get(name=f'{r}-{n}')[999]) for r in range(4) for n in range(20))"
    tasks = [Task() for _ in range(4)]
    for rank, task in enumerate(tasks):
        task.send(work, rank=rank, socket=str(server.socket))
    for rank, task in enumerate(tasks):
        assert task.receive() == [rank * 100 + n for n in range(20)]
    everything = sorted(r * 100 + n for r in range(4) for n in range(20))
    for task in tasks:
        assert task.run(look) == everything
    for task in tasks:
        task.close()


def test_two_hundred_connections_are_served_and_forgotten(server, client):
    crowd = [server.connect() for _ in range(200)]
    assert client.status.ipc_connections >= 201
    assert [member.get(member.put(number)) for number, member in enumerate(crowd)] == list(range(200))
    del crowd
    gc.collect()
    eventually(lambda: client.status.ipc_connections <= 2, 10, "the crowd is forgotten")


def test_a_request_that_nobody_knows_is_answered_with_an_error(server):
    reply = vineyard_call(server.socket, {"type": "brew_coffee_request"})[-1]
    assert reply == {"code": 1, "message": "Got unexpected command: brew_coffee_request"}


# --- whole conversations ---------------------------------------------------------------------------

CONVERSATIONS = {
    "scalars": """
        a = client.put(1)
        client.get_meta(a)
        client.get(a)
        b = client.put('text')
        client.get_meta(b)
        client.exists(a)
        client.delete(a)
        client.exists(a)
        client.get_meta(a)
        client.get(a)
        client.delete(a)
    """,
    "arrays": """
        a = client.put(np.arange(6).reshape(2, 3))
        client.get_meta(a)
        client.get(a)
        client.get_meta(a).get_member('buffer_')
        client.status.memory_usage
        e = client.put(np.zeros((0, 2)))
        client.get_meta(e)
        client.get(e)
        client.delete(a)
        client.status.memory_usage
    """,
    "frames": """
        a = client.put(pd.DataFrame({'x': [1, 2], 'y': [0.5, 1.5]}))
        client.get_meta(a)
        client.get(a)
        client.status.memory_usage
    """,
    "tables": """
        a = client.put(pa.table({'x': [1, 2], 'y': ['a', 'b']}))
        client.get_meta(a)
        client.get(a)
    """,
    "persist and names": """
        a = client.put((1, 'two'))
        client.put_name(a, 'n')
        client.persist(a)
        client.get_meta(a)
        client.put_name(a, 'n')
        client.get_name('n')
        client.list_names('*')
        client.list_names('n')
        client.get_name('m')
        client.delete(a)
        client.get_name('n')
        client.drop_name('n')
        client.drop_name('n')
        client.get_name('n')
    """,
    "labels and copies": """
        a = client.put(np.arange(4))
        client.label(a, 'k', 'v')
        client.get_meta(a).labels
        b = client.shallow_copy(a)
        client.get_meta(b)
        c = client.shallow_copy(a, {'extra': 5})
        client.get_meta(c)
        client.shallow_copy(vineyard.ObjectID('o00000000deadbeef'))
        client.label(vineyard.ObjectID('o00000000deadbeef'), 'k', 'v')
        client.persist(vineyard.ObjectID('o00000000deadbeef'))
    """,
    "blobs": """
        w = client.create_blob(100)
        client.status.memory_usage
        w.copy(0, b'x' * 100)
        w.shrink(client.ipc_client, 200)
        w.shrink(client.ipc_client, 60)
        o = w.seal(client)
        bytes(client.get_blob(o.id))
        client.get_meta(o.id)
        client.get_blob(vineyard.ObjectID('o80000000deadbeef'))
        client.delete(o.id)
        client.exists(o.id)
        client.get_blob(o.id)
    """,
    "too much": """
        client.create_blob(1 << 40)
        a = client.put(np.zeros(60 << 20, dtype='u1'))
        client.create_blob(8 << 20)
        client.status.memory_usage
        client.delete(a)
        client.status.memory_usage
    """,
    "deletion": """
        a = client.put([np.arange(3), 'x'])
        m = client.get_meta(a)
        i = m.get_member('__elements_-0').id
        client.delete(i)
        client.exists(i)
        client.delete(a, deep=False)
        client.exists(i)
        client.status.memory_usage
        client.delete(i)
        client.status.memory_usage
        b = client.put([np.arange(3), 'x'])
        client.delete(b)
        client.status.memory_usage
        client.list_metadatas('*', limit=10)
    """,
    "listing": """
        a = client.put(7)
        b = client.put('s')
        sorted(str(m.typename) for m in client.list_metadatas('*', limit=10))
        sorted(str(m.typename) for m in client.list_metadatas('vineyard::Scalar<.*', regex=True, limit=10))
        client.list_metadatas('none*')
        client.clear()
        client.list_metadatas('*')
    """,
    "status": """
        client.status.deployment
        client.status.instance_id
        client.status.memory_limit
        client.status.memory_usage
        client.status.deferred_requests
        client.instance_id
        sorted(client.meta)
        sorted(client.meta[client.instance_id])
        client.version.rsplit('.', 1)[0]
    """,
}


def converse(client, script):
    """Runs a script line by line; what each line answered, without what differs from run to run."""
    scope = {"client": client, "np": np, "pd": pd, "pa": pa, "vineyard": vineyard}
    known, answers = {}, []

    def anonymous(match):
        return known.setdefault(match[0], f"<id {len(known)}>")

    for line in filter(None, map(str.strip, script.splitlines())):
        name, _, expression = line.partition(" = ")
        if not name.isidentifier():
            name, expression = None, line
        try:
            value = eval(expression, scope)
            if name:
                scope[name] = value
            text = repr(value)
        except Exception as error:  # the client's exceptions are answers here
            text = f"{type(error).__name__}: {error}"
        text = re.sub(r"IPC error at \S+:\d+: ", "", text)
        text = re.sub(r'"__timestamp": \d+', '"__timestamp": <time>', text)
        text = re.sub(r'"signature": \d+', '"signature": <signature>', text)
        text = re.sub(r"0x[0-9a-f]+", "<address>", text)
        answers.append((line, re.sub(r"o[0-9a-f]{16}", anonymous, text)))
    return answers


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_client_sees_what_vineyardd_would_show(scratch, name):
    answers = {}
    for kind in PROGRAMS:
        server = Server(kind, scratch)
        client = server.connect()
        answers[kind] = converse(client, CONVERSATIONS[name])
        client.close()
        server.stop()
    assert answers["vinelet"] == answers["vineyardd"]
