"""What fluid would believe at every moment of a node's life.

A watcher reads the mount table without pause and judges it by fluid's rules (`fluid.py`); the tests
start, kill and stop the agent meanwhile and then look at everything the watcher saw.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fluid
from harness import eventually, mountinfo, mounts, mounts_at


class Watcher:
    """`watch.py` on one runtime, from before the agent's start."""

    def __init__(self, runtime):
        self.seen = []
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUN, str(Path(__file__).parent), str(runtime.fluid_path), str(runtime.socket)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        eventually(lambda: self.seen, what="the watcher's first look")

    def _read(self):
        for line in self.process.stdout:
            self.seen.append(json.loads(line))

    def finish(self):
        """All it saw, and how often it looked."""
        self.process.stdin.close()
        self.process.wait(10)
        self.thread.join(10)
        *changes, end = self.seen
        return changes, end["looks"]


_RUN = "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv = ['watch.py', *sys.argv[2:]]; runpy.run_path(sys.path[0] + '/watch.py')"


@pytest.fixture(params=["tmpfs", "disk"])
def node(request, make_node):
    """On the machine's disk a bind shows its whole path as root, which fluid's grep also sees."""
    base = {"tmpfs": "VINELET_BASE", "disk": "VINELET_DISK"}[request.param]
    node = make_node(os.environ[base])
    node.add_runtime()
    return node


@pytest.fixture
def watcher(node):
    watcher = Watcher(node.runtime())
    yield watcher
    if watcher.process.poll() is None:
        watcher.finish()


def assert_nothing_was_ever_wrong(changes):
    assert [c for c in changes if c["broken"]] == [], "fluid was satisfied and a task was not"
    assert [c for c in changes if c["stacked"]] == [], "a mount point occurred twice"


def verdicts(changes):
    """The sequence of fluid's verdicts, repetitions dropped."""
    found = []
    for change in changes:
        if not found or found[-1] != change["satisfied"]:
            found.append(change["satisfied"])
    return found


def test_before_ready_never_then_always_after_a_stop_never(node, watcher):
    for _ in range(3):
        node.start()
        time.sleep(0.3)
        assert node.stop() == 0
    changes, looks = watcher.finish()
    assert_nothing_was_ever_wrong(changes)
    assert verdicts(changes) == [False, True, False, True, False, True, False]
    assert looks > 100


def test_ready_shows_exactly_one_mark(node):
    node.start()
    runtime = node.runtime()
    table = mountinfo()
    assert fluid.check_mount(table, runtime.fluid_path) is None
    (mark,) = runtime.marks()
    assert mark.fstype == "fuse.vineyard-fuse"
    assert [m.point for m in mounts(runtime.directory)] == [str(runtime.fluid_path), str(runtime.mark)]
    assert [m.read_only for m in mounts(runtime.directory)] == [True, True]


def test_the_mark_reaches_a_namespace_that_receives_mounts(node):
    """As fluid's plugin sees it: HostToContainer, so the same mounts with `master:`."""
    plugin = subprocess.Popen(["unshare", "--mount", "--propagation", "slave", "sleep", "600"])
    try:
        eventually(lambda: os.readlink(f"/proc/{plugin.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"))
        node.start()
        runtime = node.runtime()
        assert len([m for m in mounts_at(runtime.mark, plugin.pid) if m.fstype == "fuse.vineyard-fuse"]) == 1
        assert len(mounts_at(runtime.fluid_path, plugin.pid)) == 1
        assert fluid.check_mount(mountinfo(plugin.pid), str(runtime.fluid_path)) is None
        node.stop()
        assert mounts(runtime.directory, plugin.pid) == []
    finally:
        plugin.kill()
        plugin.wait()


