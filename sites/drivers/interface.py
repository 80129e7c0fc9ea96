"""What the agent asks of a driver: to start a run, watch it, keep it alive and end it.

A *run* is one command of an attempt (its setup, its gateway, its ranks) with a folder of its own,
and the folder is the run's only handle: an agent that was killed finds its runs again by folder.
Every run ends by itself when its deadline on the monotonic clock passes, whether or not an agent
lives; the driver must see to that outside the agent's process. `tests/sites/drivers` holds the
suite that each driver passes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

# Above what shells use for themselves.
SECRET_FILE_FIRST: Final = 20


class RunPhase(enum.StrEnum):
    """Where a run stands. `lost`: its watcher died without a word; the driver has ended what was left."""

    ABSENT = "absent"
    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"


class EndCause(enum.StrEnum):
    """Why a run ended."""

    EXIT = "exit"  # its command ended by itself
    STOPPED = "stopped"  # the agent ended it
    EXPIRED = "expired"  # its deadline passed
    TIMEOUT = "timeout"  # it ran longer than it may
    NOT_STARTED = "not_started"  # its command could not be started
    LIMIT = "limit"  # it took more than one of its limits


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits; None leaves the operator's own limit.

    The first four bind each process of a run. `memory_bytes` and `processes_in_all` bind the run as a whole where
    control groups can be made. `disk_bytes` and `disk_files` bind what lies in `disk_folders`, looked at every
    few seconds.
    """

    open_files: int = 4096
    file_bytes: int = 64 * 1024**3
    address_space_bytes: int | None = None
    processes: int | None = None
    memory_bytes: int | None = None
    processes_in_all: int | None = None
    disk_bytes: int | None = None
    disk_files: int = 1_000_000
    disk_folders: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One command to run.

    `folder` is new and belongs to the run. `environment` is the whole environment. What is printed
    goes to `log_path` up to `log_bytes_max`, the rest is dropped with a notice, so that a chatty
    job neither fills the disk nor dies of it. `deadline_s` and `timeout_s` are monotonic seconds.
    `gpus` are those that the command uses, for drivers that ask a scheduler for them; `socket` is the
    Unix socket on the agent's host that it speaks to, for drivers that run it elsewhere. `secrets` are
    values by name that no file may ever hold: the command finds each in an open file (`secret_files`).
    """

    folder: Path
    argv: tuple[str, ...]
    cwd: Path
    environment: dict[str, str] = field(repr=False)
    log_path: Path
    deadline_s: float
    log_bytes_max: int = 16 * 1024 * 1024
    timeout_s: float | None = None
    grace_s: float = 5.0
    limits: Limits = field(default_factory=Limits)
    gpus: int = 0
    socket: Path | None = None
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def secret_files(names: Iterable[str]) -> dict[str, int]:
    """Return the number of the open file in which a run's command finds each secret."""
    return {name: SECRET_FILE_FIRST + index for index, name in enumerate(sorted(names))}


@dataclass(frozen=True, slots=True)
class Placement:
    """What ranks find where a driver runs them.

    `gpu_ids` are the devices that a sandbox shows them, by number; `network` says that they reach each other over
    the host's network, since they are on several hosts; `ranks_socket` is where they find their gateway.
    """

    gpu_ids: tuple[str, ...]
    network: bool
    ranks_socket: Path


@dataclass(frozen=True, slots=True)
class RunState:
    """What is known of a run.

    `running_s` is how long its command has run so far or ran in all, on the watcher's clock.
    `exit_code` is negative for a signal, as in subprocess; `signal` by the driver itself is told
    apart by `cause`. `limit` names the limit of the whole run that was met, such as `memory`.
    """

    phase: RunPhase
    cause: EndCause | None = None
    exit_code: int | None = None
    detail: str = ""
    running_s: float = 0.0
    limit: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether none of the run's processes lives."""
        return self.phase in (RunPhase.ABSENT, RunPhase.ENDED, RunPhase.LOST)


class Driver(Protocol):
    """One way to run commands. Every call returns at once and may be repeated."""

    def start(self, run: Run) -> None:
        """Start `run` unless its folder shows that it was started already. Raises DriverError."""
        ...

    def poll(self, folder: Path) -> RunState:
        """Return the state of the run in `folder`."""
        ...

    def adopt(self, folder: Path) -> RunState:
        """Return the state of a run that a former agent started, and end what outlived its watcher."""
        ...

    def renew(self, folder: Path, deadline_s: float) -> None:
        """Let the run in `folder` live until `deadline_s` on the monotonic clock."""
        ...

    def stop(self, folder: Path) -> None:
        """Ask for the end of the run in `folder`; `poll` tells when its processes are dead."""
        ...

    def placement(self, gpu_ids: tuple[str, ...], gateway_socket: Path) -> Placement:
        """Return what the ranks of a lease of `gpu_ids` will find, whose gateway listens at `gateway_socket`."""
        ...

    def ranks_argv(self, gpus: int, words: list[str], folder: Path) -> tuple[str, ...]:
        """Return the command that starts `gpus` ranks of the script and arguments in `words`."""
        ...
