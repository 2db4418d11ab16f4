"""From nothing to an array in a task's hands, and back to nothing.

A node, an agent, a kubelet that registers it and publishes a volume, and task pods that see of the
node only that volume: another root, other mounts, another user, no privileges.
"""

import os

import pytest

from harness import Task, bound_sockets, mounts, mounts_at
from kubelet import Capability, call, csi, error_of

#: Every value is made anew in each pod, so that nothing but the store can carry it over.
VALUES = {
    "int": "7",
    "string": "'Wörter'",
    "bytes": "b'\\x00\\x01' * 500",
    "tuple": "(1, 'two', (3.0, None))",
    "dict": "{'a': 1, 'b': np.arange(4)}",
    **{f"array of {d}": f"np.arange(500).astype('{d}')" for d in ("i1", "u2", "i4", "i8", "f4", "f8", "bool", "c16")},
    "empty array": "np.zeros((0, 3))",
    "0-d array": "np.array(2.5)",
    "big array": "np.random.default_rng(0).random(1 << 20)",
    "frame": "pd.DataFrame({'x': [1, 2, 3], 'y': [0.5, 1.5, 2.5], 's': ['a', 'b', 'c']})",
    "series": "pd.Series([1, 2, 3], name='numbers')",
    "table": "pa.table({'x': [1, 2, None], 'y': ['a', None, 'c']})",
}

IMPORTS = """
import warnings; warnings.simplefilter('ignore')
import numpy as np, pandas as pd, pyarrow as pa, vineyard

def digest(value):
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), np.asarray(value).tobytes().hex()[:200], str(np.asarray(value).sum())]
    if isinstance(value, pd.DataFrame):
        return ['frame', value.to_dict('list')]
    if isinstance(value, pd.Series):
        return ['series', value.name, value.tolist()]
    if isinstance(value, pa.Table):
        return ['table', value.to_pydict()]
    if isinstance(value, (bytes, memoryview)):
        return ['bytes', bytes(value).hex()]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [digest(v) for v in value]]
    if isinstance(value, dict):
        return ['dict', {k: digest(v) for k, v in value.items()}]
    return [type(value).__name__, value]
"""

PUT = IMPORTS + """
client = vineyard.connect()
ids, digests = {}, {}
for name, text in values.items():
    value = eval(text)
    named = not isinstance(value, bytes)  # a bare blob cannot be persisted
    ids[name] = int(client.put(value, persist=named, name=name.replace(' ', '-') if named else None))
    digests[name] = digest(value)
result = [ids, digests]
"""

GET = IMPORTS + """
client = vineyard.connect()
result = {name: digest(client.get(vineyard.ObjectID(id))) for name, id in ids.items()}
"""

GET_BY_NAME = """
result = {name: digest(client.get(name=name.replace(' ', '-'))) for name in ids if name != 'bytes'}
"""

SEE = """
import os, socket

def attempt(action):
    try:
        action()
        return 'it worked'
    except OSError as error:
        return os.strerror(error.errno)

def connect():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect('/var/run/vineyard/vineyard.sock')

here = '/var/run/vineyard/'
result = {
    'uid': os.getuid(),
    'effective capabilities': int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16),
    'mounts of vineyard': sorted({l.split()[4] for l in open('/proc/self/mountinfo') if 'vineyard' in l.split()[4]}),
    'entries': sorted(os.listdir(here)),
    'config': open(here + 'vineyard-config.yaml').read(),
    'overwrite config': attempt(lambda: open(here + 'vineyard-config.yaml', 'w')),
    'forge endpoint': attempt(lambda: open(here + 'rpc-conf/VINEYARD_RPC_ENDPOINT', 'w')),
    'replace socket': attempt(lambda: os.unlink(here + 'vineyard.sock')),
    'add a file': attempt(lambda: open(here + 'new', 'w')),
    'connect': attempt(connect),
}
"""


def round_trip(node, kubelet, publish):
    """Values put in one pod are got in another, by id and by name; then all is taken down."""
    writer, reader = publish(), publish()
    with Task(writer.target, scratch=node.root) as task:
        ids, digests = task.run(PUT, values=VALUES)
    with Task(reader.target, uid=1234, scratch=node.root) as task:
        assert task.run(GET, ids=ids) == digests
        named = {name: digest for name, digest in digests.items() if name != "bytes"}
        assert task.run(GET_BY_NAME) == named
    for published in (writer, reader):
        kubelet.unpublish(published)


