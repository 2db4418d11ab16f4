"""Fluid's own checks, as values: what its CSI plugin would say about a mount table.

The rules are those of fluid's `check_mount.sh` and `check_bind_mounts.sh`: fixed strings and one
basic regular expression, applied to whole lines of mountinfo, octal escapes left as they are.
"""

import os
import re


def check_mount(table, fluid_path, mount_type="vineyard-fuse", sub_path=""):
    """The first stage that fails, as the script names it, or None where fluid is satisfied."""
    lines = mark_lines(table, fluid_path, mount_type)
    if not lines:
        return "timed out waiting for the mount"
    try:
        os.stat(fluid_path)
    except OSError:
        return "timed out stating the mount"
    if not os.path.exists(f"{fluid_path}/{sub_path}"):
        return "timed out waiting for the sub path"
    return None


def mark_lines(table, fluid_path, mount_type="vineyard-fuse"):
    """The lines that pass stage one."""
    return [line for line in table.splitlines() if str(fluid_path) in line and mount_type in line]


def check_bind_mounts(table, volume_id):
    """Whether fluid believes that a pod uses the volume."""
    pattern = re.compile(r"pods/.*/volumes/kubernetes\.io~csi/" + volume_id + "/mount")
    return any(pattern.search(line) for line in table.splitlines())
