"""Bad input, each with its answer: what is wrong, where, and that nothing else was disturbed."""

import os
import socket
import struct
import subprocess
import threading
import time

import grpc
import pytest

from harness import VINELET, answers, eventually, free_port, mounts, mounts_at, runtime_yaml
from kubelet import Mode, call, csi, error_of, mount_capability

# --- CSI -----------------------------------------------------------------------------------------


@pytest.fixture
def served(node, kubelet):
    node.add_runtime()
    node.start()
    kubelet.register()
    return node


def valid(kubelet, node):
    return kubelet.pv_request(node.runtime())


def change(**fields):
    """A change of one or more fields of a publish request."""

    def apply(request, node):
        for name, value in fields.items():
            value = value(node, request) if callable(value) else value
            if isinstance(value, (str, bool)):
                setattr(request, name, value)
            else:
                getattr(request, name).CopyFrom(value)

    return apply


def context(drop=(), **keys):
    def apply(request, node):
        for name in drop:
            del request.volume_context[name]
        for name, value in keys.items():
            request.volume_context[name] = value(node) if callable(value) else value

    return apply


def only_context(**keys):
    def apply(request, node):
        for name in list(request.volume_context):
            if not name.startswith("csi.storage.k8s.io/"):
                del request.volume_context[name]
        request.volume_context.update(keys)

    return apply


def without(field):
    return lambda request, node: request.ClearField(field)


def block(request, node):
    request.volume_capability.block.SetInParent()


def fs_type(request, node):
    request.volume_capability.mount.fs_type = "nfs"


def mount_flag(request, node):
    request.volume_capability.mount.mount_flags.append("noatime")


def no_access_type(request, node):
    request.volume_capability.CopyFrom(csi.VolumeCapability(
        access_mode=csi.VolumeCapability.AccessMode(mode=Mode.SINGLE_NODE_WRITER)))


def unknown_mode(request, node):
    request.volume_capability.CopyFrom(mount_capability(Mode.UNKNOWN))


def below(*parts):
    return lambda node, request: os.path.join(str(node.kubelet), *parts)


#: name: (one thing wrong with a valid request, codes, words of the message)
PUBLISHES = {
    "no volume id": (without("volume_id"), "INVALID_ARGUMENT", ["volume_id"]),
    "no target path": (without("target_path"), "INVALID_ARGUMENT", ["target_path"]),
    "no capability": (without("volume_capability"), "INVALID_ARGUMENT", ["volume_capability"]),
    "no access type": (no_access_type, "INVALID_ARGUMENT", ["volume_capability"]),
    "block volume": (block, "INVALID_ARGUMENT", ["block"]),
    "unknown access mode": (unknown_mode, "INVALID_ARGUMENT", ["access_mode"]),
    "file system type": (fs_type, "INVALID_ARGUMENT", ["fs_type", "nfs"]),
    "mount flag": (mount_flag, "INVALID_ARGUMENT", ["mount_flags", "noatime"]),
    "no context at all": (only_context(), "INVALID_ARGUMENT", ["volume_context"]),
    "runtime name without namespace of a PV": (
        only_context(runtimeName="vineyard"), "INVALID_ARGUMENT", ["runtimeNamespace"]),
    "empty runtime name": (
        only_context(runtimeName="", runtimeNamespace="default"), "INVALID_ARGUMENT", ["runtimeName"]),
    "runtime name that is a path": (
        only_context(runtimeName="../../etc", runtimeNamespace="default"), "INVALID_ARGUMENT", ["runtimeName"]),
    "two runtimes in one context": (
        context(runtimeName="other", runtimeNamespace="default"), "INVALID_ARGUMENT", ["runtimeName"]),
    "fluid path of another runtime": (
        context(fluid_path=lambda n: str(n.runtime_root / "default" / "other" / "vineyard-fuse")),
        "INVALID_ARGUMENT", ["fluid_path"]),
    "fluid path elsewhere": (context(fluid_path="/etc"), "INVALID_ARGUMENT", ["fluid_path", "/etc"]),
    "mount type of another": (
        context(mount_type="juicefs-fuse"), "INVALID_ARGUMENT", ["mount_type", "juicefs-fuse"]),
    "sub path upwards": (context(fluid_sub_path="../../etc"), "INVALID_ARGUMENT", ["fluid_sub_path"]),
    "absolute sub path": (context(fluid_sub_path="/etc"), "INVALID_ARGUMENT", ["fluid_sub_path"]),
    "relative target": (change(target_path="pods/mount"), "INVALID_ARGUMENT", ["target_path"]),
    "target outside": (change(target_path="/etc/mount"), "INVALID_ARGUMENT", ["target_path", "/etc/mount"]),
    "target upwards": (
        change(target_path=below("pods", "..", "..", "mount")), "INVALID_ARGUMENT", ["target_path"]),
    "target is kubelet's directory": (
        change(target_path=below()), "INVALID_ARGUMENT", ["target_path"]),
}