@pytest.fixture
def ready(node, kubelet):
    """An agent with one runtime, known to kubelet."""
    node.add_runtime()
    node.start()
    kubelet.register()
    return node


def test_the_agent_registers_with_the_authority_that_kubelet_really_sends(node, kubelet):
    node.add_runtime()
    node.start()
    info, node_info = kubelet.register()
    assert info.type == "CSIPlugin"
    assert info.name == "vinelet.csi.v6d.io"
    assert info.endpoint == str(node.csi_socket)
    assert list(info.supported_versions) == ["1.0.0"]
    assert node_info.node_id == "node-1"


def test_a_task_gets_what_another_put_through_a_volume_of_fluids_making(ready, kubelet):
    runtime = ready.runtime()
    round_trip(ready, kubelet, lambda: kubelet.publish_pv(runtime))


def test_a_task_gets_what_another_put_through_a_volume_with_our_own_keys(ready, kubelet):
    context = {"runtimeNamespace": "default", "runtimeName": "vineyard"}
    round_trip(ready, kubelet, lambda: kubelet.publish_pv(ready.runtime(), context=context))


def test_a_task_gets_what_another_put_through_an_ephemeral_volume(ready, kubelet):
    round_trip(ready, kubelet, lambda: kubelet.publish_inline("default", {"runtimeName": "vineyard"}))


def test_an_ephemeral_volume_reaches_no_other_namespace(ready, kubelet):
    for context in ({"runtimeName": "vineyard"}, {"runtimeName": "vineyard", "runtimeNamespace": "default"}):
        request = kubelet.inline_request("other", context)
        code, message = error_of(kubelet.publish, request, timeout=5)
        assert code in ("INVALID_ARGUMENT", "PERMISSION_DENIED", "NOT_FOUND", "UNAVAILABLE"), (code, message)
        assert "other" in message
        assert not os.path.lexists(request.target_path)


def test_a_pod_sees_the_volume_read_only_and_can_still_connect(ready, kubelet):
    published = kubelet.publish_pv(ready.runtime())
    with Task(published.target, scratch=ready.root) as task:
        seen = task.run(SEE)
    read_only = "Read-only file system"
    assert seen["uid"] == 1000
    assert seen["effective capabilities"] == 0
    assert seen["mounts of vineyard"] == ["/var/run/vineyard"]
    assert {"vineyard.sock", "vineyard-config.yaml", "rpc-conf"} <= set(seen["entries"])
    assert seen["overwrite config"] == read_only
    assert seen["forge endpoint"] == read_only
    assert seen["replace socket"] == read_only
    assert seen["add a file"] == read_only
    assert seen["connect"] == "it worked"
    assert seen["config"].endswith("\n") and "IPCSocket: vineyard.sock" in seen["config"]
    kubelet.unpublish(published)


def test_an_array_in_a_pod_is_the_arena_itself(ready, kubelet):
    published = kubelet.publish_pv(ready.runtime())
    code = """
import numpy as np, vineyard
client = vineyard.connect()
array = client.get(client.put(np.arange(1 << 20)))
address = array.__array_interface__['data'][0]
for line in open('/proc/self/maps'):
    span, permissions, _, device, inode = line.split()[:5]
    low, high = (int(end, 16) for end in span.split('-'))
    if low <= address < high:
        result = [device, int(inode), permissions]
"""
    with Task(published.target, scratch=ready.root) as task:
        device, inode, permissions = task.run(code)
    assert permissions[3] == "s", "a shared mapping"
    files = [os.path.join(d, f) for d, _, names in os.walk(ready.shm) for f in names]
    arenas = {(f"{os.major(s.st_dev):02x}:{os.minor(s.st_dev):02x}", s.st_ino): f for f in files for s in [os.stat(f)]}
    assert (device, inode) in arenas, f"the mapping {device} {inode} is none of {arenas}"
    kubelet.unpublish(published)


def test_a_publish_leaves_one_mount_with_the_flags_of_a_guest(ready, kubelet):
    published = kubelet.publish_pv(ready.runtime())
    (mount,) = mounts_at(published.target)
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(mount.options)
    assert mount.root.endswith("/mnt/vineyard/default/vineyard")
    kubelet.unpublish(published)


def test_publishing_again_changes_nothing(ready, kubelet):
    request = kubelet.pv_request(ready.runtime())
    published = kubelet.publish(request)
    before = mounts_at(published.target)
    for _ in range(5):
        kubelet.publish(request)
    assert [m.line for m in mounts_at(published.target)] == [m.line for m in before]
    kubelet.unpublish(published)


