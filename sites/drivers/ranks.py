"""Start the ranks of one host: `python -I -S ranks.py EXITS COUNT PROGRAM ARG…`. Standard library only.

What torchrun does for one host without restarts, by the same contract of environment variables, and without loading
torch once more before the first rank may begin: that took longer than all else between a lease and its first step.
Each rank's exit code and time go to EXITS/RANK. The first rank that fails ends the others; its exit code is the end's,
and the warden reads from EXITS which one it was. Between hosts torchrun stays (`slurm.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Final

ADDRESS: Final = "127.0.0.1"
# Between SIGTERM and SIGKILL for ranks whose fellow failed; the warden has a grace of its own for those above.
GRACE_S: Final = 10
TERMINATED: Final = 128 + signal.SIGTERM


def main(exits: Path, count: int, argv: list[str]) -> int:
    """Run `argv` as `count` ranks to their end; return 0, or the exit code of the first that failed (128 + signal)."""
    port = free_port()
    alive: dict[int, int] = {}
    stopped: list[int] = []

    def end_all(number: int, _frame: object = None) -> None:
        stopped.append(number)
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):  # waited for a moment ago
                os.kill(pid, signal.SIGKILL if number == signal.SIGALRM else signal.SIGTERM)
        signal.alarm(0 if number == signal.SIGALRM else GRACE_S)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, end_all)
    for rank in range(count):
        alive[os.posix_spawnp(argv[0], argv, environment(rank, count, port))] = rank
    first = 0
    while alive:
        pid, status = os.wait()
        if pid not in alive:
            continue
        code = os.waitstatus_to_exitcode(status)
        code = code if code >= 0 else 128 - code
        note(exits, alive.pop(pid), code)
        if code and not stopped:
            first = code
            end_all(signal.SIGTERM)
    return first or (TERMINATED if stopped else 0)


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables by which torch.distributed knows `rank` of `count`: torchrun's, of a gang on one host."""
    told = {
        **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), rank),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), count),
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": False,
    }
    # Several ranks that each start a thread for every core would only wait for each other.
    threads = {"OMP_NUM_THREADS": "1"} if count > 1 else {}
    return threads | dict(os.environ) | {name: str(value) for name, value in told.items()}


def free_port() -> int:
    """Return a port of the loopback device that is free now; in a sandbox without network nobody else is there."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def note(exits: Path, rank: int, code: int) -> None:
    """Write how and when a rank ended, whole or not at all."""
    path = exits / str(rank)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps([code, time.monotonic()]))
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
