"""Control groups for runs: memory and number of processes, in version 1 or 2, wherever this user may make groups.

A group is made as a child of the one that the agent itself is in, so nothing outside is touched. The warden puts
the run's first process into it, so that all descendants are in it, and reads afterwards whether a limit
was met. Where no group can be made (an ordinary user without delegation) `create` makes none, and the
limits of each process (`Limits`) are all there is; `hansa site doctor` says so.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sites.drivers.interface import Limits

MEMBERSHIP: Final = Path("/proc/self/cgroup")
MOUNTS: Final = Path("/proc/self/mounts")
# For each limit its file in version 1 and 2.
_FILES: Final = {
    "memory": ("memory.limit_in_bytes", "memory.max"),
    "pids": ("pids.max", "pids.max"),
}


@dataclass(frozen=True, slots=True)
class Controller:
    """One controller and the group of it that this process is in."""

    name: str
    version: int
    group: Path


def controllers(membership: Path = MEMBERSHIP, mounts: Path = MOUNTS) -> tuple[Controller, ...]:
    """Return the controllers in whose groups this process may make its own: of memory, of processes, or none."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
        mounted = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ()
    found = []
    for _, names, path in lines:
        for name in _FILES:
            if name in names.split(","):
                root = next((row[1] for row in mounted if row[2] == "cgroup" and name in row[3].split(",")), None)
                version = 1
            elif not names:
                root = next((row[1] for row in mounted if row[2] == "cgroup2"), None)
                version = 2
            else:
                continue
            group = None if root is None else Path(root) / path.lstrip("/")
            if group is not None and _serves(group, name, version):
                found.append(Controller(name, version, group))
    return tuple(found)


def create(name: str, limits: Limits, available: tuple[Controller, ...]) -> tuple[Path, ...]:
    """Make the groups of a run called `name` and return their folders; none for a limit that cannot be set."""
    wanted = {"memory": limits.memory_bytes, "pids": limits.processes_in_all}
    made: list[Path] = []
    for controller in available:
        value = wanted[controller.name]
        if value is None:
            continue
        group = controller.group / name
        with contextlib.suppress(OSError):
            group.mkdir(exist_ok=True)
            (group / _FILES[controller.name][controller.version - 1]).write_text(str(value))
            if controller.name == "memory":
                _forbid_swap(group, value, controller.version)
            if group not in made:
                made.append(group)
    return tuple(made)


def _serves(group: Path, name: str, version: int) -> bool:
    """Say whether children of `group` can be limited by this controller, and by us."""
    probe = group / "hansa-probe"
    try:
        handed_on = group / "cgroup.subtree_control"  # of version 2 alone
        if version != 1 and name not in handed_on.read_text().split():
            handed_on.write_text(f"+{name}")  # refused where the group has processes of its own
        probe.mkdir(exist_ok=True)
        served = (probe / _FILES[name][version - 1]).exists()
        probe.rmdir()
    except OSError:
        return False
    return served


def _forbid_swap(group: Path, value: int, version: int) -> None:
    file, content = ("memory.memsw.limit_in_bytes", value) if version == 1 else ("memory.swap.max", 0)
    with contextlib.suppress(OSError):
        (group / file).write_text(str(content))
