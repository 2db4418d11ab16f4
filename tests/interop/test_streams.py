"""Streams of the official Python client: against our shard and against the real vineyardd."""

import copy
import multiprocessing
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import vineyard
from vineyard._C import ObjectNotExistsException, StreamFailedException, StreamOpenedException
from vineyard.core import default_builder_context, default_resolver_context
from vineyard.data import register_builtin_types
from vineyard.io.byte import ByteStream
from vineyard.io.dataframe import DataframeStream
from vineyard.io.recordbatch import RecordBatchStream

from harness import eventually
from servers import PROGRAMS, Server

register_builtin_types(default_builder_context, default_resolver_context)

KIB = 1 << 10
fork = multiprocessing.get_context("fork")


@pytest.fixture(params=sorted(PROGRAMS))
def server(request, scratch):
    server = Server(request.param, scratch)
    yield server
    server.stop()


@pytest.fixture
def ours(scratch):
    """Where vineyardd is known to do worse, only our own shard is held to the promise."""
    server = Server("vinelet", scratch, size="1Mi")
    yield server
    server.stop()


def in_background(work):
    """Runs `work` in a process, since the client waits with the interpreter's lock held; what it
    returns or raises, `result()` returns or raises."""
    ours, theirs = fork.Pipe()

    def run():
        try:
            theirs.send((work(), None))
        except BaseException as error:  # raised again below
            theirs.send((None, type(error)))

    process = fork.Process(target=run, daemon=True)
    process.start()

    def result():
        if not ours.poll(30):
            process.kill()
            raise AssertionError("it waits for ever")
        value, error = ours.recv()
        process.join(10)
        if error:
            raise error()
        return value

    return result


def reading(server, stream):
    """All chunks of a stream, read in a process of its own."""

    def read():
        client = server.connect()
        return read_all(client.get(stream.id).open_reader(client))

    return in_background(read)


def read_all(reader):
    chunks = []
    while True:
        try:
            chunk = reader.next()
        except StopIteration:
            return chunks
        # Memory of a chunk is the reader's until it asks for the next one.
        chunks.append(bytes(chunk) if isinstance(chunk, memoryview) else copy.deepcopy(chunk))


def test_bytes_travel_through_a_stream(server):
    client = server.connect()
    stream = ByteStream.new(client, {"kind": "test"})
    assert client.get(stream.id).params == {"kind": "test"}
    got = reading(server, stream)
    sent = [bytes([n]) * (n * 1000 + 1) for n in range(20)]
    writer = stream.open_writer(client)
    for data in sent:
        chunk = writer.next(len(data))
        assert len(chunk) == len(data) and not chunk.readonly
        vineyard.memory_copy(chunk, data)
    writer.finish()
    assert got() == sent
    assert client.status.memory_usage == 0


def test_written_bytes_are_cut_into_chunks_and_arrive_whole(server):
    client, reader = server.connect(), server.connect()
    stream = ByteStream.new(client)
    writer = stream.open_writer(client)
    writer.buffer_size_limit = 10 * KIB
    data = bytes(range(256)) * 1000
    for start in range(0, len(data), 999):
        writer.write(data[start:start + 999])
    writer.finish()
    chunks = read_all(reader.get(stream.id).open_reader(reader))
    assert len(chunks) > 10 and b"".join(chunks) == data


def test_frames_travel_through_a_record_batch_stream(server):
    client = server.connect()
    stream = RecordBatchStream.new(client)
    reader = server.connect()
    frames = [pd.DataFrame({"a": np.arange(n), "b": np.random.random(n)}) for n in (1, 10, 1000)]
    writer = stream.open_writer(client)
    for frame in frames:
        writer.append(client.put(frame))
    writer.finish()
    source = reader.get(stream.id).open_reader(reader)
    for sent in frames:
        pd.testing.assert_frame_equal(sent, source.next())
    with pytest.raises(StopIteration):
        source.next()


