"""Spilling, as the official Python client meets it.

Its 0.24.2 never says that it is done with a blob: whatever a connection has put or got it holds,
and has mapped, until it ends. The real vineyardd therefore refuses the ninth blob of 8 MiB in
64 MiB, disk or not (and would serve foreign bytes if it did not), so this is about ours alone.
"""

import random
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
import vineyard
from vineyard._C import IOErrorException, NotEnoughMemoryException

from harness import eventually, vineyard_call
from servers import Server

MIB = 1 << 20
COUNT = 20


@pytest.fixture
def disk(scratch):
    return scratch / "disk"


@pytest.fixture
def start(scratch, disk):
    servers = []

    def start(*flags, path=None):
        server = Server("vinelet", scratch, flags=("--spill_path", str(path or disk), *flags))
        servers.append(server)
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


def put(client, number):
    return client.put(np.full(MIB, number, dtype=np.int64))  # 8 MiB


def is_right(client, object_id, number):
    value = client.get(object_id)
    return value.shape == (MIB,) and bool((value == number).all())


def usage(client):
    return client.status.memory_usage


def files(disk):
    return sorted(path.name for path in disk.iterdir())


def ask(server, kind, blob):
    """What the Python client has no method for."""
    return vineyard_call(server.socket, {"type": f"{kind}_request", "id": int(blob)})[-1][kind]


def read_all(client, ids, seed, rounds):
    chance = random.Random(seed)
    order = list(range(len(ids)))
    for _ in range(rounds):
        chance.shuffle(order)
        for number in order:
            assert is_right(client, ids[number], number), number


def test_one_client_puts_more_than_memory_and_reads_it_in_any_order(start, disk):
    client = start().connect()
    ids = [put(client, number) for number in range(COUNT)]
    assert usage(client) <= 64 * MIB
    assert len(files(disk)) >= COUNT - 8
    for number in range(COUNT):
        assert is_right(client, ids[number], number)
    for number in reversed(range(COUNT)):
        assert is_right(client, ids[number], number)
    read_all(client, ids, seed=1, rounds=5)
    assert usage(client) <= 64 * MIB
    client.delete(ids)
    assert (usage(client), files(disk)) == (0, [])
    # And memory is free for others: eight fit without the disk.
    ids = [put(client, number) for number in range(8)]
    assert (usage(client), files(disk)) == (64 * MIB, [])


def test_what_a_client_has_got_stays_what_it_is(start):
    client = start().connect()
    kept = []
    for number in range(COUNT):
        object_id = put(client, number)
        kept.append(client.get(object_id))
        assert all((value == index).all() for index, value in enumerate(kept)), number


def test_a_blob_that_its_writer_still_reads_stays_what_it_is(start):
    client = start().connect()
    kept = []
    for number in range(COUNT):
        builder = client.create_blob(8 * MIB)
        np.frombuffer(builder, dtype=np.int64)[:] = number
        kept.append(builder.seal(client))
    for number, blob in enumerate(kept):
        assert (np.frombuffer(blob, dtype=np.int64) == number).all(), number


def test_several_clients_at_once_put_and_read_in_any_order(start, disk):
    server = start()
    owner = server.connect()
    wrong = []

    def work(seed):
        try:
            client = server.connect()
            ids = [put(client, number) for number in range(COUNT)]
            read_all(client, ids, seed, rounds=2)
            client.delete(ids)
            client.close()
        except Exception as error:  # noqa: BLE001: a thread's failure is the test's
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert (usage(owner), files(disk)) == (0, [])


def test_what_one_connection_left_others_read_and_memory_is_used_again(start, disk):
    server = start()
    ids = []
    for number in range(COUNT):
        client = server.connect()
        ids.append(put(client, number))
        client.close()
    watcher = server.connect()
    assert usage(watcher) < 64 * MIB
    for turn in range(3):
        for number in range(COUNT):
            client = server.connect()
            assert is_right(client, ids[number], number)
            client.close()
    # What was read last has come back into memory.
    newest = watcher.get_meta(ids[-1])["buffer_"].id
    assert not ask(server, "is_spilled", newest)
    assert usage(watcher) <= 64 * MIB
    watcher.delete(ids)
    assert (usage(watcher), files(disk)) == (0, [])


