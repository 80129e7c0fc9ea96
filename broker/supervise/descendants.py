"""Find and end whatever a tree of processes has left behind, so that stopping leaves nothing.

A program may start children in groups and sessions of their own, where no signal to its group reaches them. Two
signs find them all the same, both read from /proc: their parents, as long as those live, and a mark in the
environment that children inherit, which outlives the parents. Without /proc (macOS) nothing is found.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final, NamedTuple

PROC: Final = Path("/proc")


class Process(NamedTuple):
    """One process, told from a later one with the same number by when it started (in clock ticks since boot)."""

    pid: int
    started_ticks: int


def descendants(root_pids: set[int]) -> set[Process]:
    """Return the processes below `root_pids`, without these themselves."""
    parents = {process: parent for process, parent in _table() if process.pid not in root_pids}
    found: set[Process] = set()
    reached = set(root_pids)
    while True:
        new = {process for process, parent in parents.items() if parent in reached and process not in found}
        if not new:
            return found
        found |= new
        reached |= {process.pid for process in new}


def marked(mark: str) -> set[Process]:
    """Return the processes, other than this one, whose environment holds the entry `mark` (NAME=value)."""
    entry = mark.encode()
    return {
        process
        for process, _ in _table()
        if process.pid != os.getpid() and entry in _read(process.pid, "environ").split(b"\0")
    }


def kill(processes: set[Process]) -> None:
    """End `processes` with SIGKILL; one that has ended, or whose number was given to another, is left alone."""
    for process in processes & {present for present, _ in _table()}:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or became another user's: not ours to end


def _table() -> list[tuple[Process, int]]:
    """Return every living process with its parent's number; zombies, which hold nothing, are left out."""
    rows = []
    for folder in PROC.glob("[0-9]*"):
        # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
        fields = _read(int(folder.name), "stat").rpartition(b")")[2].split()
        if len(fields) > 19 and fields[0] != b"Z":  # noqa: PLR2004 - proc(5): state is field 3, parent 4, start 22
            rows.append((Process(int(folder.name), int(fields[19])), int(fields[1])))
    return rows


def _read(pid: int, name: str) -> bytes:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""  # it ended while we looked, or is another user's
