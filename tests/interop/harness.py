"""One node under test: its directories, its agent, and every way to look at it from outside.

All of it runs inside `tests/interop/sandbox`, so the mount table and the process list read here
hold nothing but what the sandbox and the tests made.
"""

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / "tests" / ".cache"
VINELET = os.environ.get("VINELET_BINARY", str(REPOSITORY / "target" / "debug" / "vinelet"))
VENV_PYTHON = CACHE / "venv" / "bin" / "python"
CSI_SANITY = CACHE / "bin" / "csi-sanity"
DRIVER = "vinelet.csi.v6d.io"
MARK_TYPE = "fuse.vineyard-fuse"

#: Seconds in which an agent on a busy machine has to be up, or down again.
PATIENCE = 15.0


# --- waiting -----------------------------------------------------------------------------------


def eventually(check, within=PATIENCE, what=None):
    """Returns the first true value of `check()`; fails after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            name = what or getattr(check, "__doc__", None) or "condition"
            raise AssertionError(f"not within {within} s: {name}; last value {value!r}")
        time.sleep(0.005)


# --- the kernel's tables -----------------------------------------------------------------------


class Mount:
    """One line of mountinfo(5)."""

    def __init__(self, line):
        left, right = line.rstrip("\n").split(" - ", 1)
        fields = left.split(" ")
        self.line = line
        self.id = int(fields[0])
        self.parent = int(fields[1])
        self.device = fields[2]
        self.root = _unescape(fields[3])
        self.point = _unescape(fields[4])
        self.options = fields[5].split(",")
        self.tags = fields[6:]
        self.fstype, self.source, self.super_options = (right.split(" ") + ["", ""])[:3]

    @property
    def read_only(self):
        return "ro" in self.options

    def __repr__(self):
        return self.line


def _unescape(text):
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mountinfo(pid="self"):
    return Path(f"/proc/{pid}/mountinfo").read_text()


def mounts(under=None, pid="self"):
    """The mount table, or what of it lies at or below the directory `under`."""
    table = [Mount(line) for line in mountinfo(pid).splitlines()]
    if under is None:
        return table
    prefix = str(under)
    return [m for m in table if m.point == prefix or m.point.startswith(prefix + "/")]


def mounts_at(path, pid="self"):
    return [m for m in mounts(pid=pid) if m.point == str(path)]


def processes():
    """pid -> (parent pid, state, command line) of everything in this process namespace."""
    table = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{entry}/stat").read_text()
            state, parent = status[status.rindex(")") + 2 :].split(" ")[:2]
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")[:-1]
            table[int(entry)] = (int(parent), state, [w.decode(errors="replace") for w in words])
    return table


def descendants(pid):
    """The processes below `pid`, pid -> command line; the dead ones not."""
    table = processes()
    found, wave = {}, {pid}
    while wave:
        wave = {p for p, (parent, state, _) in table.items() if parent in wave and state != "Z"}
        found.update({p: table[p][2] for p in wave})
    return found


def descriptors(pid):
    """What the descriptors of a process point at, sorted."""
    links = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return sorted(links)


def bound_sockets(under):
    """UNIX sockets that some process has bound below a directory."""
    paths = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return sorted({p for p in paths if p.startswith(str(under))})


_ports = iter(range(20000 + os.getpid() % 5000, 32000))


def free_port():
    """A TCP port below the ephemeral ones that nobody listens on."""
    for port in _ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free TCP port")


# --- vineyard's wire, as little of it as a probe needs ---------------------------------------------


def vineyard_call(path, *messages, timeout=5.0):
    """Connects to an IPC socket, registers, sends `messages`, and returns their replies."""
    with socket.socket(socket.AF_UNIX) as conversation:
        conversation.settimeout(timeout)
        # A socket's name is at most 107 bytes; through /proc any path becomes short.
        directory = os.open(os.path.dirname(path), os.O_PATH)
        try:
            conversation.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        finally:
            os.close(directory)
        register = {"type": "register_request", "version": "0.24.2", "store_type": 1}
        return [_exchange(conversation, message) for message in (register, *messages)]


def _exchange(conversation, message):
    body = json.dumps(message).encode()
    conversation.sendall(struct.pack("<Q", len(body)) + body)
    (size,) = struct.unpack("<Q", _read_exactly(conversation, 8))
    return json.loads(_read_exactly(conversation, size))


def _read_exactly(conversation, size):
    data = b""
    while len(data) < size:
        chunk = conversation.recv(size - len(data))
        if not chunk:
            raise ConnectionError(f"the server closed the connection after {len(data)} bytes of {size}")
        data += chunk
    return data


def answers(path, timeout=5.0):
    """Whether a vineyard server answers behind `path`."""
    try:
        return vineyard_call(str(path), timeout=timeout)[0].get("type") == "register_reply"
    except OSError:
        return False


def memory_usage(path):
    """Bytes in use according to the server behind `path`."""
    reply = vineyard_call(str(path), {"type": "instance_status_request"})[-1]
    return int(reply["meta"]["memory_usage"])


# --- a runtime, and the node that carries it -----------------------------------------------------


class Runtime:
    """The paths of one runtime on a node."""

    def __init__(self, node, namespace, name):
        self.namespace, self.name = namespace, name
        self.file = node.runtimes / f"{namespace}-{name}.yaml"
        self.directory = node.runtime_root / namespace / name
        self.worker_socket = self.directory / "vineyard-worker.sock"
        self.socket = self.directory / "vineyard.sock"
        self.config = self.directory / "vineyard-config.yaml"
        self.endpoint = self.directory / "rpc-conf" / "VINEYARD_RPC_ENDPOINT"
        self.fluid_path = self.directory / "vineyard-fuse"
        self.mark = self.fluid_path / "dummy-path"

    def __str__(self):
        return f"{self.namespace}/{self.name}"

    def marks(self):
        """The mounts that make fluid believe in this runtime, by type."""
        return [m for m in mounts_at(self.mark) if m.fstype == MARK_TYPE]

    def is_ready(self):
        return bool(self.marks()) and is_served(self.mark) and answers(self.socket)


def is_served(mount):
    """Whether somebody serves what is mounted there: a dead FUSE mount answers ENOTCONN."""
    try:
        os.stat(mount)
    except OSError:
        return False
    return True


def runtime_yaml(namespace, name, quota="64Mi", port=None, extra=""):
    """A VineyardRuntime with one memory tier."""
    port_line = f"\n  worker: {{ports: {{rpc: {port}}}}}" if port else ""
    return (
        "apiVersion: data.fluid.io/v1alpha1\n"
        "kind: VineyardRuntime\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec:{port_line}\n"
        "  tieredstore:\n"
        "    levels:\n"
        "    - mediumtype: MEM\n"
        f"      quota: {quota}\n"
        f"{extra}"
    )


class Node:
    """A machine's worth of directories, and the agent that serves them."""

    def __init__(self, root):
        self.root = Path(root)
        self.runtimes = self.root / "etc"
        self.runtime_root = self.root / "mnt" / "vineyard"
        self.shm = self.root / "shm"
        self.state = self.root / "run"
        self.kubelet = self.root / "kubelet"
        self.registry = self.kubelet / "plugins_registry"
        self.csi_socket = self.kubelet / "plugins" / DRIVER / "csi.sock"
        self.registration_socket = self.registry / f"{DRIVER}-reg.sock"
        self.http_port = free_port()
        self.log = self.root / "agent.log"
        self.agent = None
        for directory in (self.runtimes, self.runtime_root, self.shm, self.state, self.registry):
            directory.mkdir(parents=True)
        (self.kubelet / "pods").mkdir()
        (self.kubelet / "plugins").mkdir()

    # runtimes

    def runtime(self, name="vineyard", namespace="default"):
        return Runtime(self, namespace, name)

    def add_runtime(self, name="vineyard", namespace="default", quota="64Mi", port=None):
        runtime = self.runtime(name, namespace)
        self.write(runtime.file, runtime_yaml(namespace, name, quota, port or free_port()))
        return runtime

    def write(self, path, text):
        """Writes a runtime file whole or not at all, as a ConfigMap volume does."""
        temporary = path.with_name("." + path.name)
        temporary.write_text(text)
        temporary.rename(path)

    # the agent

    def arguments(self, **flags):
        values = {
            "runtimes-dir": self.runtimes,
            "runtime-root": self.runtime_root,
            "shm-dir": self.shm,
            "state-dir": self.state,
            "kubelet-dir": self.kubelet,
            "node-id": "node-1",
            "http": f"127.0.0.1:{self.http_port}",
            "rpc-host": "127.0.0.1",
            "log": "debug",
            **{name.replace("_", "-"): value for name, value in flags.items()},
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    def start(self, wait=True, **flags):
        """Starts the agent; with `wait`, returns when every runtime file it has is served."""
        assert self.agent is None or self.agent.poll() is not None, "an agent is running already"
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(
                [VINELET, "agent", *self.arguments(**flags)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, within=PATIENCE):
        names = [file.stem.split("-", 1) for file in sorted(self.runtimes.glob("*.yaml"))]
        runtimes = [self.runtime(name, namespace) for namespace, name in names]

        def up():
            assert self.agent.poll() is None, f"the agent ended: {self.log_text()[-3000:]}"
            return all(r.is_ready() for r in runtimes) and self.csi_socket.exists()

        try:
            eventually(up, within, f"runtimes {[str(r) for r in runtimes]} and the CSI socket")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_text()[-3000:]}") from None

    def stop(self, within=10.0):
        """SIGTERM, as kubelet stops a pod; returns the exit status."""
        self.agent.send_signal(signal.SIGTERM)
        try:
            return self.agent.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end {within} s after SIGTERM: {self.log_text()[-3000:]}") from None

    def processes(self):
        """The whole tree, pid -> command line."""
        tree = descendants(self.agent.pid)
        return {self.agent.pid: [VINELET, "agent"], **tree}

    def node_pid(self):
        pids = [p for p, words in descendants(self.agent.pid).items() if words[1:2] == ["node"]]
        return pids[0] if len(pids) == 1 else None

    def shard_pid(self, runtime):
        pids = [
            pid for pid, words in descendants(self.agent.pid).items()
            if words[1:2] == ["shard"] and any(str(runtime.directory) + "/" in w or w == str(runtime) for w in words)
        ]
        return pids[0] if len(pids) == 1 else None

    def kill_tree(self):
        """SIGKILL for every process of the agent, as when the container is killed."""
        tree = self.processes()
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait(PATIENCE)
        eventually(lambda: all(not is_alive(pid) for pid in tree), what="the tree is dead")

    def http(self, path, timeout=5.0):
        """(status, body) of a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=timeout)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def log_text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_log(self, *phrases, within=PATIENCE):
        """Returns the first log line that holds every phrase."""

        def line():
            lines = [l for l in self.log_text().splitlines() if all(p in l for p in phrases)]
            return lines[0] if lines else None

        try:
            return eventually(line, within, f"a log line with {phrases}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_text()[-3000:]}") from None

    # the end

    def leftovers(self):
        """What of the agent is still there: mounts, bound sockets, processes."""
        # The memory that objects live in outlives the agent on purpose: one tmpfs per runtime.
        memory = {m.id for m in mounts(self.shm) if m.fstype == "tmpfs"}
        found = [f"mount {m}" for m in mounts(self.root) if m.id not in memory]
        found += [f"socket {path}" for path in bound_sockets(self.root)]
        found += [
            f"process {pid} {' '.join(words)}" for pid, (_, state, words) in processes().items()
            if state != "Z" and any(str(self.root) in word for word in words)
        ]
        return found

    def close(self):
        """Ends what a failed test left, so that the next one starts on clean ground."""
        if self.agent is not None and self.agent.poll() is None:
            with contextlib.suppress(Exception):
                self.kill_tree()
        points = [mount.point for mount in reversed(mounts(self.root))]
        for start in range(0, len(points), 500):
            subprocess.run(["umount", "-l", *points[start:start + 500]], stderr=subprocess.DEVNULL, timeout=60)
        shutil.rmtree(self.root, ignore_errors=True)


def is_alive(pid):
    return processes().get(pid, (0, "Z", []))[1] != "Z"


def kill(pid, number=signal.SIGKILL):
    os.kill(pid, number)


def is_socket(path):
    with contextlib.suppress(FileNotFoundError):
        return stat.S_ISSOCK(os.stat(path, follow_symlinks=True).st_mode)
    return False


# --- tasks: Python programs with the official client ----------------------------------------------


class Task:
    """A Python process of its own that runs snippets and answers with what they call `result`.

    Without a volume it sees this machine as it is. With one it is a pod's container: an own mount
    namespace and root, no privileges, another user, and of vineyard nothing but the volume.
    """

    def __init__(self, volume=None, uid=None, scratch=None, environment=None):
        here = Path(__file__).parent
        program = [str(VENV_PYTHON), "-I", str(here / "task.py")]
        if volume is not None:
            scratch = Path(scratch) / f"pod-{time.monotonic_ns()}"
            scratch.mkdir()
            program = [str(here / "container"), str(scratch), str(volume), str(uid or 1000), *program]
        base = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "VINEYARD_IPC_SKIP_RETRY": "1",
                "VINEYARD_RPC_SKIP_RETRY": "1"}
        self.log = open(os.path.join(os.environ["VINELET_BASE"], f"task-{time.monotonic_ns()}.log"), "w+b")
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env={**base, **(environment or {})}, bufsize=0,
        )
        self._buffer = b""

    def send(self, code, **values):
        """Hands over a snippet; `values` are its variables."""
        self.process.stdin.write(json.dumps({"code": code, "values": values}).encode() + b"\n")

    def receive(self, timeout=60.0):
        """What the oldest snippet that was sent called `result`."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(self.process.stdout.fileno(), 1 << 20) if ready else b""
            if not chunk:
                self.log.seek(0)
                reason = "ended" if ready else f"gave no answer in {timeout} s"
                raise AssertionError(f"the task {reason}: {self.log.read().decode(errors='replace')[-3000:]}")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply = json.loads(line)
        assert "error" not in reply, f"in the task: {reply['error']}"
        return reply["result"]

    def run(self, code, timeout=60.0, **values):
        self.send(code, **values)
        return self.receive(timeout)

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
