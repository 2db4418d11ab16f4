"""SIGKILL for every part under traffic: what may be lost is one answer, never a socket, a mount or
another runtime's work."""

import os
import random
import signal
import socket
import threading
import time

import pytest

from harness import answers, descriptors, eventually, mounts, mounts_at, vineyard_call
from kubelet import csi, call

ROUNDS = 30
#: Seconds a killed role may be away, on a busy machine with back-off.
RECOVERY = 10.0


@pytest.fixture
def pair(node, kubelet):
    """Two runtimes, one published volume of each."""
    node.add_runtime("a"), node.add_runtime("b")
    node.start()
    kubelet.register()
    node.volumes = [kubelet.publish_pv(node.runtime(name)) for name in ("a", "b")]
    return node


class Traffic:
    """Clients that connect, register and exchange without pause, and note what failed."""

    def __init__(self, path, clients=3):
        self.path = str(path)
        self.refused, self.broken, self.served = [], 0, 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self):
        while not self._stop.is_set():
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(20)
                try:
                    client.connect(self.path)
                except OSError as error:
                    self.refused.append(repr(error))
                    continue
            try:
                vineyard_call(self.path, {"type": "instance_status_request"}, timeout=20)
                self.served += 1
            except OSError:
                self.broken += 1  # it was in flight

    def finish(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs"
        return self


def inode(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


def wait_for_another(find, old):
    return eventually(lambda: (lambda pid: pid if pid not in (None, old) else None)(find()), RECOVERY, "a new process")


def test_a_killed_shard_loses_no_connect_and_disturbs_nobody(pair):
    a, b = pair.runtime("a"), pair.runtime("b")
    sockets = [inode(a.worker_socket), inode(b.worker_socket)]
    table = [m.line for m in mounts(pair.root)]
    other_shard = pair.shard_pid(b)
    at_a, at_b = Traffic(a.socket), Traffic(b.socket)
    for _ in range(ROUNDS):
        started = time.monotonic()
        pid = eventually(lambda: pair.shard_pid(a))
        os.kill(pid, signal.SIGKILL)
        wait_for_another(lambda: pair.shard_pid(a), pid)
        assert answers(a.socket, RECOVERY)
        assert time.monotonic() - started < RECOVERY
    at_a.finish(), at_b.finish()
    assert at_a.refused == [] and at_b.refused == []
    assert at_b.broken == 0 and at_b.served > ROUNDS
    assert [inode(a.worker_socket), inode(b.worker_socket)] == sockets
    assert [m.line for m in mounts(pair.root)] == table
    assert pair.shard_pid(b) == other_shard


def test_a_killed_node_role_loses_no_call_and_no_mount(pair, kubelet):
    a = pair.runtime("a")
    sockets = [inode(p) for p in (a.worker_socket, pair.csi_socket, pair.registration_socket)]
    table = [m.line for m in mounts(pair.root)]
    shards = [pair.shard_pid(pair.runtime(name)) for name in ("a", "b")]
    traffic = Traffic(a.socket)
    for _ in range(ROUNDS):
        started = time.monotonic()
        pid = eventually(pair.node_pid)
        os.kill(pid, signal.SIGKILL)
        # The connect waits in the backlog; only a call that was in flight may fail.
        call(kubelet.endpoint, "Probe", csi.ProbeRequest(), timeout=RECOVERY)
        wait_for_another(pair.node_pid, pid)
        kubelet.unpublish(kubelet.publish_pv(a))
        assert time.monotonic() - started < RECOVERY
    traffic.finish()
    assert (traffic.refused, traffic.broken) == ([], 0), "the store does not notice"
    assert traffic.served > ROUNDS
    assert [inode(p) for p in (a.worker_socket, pair.csi_socket, pair.registration_socket)] == sockets
    assert sorted(m.line for m in mounts(pair.root)) == sorted(table)
    assert [pair.shard_pid(pair.runtime(name)) for name in ("a", "b")] == shards


def test_kills_cost_the_supervisor_no_descriptor(pair):
    a = pair.runtime("a")

    def kill_both():
        for find in (pair.node_pid, lambda: pair.shard_pid(a)):
            pid = eventually(find)
            os.kill(pid, signal.SIGKILL)
            wait_for_another(find, pid)
        eventually(a.is_ready, RECOVERY)

    kill_both()
    eventually(lambda: _settled(pair.agent.pid))
    before = descriptors(pair.agent.pid)
    for _ in range(10):
        kill_both()
    eventually(lambda: len(descriptors(pair.agent.pid)) <= len(before), 5, "no more descriptors than before")
    assert len(pair.processes()) == 4


def test_readiness_comes_back_without_kubelet(pair):
    """kubelet registers once per socket: it does not come again because the node role was killed."""
    assert pair.http("/readyz")[0] == 200
    os.kill(pair.node_pid(), signal.SIGKILL)
    eventually(lambda: pair.http("/readyz")[0] == 200, RECOVERY, "ready again")


def _settled(pid):
    first = descriptors(pid)
    time.sleep(0.1)
    return descriptors(pid) == first


def test_a_new_agent_over_the_remains_of_a_killed_tree(pair, kubelet):
    a = pair.runtime("a")
    for number in range(ROUNDS // 3):
        started = time.monotonic()
        pair.kill_tree()
        assert all(len(mounts_at(v.target)) == 1 for v in pair.volumes), "published volumes stay"
        pair.start()
        kubelet.register()
        assert len(a.marks()) == 1
        assert len(mounts(a.directory)) == 2
        kubelet.unpublish(kubelet.publish_pv(a))
        assert time.monotonic() - started < 2 * RECOVERY
    # The volume of before the first kill shows the store of now.
    assert answers(pair.volumes[0].target / "vineyard.sock")
    for volume in pair.volumes:
        kubelet.unpublish(volume)
    assert pair.stop() == 0
    assert pair.leftovers() == []


def test_a_tree_killed_at_any_moment_of_its_start_leaves_nothing_in_the_way(node, kubelet):
    runtime = node.add_runtime()
    generator = random.Random(2)
    for _ in range(ROUNDS):
        node.start(wait=False)
        time.sleep(generator.uniform(0, 0.25))
        node.kill_tree()
        assert len(runtime.marks()) <= 1
    node.start()
    kubelet.register()
    assert len(mounts(runtime.directory)) == 2
    kubelet.unpublish(kubelet.publish_pv(runtime))
    assert node.stop() == 0
    assert node.leftovers() == []


def test_children_die_with_the_supervisor(pair):
    tree = set(pair.processes())
    os.kill(pair.agent.pid, signal.SIGKILL)
    pair.agent.wait(5)

    from harness import is_alive

    eventually(lambda: not any(is_alive(pid) for pid in tree), 5, "all of them are gone")


def test_a_child_that_keeps_crashing_is_restarted_with_back_off_and_is_visible(pair):
    a = pair.runtime("a")
    for _ in range(6):
        pid = eventually(lambda: pair.shard_pid(a), RECOVERY)
        os.kill(pid, signal.SIGKILL)
    pair.wait_log("default/a")
    eventually(lambda: answers(a.socket), 30, "it is served again")
    assert answers(pair.runtime("b").socket)


def test_stopping_under_traffic_ends_in_time(pair):
    traffic = Traffic(pair.runtime("a").socket)
    eventually(lambda: traffic.served > 10)
    started = time.monotonic()
    assert pair.stop(within=10) == 0
    assert time.monotonic() - started < 10
    traffic.finish()


def test_a_stopped_shard_does_not_block_the_end(pair):
    os.kill(pair.shard_pid(pair.runtime("a")), signal.SIGSTOP)
    tree = pair.processes()
    pair.stop(within=10)

    from harness import is_alive

    eventually(lambda: not any(is_alive(pid) for pid in tree), 5, "no process is left")


def test_a_client_in_a_pod_survives_by_connecting_again(pair, kubelet):
    from harness import Task

    code = """
import vineyard
client = vineyard.connect()
result = client.get(client.put(number))
"""
    again = """
import vineyard
client = vineyard.connect()
try:
    client.get(client.put(0))
except Exception:
    client = client.fork()
result = client.get(client.put(number))
"""
    a = pair.runtime("a")
    with Task(pair.volumes[0].target, scratch=pair.root) as task:
        assert task.run(code, number=1) == 1
        for number in range(3):
            pid = pair.shard_pid(a)
            os.kill(pid, signal.SIGKILL)
            wait_for_another(lambda: pair.shard_pid(a), pid)
            assert task.run(again, number=number) == number
