"""Vineyard servers to talk to: our shard alone, and the real vineyardd from the official wheel."""

import signal
import subprocess
import sysconfig
from pathlib import Path

from harness import VINELET, answers, eventually, free_port

VINEYARDD = Path(sysconfig.get_paths()["purelib"]) / "vineyard" / "bdist" / "vineyardd"
PROGRAMS = {"vinelet": [VINELET, "shard"], "vineyardd": [str(VINEYARDD)]}


class Server:
    """One store that runs alone, with vineyardd's flags."""

    def __init__(self, kind, directory, size="64Mi", flags=()):
        self.kind = kind
        self.socket = directory / f"{kind}.sock"
        self.port = free_port()
        self.log = directory / f"{kind}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAMS[kind], "--socket", str(self.socket), "--size", size,
                 "--rpc_socket_port", str(self.port), "--meta", "local", *flags],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )
        eventually(self._is_up, what=f"{kind} answers")

    def _is_up(self):
        assert self.process.poll() is None, f"{self.kind} ended: {self.log.read_text()[-2000:]}"
        return answers(self.socket)

    def connect(self):
        """A connection of its own, whatever the client has cached."""
        import vineyard

        return vineyard.connect(str(self.socket)).fork()

    def stop(self):
        if self.process.poll() is None:
            # vineyardd now and then does not end on SIGTERM; ours has to.
            self.process.send_signal(signal.SIGTERM if self.kind == "vinelet" else signal.SIGKILL)
        status = self.process.wait(10)
        assert self.kind != "vinelet" or status == 0, f"ended with {status}: {self.log.read_text()[-2000:]}"