@pytest.mark.parametrize("name", PUBLISHES)
def test_a_publish_with_one_thing_wrong_is_refused_and_leaves_no_trace(served, kubelet, name):
    spoil, code, words = PUBLISHES[name]
    request = valid(kubelet, served)
    spoil(request, served)
    table = mounts()
    answer, message = error_of(call, kubelet.endpoint, "NodePublishVolume", request, 10)
    assert answer == code, message
    assert [w for w in words if w not in message] == [], message
    assert [m.line for m in mounts()] == [m.line for m in table]
    if request.target_path.startswith(str(served.kubelet / "pods")):
        assert not os.path.lexists(request.target_path)


def test_a_runtime_that_is_not_here_is_named_with_those_that_are(served, kubelet):
    request = valid(kubelet, served)
    only_context(runtimeName="absent", runtimeNamespace="default")(request, served)
    code, message = error_of(call, kubelet.endpoint, "NodePublishVolume", request, 15)
    assert code in ("NOT_FOUND", "UNAVAILABLE")
    assert "default/absent" in message and "default/vineyard" in message
    assert not os.path.lexists(request.target_path)


def test_a_runtime_that_is_not_ready_yet_is_unavailable_within_the_deadline(node, kubelet):
    with socket.socket() as thief:
        port = free_port()
        thief.bind(("0.0.0.0", port))
        thief.listen()
        node.add_runtime(port=port)
        node.start(wait=False)
        eventually(node.csi_socket.exists)
        request = valid(kubelet, node)
        started = time.monotonic()
        code, message = error_of(call, kubelet.endpoint, "NodePublishVolume", request, 4)
        assert time.monotonic() - started < 5
        # Our own answer has to come before the caller gives up: only it says why.
        assert code == "UNAVAILABLE"
        assert "default/vineyard" in message
        assert not os.path.lexists(request.target_path)


def test_a_publish_waits_for_the_runtime(node, kubelet):
    with socket.socket() as thief:
        port = free_port()
        thief.bind(("0.0.0.0", port))
        thief.listen()
        node.add_runtime(port=port)
        node.start(wait=False)
        eventually(node.csi_socket.exists)
        threading.Timer(2, thief.close).start()
        kubelet.unpublish(kubelet.publish(valid(kubelet, node), timeout=60))


def test_a_symlink_as_target_is_not_followed(served, kubelet, scratch):
    request = valid(kubelet, served)
    os.symlink(scratch, request.target_path)
    code, message = error_of(call, kubelet.endpoint, "NodePublishVolume", request, 10)
    assert code in ("INVALID_ARGUMENT", "ALREADY_EXISTS", "FAILED_PRECONDITION"), message
    assert "symbolic link" in message
    assert mounts_at(scratch) == []
    # Pods must be able to end: the link that stands there goes.
    unpublish = csi.NodeUnpublishVolumeRequest(volume_id=request.volume_id, target_path=request.target_path)
    call(kubelet.endpoint, "NodeUnpublishVolume", unpublish)
    assert not os.path.lexists(request.target_path) and scratch.exists()


