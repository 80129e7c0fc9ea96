"""The process driver: runs are processes of this host, each under a warden of its own.

The agent never is the parent that matters: the warden (warden.py) holds the run, its folder holds
the truth, and a new agent reads both. What a run may see is decided by whoever made its command
(`sites.sandbox`); what it may take is limited here, per process and, by control groups, as a whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sites.drivers import cgroups, ranks, warden
from sites.drivers.interface import EndCause, Placement, Run, RunPhase, RunState, secret_files
from sites.errors import DriverError
from training.clock import Clock

# Stands in the environment of every process of a run, so that those which outlive a killed warden are found.
RUN_MARK: Final = "HANSA_RUN"
# A warden says who it is within milliseconds of its start; on a loaded host give it this long.
_WARDEN_START_S: Final = 20.0


class ProcessDriver:
    """Runs on this host."""

    def __init__(self, python: str, clock: Clock) -> None:
        """Start ranks with the interpreter `python`."""
        self._python = python
        self._clock = clock
        self._wardens: dict[Path, tuple[subprocess.Popen[bytes], float]] = {}
        self._controllers = cgroups.controllers()

    def start(self, run: Run) -> None:
        """Start `run` unless its folder shows that it was started already. Raises DriverError."""
        if not self.poll(run.folder).is_over or (run.folder / "status.json").exists():
            return
        try:
            (run.folder / "exits").mkdir(parents=True, exist_ok=True)
            self.renew(run.folder, run.deadline_s)
            groups = cgroups.create(_group_name(run.folder), run.limits, self._controllers)
            write_document(run.folder / "run.json", _document(run, groups))
            with (run.folder / "warden.log").open("ab") as log, _handed_over(run.secrets) as secrets:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", warden.__file__, str(run.folder)],
                    stdin=secrets,
                    stdout=log,
                    stderr=log,
                    env={"PATH": os.defpath},
                    start_new_session=True,  # a Ctrl-C or hang-up at the agent's terminal is not the run's affair
                )
        except OSError as error:
            raise DriverError(f"the run in {run.folder} cannot be started ({error}); check disk and memory") from error
        self._wardens[run.folder] = (process, self._clock.monotonic_s())

    def poll(self, folder: Path) -> RunState:
        """Return the state of the run in `folder`."""
        own = self._wardens.get(folder)
        own_lives = own is not None and own[0].poll() is None
        watcher = read_document(folder / "warden.json")
        watcher_lives = watcher is not None and _lives(watcher, self._clock.era())
        # Read after the watcher was seen dead or alive: it writes its last word before it goes.
        status = read_document(folder / "status.json")
        if status is not None and not watcher_lives:
            self._wardens.pop(folder, None)
            return _ended(status)
        if watcher is not None and watcher_lives:
            started_s = watcher.get("started_s")
            if started_s is None:
                return RunState(RunPhase.STARTING)
            return RunState(RunPhase.RUNNING, running_s=max(0.0, self._clock.monotonic_s() - started_s))
        if own is not None and own_lives and self._clock.monotonic_s() - own[1] < _WARDEN_START_S:
            return RunState(RunPhase.STARTING)
        if watcher is not None or own is not None:
            return self._lost(folder)
        return RunState(RunPhase.ABSENT)

    def adopt(self, folder: Path) -> RunState:
        """Return the state of a run that a former agent started, and end what outlived its watcher."""
        return self.poll(folder)

    def renew(self, folder: Path, deadline_s: float) -> None:
        """Let the run in `folder` live until `deadline_s` on the monotonic clock."""
        write_document(folder / "liveness", {"era": self._clock.era(), "deadline_s": deadline_s})

    def stop(self, folder: Path) -> None:
        """Ask for the end of the run in `folder`; `poll` tells when its processes are dead."""
        watcher = read_document(folder / "warden.json")
        if watcher is not None and _lives(watcher, self._clock.era()):
            os.kill(watcher["pid"], signal.SIGTERM)
        elif folder.exists() and not (folder / "status.json").exists():
            # A warden that has not said who it is yet reads this before it starts anything.
            self.renew(folder, 0.0)

    def placement(self, gpu_ids: tuple[str, ...], gateway_socket: Path) -> Placement:
        """Return the lease's own GPUs and the gateway's own socket: all is on this host."""
        return Placement(gpu_ids, network=False, ranks_socket=gateway_socket)

    def ranks_argv(self, gpus: int, words: list[str], folder: Path) -> tuple[str, ...]:
        """Return the command for `gpus` ranks of the script and arguments in `words`."""
        return (
            *(self._python, "-I", "-S", ranks.__file__, str(folder / "exits"), str(gpus)),
            *(self._python, "-P", "-m", "training.launch", *words),
        )

    def _lost(self, folder: Path) -> RunState:
        """End what is left of a run whose watcher is gone, and say so."""
        _kill_marked(f"{RUN_MARK}={folder}")
        if _marked(f"{RUN_MARK}={folder}"):
            return RunState(RunPhase.RUNNING)
        self._wardens.pop(folder, None)
        return RunState(RunPhase.LOST, detail="the watcher of this run was killed; see warden.log in its folder")


@contextmanager
def _handed_over(secrets: Mapping[str, bytes]) -> Iterator[int]:
    """Yield what the warden gets as its standard input: the secrets, in memory that no name leads to, or nothing."""
    if not secrets:
        yield subprocess.DEVNULL
        return
    memory = os.memfd_create("hansa", os.MFD_CLOEXEC)
    with os.fdopen(memory, "wb", buffering=0) as stream:
        stream.write(json.dumps({name: value.decode() for name, value in secrets.items()}).encode())
        stream.seek(0)
        yield memory


def _group_name(folder: Path) -> str:
    return f"hansa-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}"


def _document(run: Run, groups: tuple[Path, ...]) -> dict[str, Any]:
    limits = dataclasses.asdict(run.limits) | {"disk_folders": [str(path) for path in run.limits.disk_folders]}
    return {
        "argv": list(run.argv),
        "cwd": str(run.cwd),
        "environment": {**run.environment, RUN_MARK: str(run.folder)},
        "log_path": str(run.log_path),
        "log_bytes_max": run.log_bytes_max,
        "timeout_s": run.timeout_s,
        "grace_s": run.grace_s,
        "limits": limits,
        "groups": [str(group) for group in groups],
        "secrets": secret_files(run.secrets),
    }


def _ended(status: dict[str, Any]) -> RunState:
    return RunState(
        RunPhase.ENDED,
        cause=EndCause(status["cause"]),
        exit_code=status["exit_code"],
        detail=status["detail"],
        running_s=status["running_s"],
        limit=status.get("limit"),
    )


def _lives(watcher: dict[str, Any], era: str) -> bool:
    """Return whether the very process that wrote `watcher` lives: numbers are given again, start times are not."""
    return bool(watcher["era"] == era and warden.started_ticks(watcher["pid"]) == watcher["started_ticks"])


def _marked(mark: str) -> set[int]:
    entry = mark.encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended while we looked, or is another user's
        if entry in environment and warden.started_ticks(int(folder.name)) is not None:
            found.add(int(folder.name))
    return found


def _kill_marked(mark: str) -> None:
    for pid in _marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def read_document(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None where there is none."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Put a JSON object into a private file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(document))
    partial.replace(path)
