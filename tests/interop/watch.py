"""Looks at one runtime without pause, as fluid would, and prints every change as a JSON line.

    watch.py FLUID_PATH SOCKET

Started before the agent and ended by closing its standard input. A line is
`{"at", "satisfied", "marks", "stacked", "broken"}`: `satisfied` is fluid's verdict, `marks` the
lines of the dummy filesystem's type, `stacked` whether a mount point below the runtime directory
occurs twice, `broken` what a task could not do although fluid was satisfied before and after:
connect to the socket, or read a complete config.
"""

import json
import os
import select
import socket
import sys
import time
from collections import Counter

import fluid
from harness import MARK_TYPE, Mount, mountinfo

fluid_path, socket_path = sys.argv[1:]
runtime_directory = os.path.dirname(fluid_path)
config_path = os.path.join(runtime_directory, "vineyard-config.yaml")


def look(table):
    """(satisfied, marks, stacked) of one mount table."""
    below = [m for m in map(Mount, table.splitlines()) if m.point.startswith(runtime_directory)]
    marks = sum(1 for m in below if m.fstype == MARK_TYPE)
    stacked = [point for point, count in Counter(m.point for m in below).items() if count > 1]
    return fluid.check_mount(table, fluid_path) is None, marks, stacked


def use():
    """What a task would stumble over now, or None."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(socket_path)
    except OSError as error:
        return f"connect: {error}"
    try:
        with open(config_path) as config:
            text = config.read()
    except OSError as error:
        return f"config: {error}"
    if "IPCSocket" not in text or not text.endswith("\n"):
        return f"torn config: {text!r}"
    return None


last, count = None, 0
while not select.select([sys.stdin], [], [], 0)[0]:
    satisfied, marks, stacked = look(mountinfo())
    broken = use() if satisfied else None
    if broken and not look(mountinfo())[0]:
        broken = None
    count += 1
    seen = (satisfied, marks, stacked, broken)
    if seen != last:
        last = seen
        print(json.dumps({"at": time.monotonic(), "satisfied": satisfied, "marks": marks,
                          "stacked": stacked, "broken": broken}), flush=True)
print(json.dumps({"looks": count}), flush=True)