def test_spilled_blobs_travel_over_tcp(start):
    server = start()
    client = server.connect()
    ids = [put(client, number) for number in range(COUNT)]
    remote = vineyard.connect("127.0.0.1", server.port)
    for number in (0, 19, 7, 19, 12):
        assert is_right(remote, ids[number], number)
    there = remote.put(np.full(MIB, 99, dtype=np.int64))
    assert is_right(client, there, 99)


def test_evict_load_and_unpin_are_answered(start, disk):
    server = start()
    writer = server.connect()
    object_id = put(writer, 5)
    writer.close()
    del writer  # closing alone leaves the connection open
    client = server.connect()
    eventually(lambda: client.status.ipc_connections == 2,
               what="the writer is gone")
    blob = client.get_meta(object_id)["buffer_"].id
    before = usage(client)
    client.evict([object_id])
    assert ask(server, "is_spilled", blob) and not ask(server, "is_in_use", blob)
    assert (usage(client), len(files(disk))) == (before - 8 * MIB, 1)
    client.load([object_id], pin=True)
    assert not ask(server, "is_spilled", blob) and ask(server, "is_in_use", blob)
    assert (usage(client), files(disk)) == (before, [])
    client.evict([object_id])
    assert not ask(server, "is_spilled", blob)
    client.unpin([object_id])
    client.evict([blob])
    assert ask(server, "is_spilled", blob)
    assert is_right(client, object_id, 5)


def test_only_our_files_are_touched(start, disk):
    disk.mkdir()
    own = {"notes.txt": b"mine", "o8000000000000001.spill": b"mine too", "16753566656474644514": b"8"}
    for name, content in own.items():
        (disk / name).write_bytes(content)
    server = start()
    client = server.connect()
    ids = [put(client, number) for number in range(COUNT)]
    assert len(files(disk)) > len(own)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(10)
    assert len(files(disk)) > len(own), "what a kill leaves"

    server = start()
    assert files(disk) == sorted(own), "is removed at the next start"
    client = server.connect()
    ids = [put(client, number) for number in range(COUNT)]
    assert all(is_right(client, object_id, number) for number, object_id in enumerate(ids))
    server.stop()
    assert {name: (disk / name).read_bytes() for name in files(disk)} == own


def test_a_full_disk_is_an_error_and_loses_nothing(start, scratch):
    small = scratch / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=36m", "small", str(small)], check=True)
    try:
        server = start(path=small)
        client = server.connect()
        # Eight in memory, four on disk: a fifth has no room for its header any more.
        ids = []
        with pytest.raises(NotEnoughMemoryException, match="no space"):
            for number in range(COUNT):
                ids.append(client.create_blob(8 * MIB))
        assert len(ids) == 12
        for number, builder in enumerate(ids):
            np.frombuffer(builder, dtype=np.int64)[:] = number
        blobs = [builder.seal(client) for builder in ids]
        other = server.connect()
        for number, blob in enumerate(blobs):
            got = other.get_object(blob.id)
            assert (np.frombuffer(got, dtype=np.int64) == number).all()
        assert shutil.disk_usage(small).free < 8 * MIB
        other.delete([blob.id for blob in blobs])
        eventually(lambda: shutil.disk_usage(small).used < MIB, what="deleting gives the disk back")
        assert usage(other) == 0
        put(other, 1)
        server.stop()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_a_quota_is_kept(start, disk):
    client = start("--spill_quota", "20Mi").connect()
    for number in range(10):
        client.create_blob(8 * MIB)
    with pytest.raises(NotEnoughMemoryException, match="exceed the quota of 20971520"):
        client.create_blob(8 * MIB)
    assert sum(path.stat().st_size for path in disk.iterdir()) <= 20 * MIB
    client.create_blob(3 * MIB)


def test_a_damaged_file_is_an_error_and_others_are_read(start, disk):
    server = start()
    client = server.connect()
    ids = [put(client, number) for number in range(12)]
    other = server.connect()
    (disk / files(disk)[0]).open("r+b").write(b"something else")
    failures = 0
    for number, object_id in enumerate(ids):
        try:
            assert is_right(other, object_id, number)
        except IOErrorException as error:
            assert "is damaged" in str(error)
            failures += 1
    assert failures == 1


def test_a_directory_that_cannot_be_used_is_named_at_the_start(scratch):
    (scratch / "file").write_text("mine")
    with pytest.raises(AssertionError, match="using .*/file for spilled blobs"):
        Server("vinelet", scratch, flags=("--spill_path", str(scratch / "file")))
