"""What a node agent costs: latency of publish and unpublish, start, memory, and reach of a new socket.

Calls are made as kubelet makes them, each on a connection of its own: connect, HTTP/2 preface,
request, answer, close. The client is a few system calls and prepared bytes (`Call`), so that what is
measured is the server; `mount` and `umount` run as processes in the same loop on the same machine.
"""

import os
import re
import socket
import statistics
import struct
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))

import harness  # noqa: E402
from harness import Task, eventually, mounts  # noqa: E402
from kubelet import Kubelet, csi  # noqa: E402

SAMPLES = 200
LEVELS = (0, 100, 1000, 5000)

# --- a gRPC call in prepared bytes -------------------------------------------------------------------

DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4


def _frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _header(name, value):
    """HPACK, RFC 7541 section 6.2.2: literal without indexing, new name, no Huffman."""
    assert len(name) < 127 and len(value) < 127
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Call:
    """One unary call, ready to be sent."""

    def __init__(self, method, request):
        body = request.SerializeToString()
        headers = b"".join(_header(*h) for h in (
            (":method", "POST"), (":scheme", "http"), (":path", f"/csi.v1.Node/{method}"),
            (":authority", "localhost"), ("content-type", "application/grpc"), ("te", "trailers")))
        self.bytes = (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, b"")
            + _frame(HEADERS, END_HEADERS, 1, headers)
            + _frame(DATA, END_STREAM, 1, b"\0" + struct.pack(">I", len(body)) + body))

    def seconds(self, path):
        """Makes the call and returns how long it took; an error raises."""
        started = time.perf_counter()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(self.bytes)
            buffer, has_data = b"", False
            while True:
                while len(buffer) < 9 or len(buffer) < 9 + int.from_bytes(buffer[:3], "big"):
                    chunk = connection.recv(65536)
                    if not chunk:
                        raise ConnectionError("closed before the answer")
                    buffer += chunk
                size, kind, flags = int.from_bytes(buffer[:3], "big"), buffer[3], buffer[4]
                stream = int.from_bytes(buffer[5:9], "big")
                buffer = buffer[9 + size:]
                has_data |= kind == DATA
                if kind in (RST_STREAM, GOAWAY) or (stream == 1 and flags & END_STREAM and kind in (DATA, HEADERS)):
                    break
        took = time.perf_counter() - started
        # An answer has a message, if an empty one; an error has trailers alone.
        if not has_data:
            raise RuntimeError("the call ended with an error")
        return took


def process_seconds(*words):
    """How long a process takes from fork to its end."""
    started = time.perf_counter()
    pid = os.posix_spawn(words[0], words, {})
    _, status = os.waitpid(pid, 0)
    took = time.perf_counter() - started
    assert status == 0, words
    return took


# --- tables ----------------------------------------------------------------------------------------


def milliseconds(seconds):
    ordered = sorted(seconds)
    return statistics.median(ordered) * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3