def test_tables_travel_through_a_frame_stream(server):
    client, reader = server.connect(), server.connect()
    stream = DataframeStream.new(client)
    batches = [pa.RecordBatch.from_pydict({"a": list(range(n)), "b": ["x" * n] * n}) for n in (1, 10, 100)]
    table = pa.Table.from_batches(batches)
    writer = stream.open_writer(client)
    writer.write_table(table)
    writer.finish()
    assert reader.get(stream.id).open_reader(reader).read_table() == table


def test_objects_of_all_kinds_travel_through_a_stream(server):
    client, reader = server.connect(), server.connect()
    stream = RecordBatchStream.new(client)
    values = [1, "two", 3.5, (1, "two", (3,)), np.arange(12).reshape(3, 4)]
    writer = stream.open_writer(client)
    for value in values:
        writer.append(client.put(value))
    writer.finish()
    found = read_all(reader.get(stream.id).open_reader(reader))
    assert found[:4] == values[:4]
    assert np.array_equal(found[4], values[4])


def test_a_failed_stream_fails_its_reader(server):
    client = server.connect()
    stream = ByteStream.new(client)
    waiting = reading(server, stream)
    stream.open_writer(client).fail()
    with pytest.raises(StreamFailedException):
        waiting()


def test_a_stream_is_opened_once_each_way(server):
    client = server.connect()
    stream = ByteStream.new(client)
    for mode in "rw":
        client.open_stream(stream.id, mode)
        with pytest.raises(StreamOpenedException):
            client.open_stream(stream.id, mode)


def test_a_dropped_stream_is_no_more(server):
    client = server.connect()
    stream = ByteStream.new(client)
    writer = stream.open_writer(client)
    vineyard.memory_copy(writer.next(KIB), b"x" * KIB)
    writer.next(KIB)
    stream.drop(client)
    with pytest.raises(ObjectNotExistsException):
        writer.next(KIB)
    with pytest.raises(ObjectNotExistsException):
        client.next_buffer_chunk(stream.id)


def test_a_dropped_stream_leaves_no_memory_taken(ours):
    client = ours.connect()
    stream = ByteStream.new(client)
    writer = stream.open_writer(client)
    for _ in range(3):
        writer.next(KIB)
    assert client.status.memory_usage == 3 * KIB
    stream.drop(client)
    assert client.status.memory_usage == 0


def test_a_writer_waits_for_its_reader_when_memory_is_nearly_full(ours):
    client = ours.connect()
    stream = ByteStream.new(client)
    # Four times as much as there is memory.
    got = reading(ours, stream)
    writer = stream.open_writer(client)
    for n in range(40):
        vineyard.memory_copy(writer.next(100 * KIB), bytes([n]) * 100)
    writer.finish()
    assert [chunk[0] for chunk in got()] == list(range(40))
    assert client.status.memory_usage == 0


READ_AND_DIE = """
import os, sys, vineyard
client = vineyard.connect(sys.argv[1])
stream = vineyard.ObjectID(sys.argv[2])
client.open_stream(stream, "r")
client.next_buffer_chunk(stream)
print("read", flush=True)
client.next_buffer_chunk(stream)
"""


def test_a_reader_that_is_killed_takes_its_stream_and_no_memory_with_it(ours):
    client = ours.connect()
    stream = ByteStream.new(client)
    writer = stream.open_writer(client)
    for _ in range(2):
        writer.next(100 * KIB)
    reader = subprocess.Popen([sys.executable, "-c", READ_AND_DIE, str(ours.socket), repr(stream.id)],
                              stdout=subprocess.PIPE)
    assert reader.stdout.readline() == b"read\n"
    reader.kill()
    reader.wait()
    eventually(lambda: client.status.memory_usage == 0, what="its chunks are given back")
    with pytest.raises(ObjectNotExistsException):
        writer.next(KIB)