def test_unpublishing_again_is_fine_whatever_is_there(ready, kubelet):
    published = kubelet.publish_pv(ready.runtime())
    request = csi.NodeUnpublishVolumeRequest(volume_id=published.volume_id, target_path=str(published.target))
    for _ in range(3):
        call(kubelet.endpoint, "NodeUnpublishVolume", request)
        assert not os.path.lexists(published.target)
    published.target.mkdir()
    call(kubelet.endpoint, "NodeUnpublishVolume", request)
    assert not os.path.lexists(published.target)


def test_a_target_below_a_pod_that_is_gone_is_unpublished(ready, kubelet):
    target = ready.kubelet / "pods" / "gone" / "volumes" / "kubernetes.io~csi" / "v" / "mount"
    request = csi.NodeUnpublishVolumeRequest(volume_id="v", target_path=str(target))
    call(kubelet.endpoint, "NodeUnpublishVolume", request)


def test_statistics_are_those_of_the_store(ready, kubelet):
    if Capability.GET_VOLUME_STATS not in kubelet.capabilities():
        pytest.fail("GET_VOLUME_STATS is not advertised")
    published = kubelet.publish_pv(ready.runtime())
    with Task(published.target, scratch=ready.root) as task:
        task.run("import numpy, vineyard; client = vineyard.connect(); result = int(client.put(numpy.zeros(8 << 20, 'u1')))")
        reply = kubelet.stats(published)
    usage = {u.unit: u for u in reply.usage}[csi.VolumeUsage.BYTES]
    assert usage.total == 64 << 20
    assert usage.used == 8 << 20
    assert usage.available == usage.total - usage.used
    kubelet.unpublish(published)


def test_two_runtimes_are_two_stores(node, kubelet):
    node.add_runtime("a"), node.add_runtime("b", namespace="ml")
    node.start()
    kubelet.register()
    one, two = kubelet.publish_pv(node.runtime("a")), kubelet.publish_pv(node.runtime("b", "ml"))
    with Task(one.target, scratch=node.root) as first, Task(two.target, scratch=node.root) as second:
        code = "import vineyard; client = vineyard.connect(); result = int(client.put(what, persist=True, name='mine'))"
        first.run(code, what="a"), second.run(code, what="b")
        assert first.run("result = client.get(name='mine')") == "a"
        assert second.run("result = client.get(name='mine')") == "b"
    kubelet.unpublish(one), kubelet.unpublish(two)


def test_after_unpublish_and_stop_nothing_is_left(ready, kubelet):
    published = kubelet.publish_pv(ready.runtime())
    with Task(published.target, scratch=ready.root) as task:
        task.run("import vineyard; result = vineyard.connect().put(1) is not None")
    kubelet.unpublish(published)
    assert ready.stop() == 0
    assert ready.leftovers() == []
    assert not ready.registration_socket.exists()
    assert not ready.csi_socket.exists()
    assert bound_sockets(ready.root) == []


def test_stopping_leaves_published_volumes_to_their_pods(ready, kubelet):
    published = kubelet.publish_pv(ready.runtime())
    assert ready.stop() == 0
    assert len(mounts_at(published.target)) == 1
    assert ready.runtime().marks() == []
    ready.start()
    kubelet.register()
    with Task(published.target, scratch=ready.root) as task:
        assert task.run("import vineyard; c = vineyard.connect(); result = c.get(c.put(5))") == 5
    kubelet.unpublish(published)


def test_health_goes_through_the_real_csi_socket(ready):
    assert ready.http("/healthz")[0] == 200
    assert ready.http("/readyz")[0] == 200
    status, body = ready.http("/metrics")
    assert status == 200 and body
    assert ready.http("/nothing-here")[0] == 404


def test_what_is_left_after_a_stop_is_no_mount_below_the_runtime_root(ready):
    runtime = ready.runtime()
    assert [m.point for m in mounts(runtime.directory)] == [str(runtime.fluid_path), str(runtime.mark)]
    ready.stop()
    assert mounts(runtime.directory) == []


def test_runtimes_come_change_and_go_while_the_agent_runs(node, kubelet):
    from harness import eventually

    node.start()
    runtime = node.add_runtime()
    eventually(runtime.is_ready, 5, "a new runtime is served")
    node.add_runtime("second", namespace="ml")
    eventually(node.runtime("second", "ml").is_ready, 5, "a second one is served")
    node.runtime("second", "ml").file.unlink()
    eventually(lambda: not node.runtime("second", "ml").marks(), 5, "its mark goes with its file")
    assert runtime.is_ready()