def row(name, *cells):
    print(f"{name:<34}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


def cell(seconds):
    return "{:.2f} / {:.2f}".format(*milliseconds(seconds))


# --- measurements ------------------------------------------------------------------------------------


def publish_and_unpublish(node, runtime):
    kubelet = Kubelet(node)
    mount, umount = (next(p for p in (f"/bin/{n}", f"/usr/bin/{n}") if os.path.exists(p)) for n in ("mount", "umount"))
    path = str(node.csi_socket)
    present = []

    def requests():
        publish = kubelet.pv_request(runtime, pod_uid=str(uuid.uuid4()), volume_id=f"v-{uuid.uuid4()}")
        unpublish = csi.NodeUnpublishVolumeRequest(volume_id=publish.volume_id, target_path=publish.target_path)
        return publish.target_path, Call("NodePublishVolume", publish), Call("NodeUnpublishVolume", unpublish)

    row("ms, p50 / p99", "publish", "mount --bind", "ratio", "unpublish", "umount", "ratio")
    for level in LEVELS:
        while len(present) < level:
            target, publish, _ = requests()
            publish.seconds(path)
            present.append(target)
        took = {"publish": [], "unpublish": [], "mount": [], "umount": []}
        for _ in range(SAMPLES if level < 5000 else SAMPLES // 2):
            target, publish, unpublish = requests()
            took["publish"].append(publish.seconds(path))
            assert level or len(harness.mounts_at(target)) == 1
            took["unpublish"].append(unpublish.seconds(path))
            os.mkdir(target)
            took["mount"].append(process_seconds(mount, "--bind", "-o", "ro", str(runtime.directory), target))
            took["umount"].append(process_seconds(umount, target))
            os.rmdir(target)
        ratio = {a: f"{statistics.median(took[b]) / statistics.median(took[a]):.1f}x" for a, b in
                 (("publish", "mount"), ("unpublish", "umount"))}
        row(f"{level} mounts present", cell(took["publish"]), cell(took["mount"]), ratio["publish"],
            cell(took["unpublish"]), cell(took["umount"]), ratio["unpublish"])
    started = time.monotonic()
    for target in present:
        volume_id = Path(target).parent.name
        Call("NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=target)).seconds(path)
    print(f"(unpublished {len(present)} in {time.monotonic() - started:.1f} s)")
    assert not [m for m in mounts(node.kubelet)]


def start_to_ready(node, runtime, rounds=10):
    cold = []
    for _ in range(rounds):
        node.stop()
        started = time.perf_counter()
        node.start(wait=False)
        while not (runtime.marks() and node.csi_socket.exists()):
            time.sleep(0.0005)
            assert time.perf_counter() - started < 20
        cold.append(time.perf_counter() - started)
    row("agent start to fluid's mark, ms", cell(cold))


def memory(node):
    total = {"Rss": 0, "Pss": 0}
    for pid, words in node.processes().items():
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        sizes = {key: int(re.search(rf"^{key}:\s+(\d+) kB", rollup, re.M)[1]) / 1024 for key in total}
        row(f"idle memory, {words[1]}, MiB", *(f"{key} {value:.1f}" for key, value in sizes.items()))
        total = {key: total[key] + sizes[key] for key in total}
    row("idle memory, whole tree, MiB", *(f"{key} {value:.1f}" for key, value in total.items()))


REACH = """
import socket, time
path = '/var/run/vineyard/vineyard.sock'

def connects():
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
            return True
        except OSError:
            return False

while connects():
    pass
while not connects():
    pass
result = time.monotonic()
"""


def reach(node, runtime, kubelet, rounds=10):
    """A new agent makes a new socket: from its directory entry to a connect in a pod of before."""
    published = kubelet.publish_pv(runtime)
    took = []
    with Task(published.target, scratch=node.root) as pod:
        pod.run("result = 0")
        for _ in range(rounds):
            pod.send(REACH)
            node.stop()
            old = entry(runtime)
            node.start(wait=False)
            while entry(runtime) in (None, old):
                pass
            made = time.monotonic()
            took.append(max(0.0, pod.receive() - made))
            node.wait_ready()
    kubelet.unpublish(published)
    row("new socket to connect in a pod, ms", cell(took))


def entry(runtime):
    try:
        return os.stat(runtime.socket).st_ino
    except OSError:
        return None


def shard_recovery(node, runtime, rounds=10):
    took = []
    for _ in range(rounds):
        # A new agent each time: the second crash in a row waits for its back-off.
        node.stop()
        node.start()
        pid = eventually(lambda: node.shard_pid(runtime))
        started = time.perf_counter()
        os.kill(pid, 9)
        while True:
            try:
                # The first one may still reach the dying shard.
                harness.vineyard_call(str(runtime.socket))
                if node.shard_pid(runtime) not in (None, pid):
                    break
            except OSError:
                pass
        took.append(time.perf_counter() - started)
    row("shard SIGKILL to answer, ms", cell(took))


def main():
    node = harness.Node(Path(os.environ["VINELET_BASE"]) / "b")
    runtime = node.add_runtime()
    flags = {"log": "warn"}
    original = node.start
    node.start = lambda wait=True: original(wait=wait, **flags)
    try:
        node.start()
        time.sleep(1)
        memory(node)
        publish_and_unpublish(node, runtime)
        start_to_ready(node, runtime)
        node.wait_ready()
        reach(node, runtime, Kubelet(node))
        shard_recovery(node, runtime)
        node.stop()
    finally:
        node.close()


main()