def test_a_symlink_on_the_way_to_the_target_is_not_followed(served, kubelet, scratch):
    request = valid(kubelet, served)
    parent = os.path.dirname(request.target_path)
    os.rmdir(parent)
    os.symlink(scratch, parent)
    code, message = error_of(call, kubelet.endpoint, "NodePublishVolume", request, 10)
    assert code == "INVALID_ARGUMENT" and "symbolic link" in message, (code, message)
    assert list(scratch.iterdir()) == [] and mounts_at(scratch) == []


def test_a_foreign_mount_at_the_target_is_left_alone(served, kubelet, scratch):
    request = valid(kubelet, served)
    os.mkdir(request.target_path)
    subprocess.run(["mount", "--bind", scratch, request.target_path], check=True)
    code, message = error_of(call, kubelet.endpoint, "NodePublishVolume", request, 10)
    assert code == "ALREADY_EXISTS", message
    assert request.target_path in message
    assert len(mounts_at(request.target_path)) == 1


def test_another_runtimes_volume_at_the_target_already_exists(served, kubelet):
    other = served.add_runtime("other")
    eventually(other.is_ready)
    request = valid(kubelet, served)
    published = kubelet.publish(request)
    request.volume_context.update(kubelet.fluid_context(other))
    code, message = error_of(call, kubelet.endpoint, "NodePublishVolume", request, 10)
    assert code == "ALREADY_EXISTS", message
    assert len(mounts_at(published.target)) == 1
    kubelet.unpublish(published)


def test_a_file_at_the_target_is_refused(served, kubelet):
    request = valid(kubelet, served)
    open(request.target_path, "w").close()
    code, message = error_of(call, kubelet.endpoint, "NodePublishVolume", request, 10)
    assert code in ("INVALID_ARGUMENT", "ALREADY_EXISTS", "FAILED_PRECONDITION"), message
    assert request.target_path in message