def test_fluid_sees_published_volumes_in_use(node, kubelet):
    node.start()
    kubelet.register()
    assert not fluid.check_bind_mounts(mountinfo(), "default-vineyard")
    one, two = (kubelet.publish_pv(node.runtime()) for _ in range(2))
    assert fluid.check_bind_mounts(mountinfo(), "default-vineyard")
    kubelet.unpublish(one)
    assert fluid.check_bind_mounts(mountinfo(), "default-vineyard")
    kubelet.unpublish(two)
    assert not fluid.check_bind_mounts(mountinfo(), "default-vineyard")


def test_a_published_volume_alone_does_not_satisfy_fluid(node, kubelet):
    """A bind of `fluid_path` would name it in the root field of the pod's mount for ever."""
    node.start()
    kubelet.register()
    published = kubelet.publish_pv(node.runtime())
    node.stop()
    assert len(mounts_at(published.target)) == 1
    assert fluid.check_mount(mountinfo(), node.runtime().fluid_path) is not None
    node.start()
    kubelet.register()
    kubelet.unpublish(published)


def test_kills_of_the_node_role_never_take_the_mark_away(node, watcher):
    node.start()
    for _ in range(5):
        pid = eventually(node.node_pid)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: node.node_pid() not in (None, pid), what="a new node role")
        eventually(node.runtime().is_ready)
    node.stop()
    changes, _ = watcher.finish()
    assert_nothing_was_ever_wrong(changes)
    assert verdicts(changes) == [False, True, False]


def test_kills_of_the_shard_never_take_the_mark_away(node, watcher):
    node.start()
    runtime = node.runtime()
    for _ in range(5):
        pid = eventually(lambda: node.shard_pid(runtime))
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: node.shard_pid(runtime) not in (None, pid), what="a new shard")
        eventually(runtime.is_ready)
    node.stop()
    changes, _ = watcher.finish()
    assert_nothing_was_ever_wrong(changes)
    assert verdicts(changes) == [False, True, False]


def test_remains_of_a_killed_tree_are_replaced_and_never_stacked(node):
    """The dead mark stays in the table, but a `stat` below it fails; the next agent replaces it."""
    runtime = node.runtime()
    for _ in range(5):
        node.start()
        assert [len(runtime.marks()), len(mounts(runtime.directory))] == [1, 2]
        node.kill_tree()
    node.start()
    assert [len(runtime.marks()), len(mounts(runtime.directory))] == [1, 2]
    assert fluid.check_mount(mountinfo(), runtime.fluid_path) is None
    listed = subprocess.run(["ls", runtime.mark], capture_output=True, text=True, timeout=10)
    assert "vineyard-config.yaml" in listed.stdout, listed.stderr
    assert node.stop() == 0
    assert mounts(runtime.directory) == []


def test_the_dummy_filesystem_answers_with_the_discovery(node):
    node.start()
    mark = node.runtime().mark
    # Read in a process of its own: whoever hangs on a dead FUSE server cannot be interrupted.
    shown = subprocess.run(["cat", mark / "vineyard-config.yaml"], capture_output=True, text=True, timeout=10)
    assert shown.stdout == node.runtime().config.read_text()
    endpoint = subprocess.run(["cat", mark / "VINEYARD_RPC_ENDPOINT"], capture_output=True, text=True, timeout=10)
    assert endpoint.stdout.strip() == node.runtime().endpoint.read_text().strip()
    refused = subprocess.run(["touch", mark / "new"], capture_output=True, text=True, timeout=10)
    assert "Read-only file system" in refused.stderr


def test_the_mark_comes_after_the_socket_answers(node, watcher):
    """A shard that cannot serve, its RPC port being taken, is not announced to fluid."""
    import socket

    from harness import free_port

    port = free_port()
    with socket.socket() as thief:
        thief.bind(("0.0.0.0", port))
        thief.listen()
        node.add_runtime(port=port)
        node.start(wait=False)
        node.wait_log(str(port))
        time.sleep(1)
        assert node.runtime().marks() == []
    eventually(node.runtime().is_ready, 30, "ready once the port is free")
    node.stop()
    changes, _ = watcher.finish()
    assert_nothing_was_ever_wrong(changes)
    assert verdicts(changes) == [False, True, False]
