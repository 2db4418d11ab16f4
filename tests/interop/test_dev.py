"""`vinelet dev`: everything on this machine with one command, and nothing after Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess

import pytest

from harness import Task, VINELET, bound_sockets, descendants, eventually, free_port, is_alive, mounts, processes


class Dev:
    def __init__(self, directory, log, program=(VINELET,)):
        self.directory = directory
        self.log = open(log, "w+")
        self.process = subprocess.Popen(
            [*program, "dev", "--dir", str(directory), "--size", "64Mi", "--rpc-port", str(free_port())],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True, cwd="/")

        def written():
            assert self.process.poll() is None, f"it ended: {self.output()}"
            path = directory / "dev.json"
            facts = json.loads(path.read_text()) if path.exists() else {}
            # One that was killed leaves its file.
            return facts if facts.get("pid") == self.process.pid else None

        try:
            self.facts = eventually(written, 20, "dev.json")
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"{error}\n{self.output()}") from None

    def output(self):
        self.log.flush()
        return open(self.log.name).read()[-4000:]

    def interrupt(self):
        """Ctrl-C: SIGINT for the whole foreground group."""
        tree = {self.process.pid, *descendants(self.process.pid)}
        os.killpg(self.process.pid, signal.SIGINT)
        status = self.process.wait(15)
        eventually(lambda: not any(is_alive(pid) for pid in tree), 5, "no process is left")
        return status

    def kill(self):
        for pid in {self.process.pid, *descendants(self.process.pid)}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait(10)


@pytest.fixture
def start(scratch):
    started = []

    def begin(name="dev", **options):
        dev = Dev(scratch / name, scratch / f"{os.path.basename(name)}.log", **options)
        started.append(dev)
        return dev

    yield begin
    for dev in started:
        if dev.process.poll() is None:
            dev.kill()
    for mount in reversed(mounts(scratch)):
        subprocess.run(["umount", "-l", mount.point], timeout=20)


USE = "import vineyard, numpy; c = vineyard.connect(*where); result = int(c.get(c.put(numpy.arange(1000))).sum())"


def test_it_says_what_is_where(start):
    dev = start()
    facts = dev.facts
    assert {"volume", "ipc_socket", "rpc_endpoint", "csi_socket", "fluid_path", "pid"} <= set(facts)
    assert facts["pid"] == dev.process.pid
    for key in ("volume", "ipc_socket", "csi_socket", "fluid_path"):
        assert os.path.exists(facts[key]), key
    assert facts["fluid_path"] == f"{dev.directory}/runtime-mnt/vineyard/default/vineyard/vineyard-fuse"
    assert facts["volume"].startswith(f"{dev.directory}/kubelet/pods/")
    assert dev.output().count("import vineyard") >= 1, "a ready-to-paste line"
    assert dev.interrupt() == 0


def test_a_client_works_through_the_socket_and_through_the_volume(start):
    dev = start()
    with Task() as task:
        assert task.run(USE, where=[dev.facts["ipc_socket"]]) == 499500
    with Task(environment={"VINEYARD_CONFIG": dev.facts["volume"]}) as task:
        assert task.run(USE, where=[]) == 499500
    assert dev.interrupt() == 0


def test_the_printed_python_line_works(start):
    dev = start()
    (line, *_) = [l.strip() for l in dev.output().splitlines() if "import vineyard" in l]
    code = line[line.index("import vineyard"):].rstrip("'\"")
    with Task() as task:
        task.run(code)
    dev.interrupt()


def test_after_ctrl_c_no_mount_and_no_process_is_left(start, scratch):
    before = set(processes())
    dev = start()
    assert mounts(scratch) != []
    dev.interrupt()
    assert mounts(scratch) == []
    assert bound_sockets(scratch) == []
    assert set(processes()) - before == set()


def test_it_starts_again_in_the_same_directory(start):
    for _ in range(2):
        dev = start()
        assert dev.interrupt() == 0


def test_it_starts_over_the_remains_of_a_killed_one(start, scratch):
    start().kill()
    dev = start()
    with Task() as task:
        assert task.run(USE, where=[dev.facts["ipc_socket"]]) == 499500
    assert dev.interrupt() == 0
    assert mounts(scratch) == []


def test_two_run_side_by_side(start):
    one, two = start("one"), start("two")
    for dev in (one, two):
        with Task() as task:
            assert task.run(USE, where=[dev.facts["ipc_socket"]]) == 499500
    assert (one.interrupt(), two.interrupt()) == (0, 0)


def test_fluid_is_satisfied_by_it(start):
    import fluid
    from harness import mountinfo

    dev = start()
    assert fluid.check_mount(mountinfo(), dev.facts["fluid_path"]) is None
    dev.interrupt()


@pytest.fixture
def home(scratch):
    """A directory of a user without privileges, and a /dev/fuse open to all, as distributions have it."""
    home = scratch / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    device = scratch / "fuse"
    os.mknod(device, 0o666 | 0o020000, os.makedev(10, 229))
    os.chmod(device, 0o666)
    subprocess.run(["mount", "--bind", device, "/dev/fuse"], check=True)
    yield home
    subprocess.run(["umount", "-l", "/dev/fuse"], check=True)


def test_it_needs_no_root(start, home, scratch):
    # The binary may lie where another user cannot look: it is started from a copy.
    copy = scratch / "vinelet"
    shutil.copy(VINELET, copy)
    copy.chmod(0o755)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--"]
    dev = start("home/dev", program=[*user, str(copy)])
    with Task() as task:
        assert task.run(USE, where=[dev.facts["ipc_socket"]]) == 499500
    assert dev.interrupt() == 0
    assert [m for m in mounts(scratch) if m.point != "/dev/fuse"] == []