def test_concurrent_publishes_of_one_target_mount_once(served, kubelet):
    for _ in range(20):
        request = valid(kubelet, served)
        outcomes = []

        def publish():
            try:
                call(kubelet.endpoint, "NodePublishVolume", request, 20)
                outcomes.append("OK")
            except grpc.RpcError as error:
                outcomes.append(error.code().name)

        threads = [threading.Thread(target=publish) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert set(outcomes) <= {"OK", "ABORTED"} and "OK" in outcomes, outcomes
        assert len(mounts_at(request.target_path)) == 1
        unpublish = csi.NodeUnpublishVolumeRequest(volume_id=request.volume_id, target_path=request.target_path)
        call(kubelet.endpoint, "NodeUnpublishVolume", unpublish)
        assert not os.path.lexists(request.target_path)


def test_publishes_of_many_targets_go_side_by_side(served, kubelet):
    requests = [valid(kubelet, served) for _ in range(20)]
    failures = []

    def publish(request):
        try:
            call(kubelet.endpoint, "NodePublishVolume", request, 20)
        except grpc.RpcError as error:
            failures.append((error.code().name, error.details()))

    threads = [threading.Thread(target=publish, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # One PV in twenty pods: kubelet calls them one after another, but need not.
    assert [f for f in failures if f[0] != "ABORTED"] == []


#: name: (method, request, code, words)
OTHER_CALLS = {
    "unpublish without volume id": (
        "NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(target_path="/x"), "INVALID_ARGUMENT", ["volume_id"]),
    "unpublish without target path": (
        "NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id="v"), "INVALID_ARGUMENT", ["target_path"]),
    "unpublish outside": (
        "NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id="v", target_path="/etc/x"),
        "INVALID_ARGUMENT", ["target_path", "/etc/x"]),
    "stats without volume id": (
        "NodeGetVolumeStats", csi.NodeGetVolumeStatsRequest(volume_path="/x"), "INVALID_ARGUMENT", ["volume_id"]),
    "stats without volume path": (
        "NodeGetVolumeStats", csi.NodeGetVolumeStatsRequest(volume_id="v"), "INVALID_ARGUMENT", ["volume_path"]),
    "stats of an unknown volume": (
        "NodeGetVolumeStats", csi.NodeGetVolumeStatsRequest(volume_id="v", volume_path="some/path"), "NOT_FOUND", ["some/path"]),
    "expand": (
        "NodeExpandVolume", csi.NodeExpandVolumeRequest(volume_id="v", volume_path="/x"), "UNIMPLEMENTED", []),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_other_calls_say_what_is_wrong(served, kubelet, name):
    method, request, code, words = OTHER_CALLS[name]
    answer, message = error_of(call, kubelet.endpoint, method, request, 10)
    assert answer == code, message
    assert [w for w in words if w not in message] == [], message


def test_the_csi_socket_is_for_root_alone(served):
    assert os.stat(served.csi_socket).st_mode & 0o777 == 0o600


def test_garbage_on_the_csi_socket_costs_only_its_connection(served, kubelet):
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 10_000, os.urandom(10_000), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(served.csi_socket))
            try:
                client.sendall(garbage)
            except OSError:
                pass  # it may hang up before it has read all
    call(kubelet.endpoint, "Probe", csi.ProbeRequest(), 5)


# --- the store ---------------------------------------------------------------------------------------


def framed(body):
    return struct.pack("<Q", len(body)) + body


#: Each of these ends vineyardd 0.24.2, stops it from answering, or could.
HOSTILE = {
    "type that is a number": framed(b'{"type":5}'),
    "no type": framed(b"{}"),
    "null": framed(b"null"),
    "no JSON": framed(b"not json at all"),
    "not UTF-8": framed(os.urandom(64) + b"\xff"),
    "empty frame": framed(b""),
    "deep nesting": framed(b"[" * 200_000),
    "half a header": b"\x01\x02",
    "length beyond reason": struct.pack("<Q", 2**63 - 1),
    "length without a body": struct.pack("<Q", 200 << 20),
    "a run of ones": b"1" * 100_000,
    "a run of 0xff": b"\xff" * 100_000,
    "blob of impossible size": framed(b'{"type":"register_request","version":"0.24.2"}')
    + framed(b'{"type":"create_buffer_request","size":9223372036854775813}'),
    "object without content": framed(b'{"type":"register_request","version":"0.24.2"}')
    + framed(b'{"type":"create_data_request"}'),
}


@pytest.mark.parametrize("door", ["ipc", "rpc"])
def test_hostile_bytes_cost_a_client_its_connection_at_most(scratch, door):
    from servers import Server

    server = Server("vinelet", scratch)
    pid = server.process.pid
    with socket.socket(socket.AF_UNIX) as bystander:
        bystander.connect(str(server.socket))
        for name, data in HOSTILE.items():
            client = socket.socket(socket.AF_UNIX if door == "ipc" else socket.AF_INET)
            client.settimeout(5)
            with client:
                client.connect(str(server.socket) if door == "ipc" else ("127.0.0.1", server.port))
                try:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass
                except (ConnectionError, BrokenPipeError):
                    pass  # it may hang up before it has read all
            assert answers(server.socket, 5), f"after {name}"
    assert server.process.pid == pid and server.process.poll() is None
    resident = int(open(f"/proc/{pid}/statm").read().split()[1]) * 4096
    assert resident < 100 << 20, "a header alone buys no memory"
    server.stop()


# --- runtime files ---------------------------------------------------------------------------------


def with_quota(quota):
    return runtime_yaml("default", "bad", quota, port=9)


#: name: (text of the file, words that the log has in one line beside the file's name)
FILES = {
    "no YAML": ("{{{ this: is not", []),
    "empty": ("", []),
    "a list": ("- a\n- b\n", []),
    "another kind": (runtime_yaml("default", "bad").replace("VineyardRuntime", "AlluxioRuntime"), ["kind", "AlluxioRuntime"]),
    "another version": (runtime_yaml("default", "bad").replace("v1alpha1", "v7"), ["apiVersion", "v7"]),
    "no name": (runtime_yaml("default", "bad").replace("name: bad,", ""), ["metadata.name"]),
    "a name that is a path": (runtime_yaml("default", "../bad"), ["metadata.name", "../bad"]),
    "an upper case name": (runtime_yaml("default", "Bad"), ["metadata.name", "Bad"]),
    "quota 0": (with_quota("0"), ["quota", "0"]),
    "quota 4Gib": (with_quota("4Gib"), ["quota", "4Gib"]),
    "quota -1": (with_quota("-1"), ["quota", "-1"]),
    "quota that is no number": (with_quota("much"), ["quota", "much"]),
    "quota that overflows": (with_quota("99999999Ei"), ["quota", "99999999Ei"]),
    "no tiered store": ("apiVersion: data.fluid.io/v1alpha1\nkind: VineyardRuntime\nmetadata: {name: bad, namespace: default}\nspec: {}\n", ["tieredstore"]),
    "unknown field": (runtime_yaml("default", "bad", extra="  colour: blue\n"), ["spec", "colour"]),
    "port that is none": (runtime_yaml("default", "bad", port="70000"), ["rpc", "70000"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_runtime_file_is_reported_and_disturbs_nobody(node, name):
    text, words = FILES[name]
    good = node.add_runtime("good")
    node.start()
    shard, mark = node.shard_pid(good), good.marks()[0].line
    node.write(node.runtimes / "bad.yaml", text)
    node.wait_log("bad.yaml", *words, within=5)
    later = node.add_runtime("later")
    eventually(later.is_ready, 10, "a good file after the bad one is served")
    assert (node.shard_pid(good), good.marks()[0].line) == (shard, mark)
    assert node.agent.poll() is None
    # Mended, it is served.
    node.write(node.runtimes / "bad.yaml", runtime_yaml("default", "bad", port=free_port()))
    eventually(node.runtime("bad").is_ready, 10, "the mended file is served")


def test_a_runtime_that_turns_bad_keeps_running_as_it_was(node):
    runtime = node.add_runtime()
    node.start()
    shard = node.shard_pid(runtime)
    node.write(runtime.file, runtime_yaml("default", "vineyard", "-1", port=9))
    node.wait_log(runtime.file.name, "-1", within=5)
    assert runtime.is_ready() and node.shard_pid(runtime) == shard


def test_two_files_with_one_runtime_are_reported_and_the_first_is_served(node):
    runtime = node.add_runtime()
    node.start()
    shard = node.shard_pid(runtime)
    node.write(node.runtimes / "twin.yaml", runtime_yaml("default", "vineyard", "1Mi", port=free_port()))
    node.wait_log("twin.yaml", "default/vineyard", within=5)
    assert runtime.is_ready() and node.shard_pid(runtime) == shard


def test_two_runtimes_on_one_rpc_port_disturb_only_the_second(node):
    port = free_port()
    first = node.add_runtime("a-first", port=port)
    node.start()
    node.add_runtime("b-second", port=port)
    node.wait_log("b-second", str(port), within=10)
    assert first.is_ready()
    assert node.runtime("b-second").marks() == []


def test_a_taken_rpc_port_is_named_and_the_others_are_served(node):
    with socket.socket() as thief:
        port = free_port()
        thief.bind(("0.0.0.0", port))
        thief.listen()
        node.add_runtime("unlucky", port=port)
        lucky = node.add_runtime("lucky")
        node.start(wait=False)
        eventually(lucky.is_ready)
        node.wait_log("unlucky", str(port))
        status, body = node.http("/readyz")
        assert status != 200 and "default/unlucky" in body
    eventually(node.runtime("unlucky").is_ready, 40, "it is served once the port is free")


# --- the machine -------------------------------------------------------------------------------------


def test_a_missing_fuse_device_is_named(node):
    node.add_runtime()
    hidden = ["unshare", "--mount", "bash", "-c",
              'mount -t tmpfs none /mnt && mknod /mnt/null c 1 3 && mount --move /mnt /dev && exec "$@"', "-"]
    # A container without the device.
    with node.log.open("ab") as log:
        node.agent = subprocess.Popen([*hidden, VINELET, "agent", *node.arguments()],
                                      stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    node.wait_log("/dev/fuse")
    assert node.runtime().marks() == []


def test_without_rights_to_mount_the_agent_says_so(node):
    node.add_runtime()
    os.chmod(node.root, 0o777)
    bare = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    with node.log.open("ab") as log:
        node.agent = subprocess.Popen([*bare, VINELET, "agent", *node.arguments()],
                                      stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    node.wait_log("CAP_SYS_ADMIN")
    assert node.runtime().marks() == []


def test_a_runtime_root_on_a_read_only_disk_is_named(node):
    node.add_runtime()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", node.runtime_root], check=True)
    node.start(wait=False)
    line = node.wait_log("Read-only file system")
    assert str(node.runtime_root) in line


def test_a_runtime_whose_socket_path_has_more_than_107_bytes_is_named_and_disturbs_nobody(node):
    good = node.add_runtime("good")
    node.start()
    node.add_runtime("n" * 63, namespace="d" * 63)
    line = node.wait_log("107", within=5)
    assert "n" * 63 in line
    assert good.is_ready()


def test_a_csi_socket_path_beyond_107_bytes_is_named_with_its_length(make_node):
    deep = os.path.join(os.environ["VINELET_BASE"], "d" * 60, "e" * 40)
    os.makedirs(deep)
    node = make_node(deep)
    node.add_runtime()
    node.start(wait=False)
    assert "107" in node.wait_log("107")


#: Command lines that are wrong: exit code 2 and a word of what it is about.
COMMANDS = {
    "no command": ([], "Usage"),
    "unknown command": (["fly"], "fly"),
    "unknown flag": (["agent", "--colour=blue"], "--colour"),
    "bad http address": (["agent", "--http=somewhere"], "somewhere"),
    "bad log level": (["agent", "--log=loud"], "loud"),
    "relative CSI endpoint": (["agent", "--csi-socket=tcp://1.2.3.4:5"], "tcp://1.2.3.4:5"),
    "shard with a port that is none": (["shard", "--rpc_socket_port=lots"], "lots"),
    "shard with an unknown flag": (["shard", "--colour=blue"], "colour"),
    "dev with a bad size": (["dev", "--size=lots"], "lots"),
    "csi without a call": (["csi"], "Usage"),
    "csi without a target": (["csi", "publish", "--volume-id=v"], "--target"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_line_ends_with_2_and_says_what(name):
    arguments, word = COMMANDS[name]
    ended = subprocess.run([VINELET, *arguments], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    assert word in ended.stderr, ended
    # gflags, whose place `shard` takes, ends with 1 for a flag it does not know.
    assert ended.returncode in ((1, 2) if arguments[:1] == ["shard"] else (2,)), ended


def test_csi_by_hand_prints_the_code_and_ends_with_1(served):
    wrong = subprocess.run(
        [VINELET, "csi", "--socket", str(served.csi_socket), "unpublish", "--volume-id", "v", "--target", "/etc/x"],
        capture_output=True, text=True, timeout=20)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("INVALID_ARGUMENT: ")
    right = subprocess.run([VINELET, "csi", "--socket", str(served.csi_socket), "info"],
                           capture_output=True, text=True, timeout=20)
    assert right.returncode == 0 and "vinelet.csi.v6d.io" in right.stdout
    absent = subprocess.run([VINELET, "csi", "--socket", str(served.root / "none.sock"), "info"],
                            capture_output=True, text=True, timeout=20)
    assert absent.returncode == 1 and "none.sock" in absent.stderr


def test_a_shard_refuses_a_socket_that_another_serves(scratch):
    from servers import Server

    first = Server("vinelet", scratch)
    second = subprocess.run(
        [VINELET, "shard", "--socket", str(first.socket), "--size", "1Mi", "--norpc", "--meta", "local"],
        capture_output=True, text=True, timeout=20)
    assert second.returncode != 0 and str(first.socket) in second.stderr
    assert answers(first.socket)
    first.stop()
