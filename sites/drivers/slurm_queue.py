"""Slurm's own commands, called from one thread of their own and bounded in time: submit, look, cancel.

slurmctld may be away for minutes, and then its commands hang; the agent's loop must not. So what the queue looked
like a second ago is answered at once, and a new look is under way. A job is known by its name, which holds for one run
of one attempt, so it is found again where the answer to its submission was lost.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sites.errors import DriverError, SlurmAwayError
from training.clock import Clock

COMMAND_TIMEOUT_S: Final = 10.0
LOOK_INTERVAL_S: Final = 1.0
# One call names all jobs looked at; a site has few attempts, and what has ended is forgotten.
NAMES_MAX: Final = 500
_FIELDS: Final = "%A|%T|%j|%S|%e|%r|%N"
WAITING: Final = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
# In these a job has, or may still have, processes.
LIVING: Final = WAITING | {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_REMEDIES: Final = (
    ("invalid partition", "set slurm.partition to one that `sinfo` shows"),
    ("invalid account", "set slurm.account to one that `sacctmgr show associations` shows for this user"),
    ("invalid generic resource", "set slurm.gres to what `sinfo -o %G` shows, such as gpu or gpu:h100"),
    (
        "requested node configuration is not available",
        "no node has that many GPUs and cores or that much memory; hold slurm.gpus_per_node, gres, extra_args against `sinfo -N -l`",
    ),
    ("unable to process configuration", "let SLURM_CONF name the cluster's slurm.conf, or install it as /etc/slurm"),
    ("unable to contact slurm controller", "start slurmctld, or mend the network to it; `scontrol ping` tries it"),
    ("munge", "start munged on this host with the cluster's key; `munge -n | unmunge` tries it"),
)
# What commands say while slurmctld is away or starts; the same command may do later.
_AWAY: Final = ("unable to contact slurm controller", "socket timed out", "connection refused", "zero bytes were trans")


@dataclass(frozen=True, slots=True)
class Job:
    """A job as Slurm sees it; times in UTC seconds, None where there is none yet."""

    job_id: str
    state: str
    started_s: int | None = None
    ended_s: int | None = None
    reason: str = ""
    nodes: str = ""

    @property
    def is_terminal(self) -> bool:
        """Whether Slurm says that nothing of the job lives."""
        return self.state not in LIVING


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the queue showed: of the `names` asked for, those `jobs` are known."""

    asked_s: float
    names: frozenset[str]
    jobs: dict[str, Job] = field(default_factory=dict)


class SlurmQueue:
    """The queue of the cluster that this host belongs to."""

    def __init__(self, clock: Clock) -> None:
        """Know the clock; nothing is asked yet."""
        self._clock = clock
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slurm")
        self._names: set[str] = set()
        self._look: Look | None = None
        self._looking: Future[None] | None = None
        self._tried_s = float("-inf")
        self.trouble = ""

    def submit(self, arguments: list[str], wanted: Callable[[], bool]) -> Future[str | None]:
        """Submit a job unless it is no longer `wanted` when its turn comes; the future holds its number or DriverError."""
        return self._thread.submit(self._submit, arguments, wanted)

    def cancel(self, name: str) -> None:
        """Ask Slurm to end the jobs of this name; nothing is said where it does not answer."""
        self._thread.submit(self._quietly, ["scancel", f"--name={name}"])

    def look(self, name: str) -> Look | None:
        """Return the newest look that asked for `name`, None where there was none; a newer one may be under way."""
        with self._lock:
            is_new = name not in self._names
            if len(self._names) < NAMES_MAX:
                self._names.add(name)
            now_s = self._clock.monotonic_s()
            is_due = now_s >= self._tried_s + LOOK_INTERVAL_S or is_new
            if is_due and (self._looking is None or self._looking.done()):
                self._tried_s = now_s
                self._looking = self._thread.submit(self._take_look, frozenset(self._names))
            return self._look if self._look is not None and name in self._look.names else None

    def forget(self, name: str) -> None:
        """Ask for `name` no longer."""
        with self._lock:
            self._names.discard(name)

    def _submit(self, arguments: list[str], wanted: Callable[[], bool]) -> str | None:
        if not wanted():
            return None
        told = run_slurm(["sbatch", "--parsable", "--no-requeue", *arguments])
        return told.strip().partition(";")[0]

    def _take_look(self, names: frozenset[str]) -> None:
        asked_s = self._clock.monotonic_s()
        try:
            told = run_slurm(
                ["squeue", "--noheader", "--states=all", f"--name={','.join(sorted(names))}", f"--format={_FIELDS}"]
            )
        except DriverError as error:
            self.trouble = str(error)
            return
        self.trouble = ""
        with self._lock:
            self._look = Look(asked_s, names, parse_jobs(told))

    def _quietly(self, argv: list[str]) -> None:
        try:
            run_slurm(argv)
        except DriverError as error:
            self.trouble = str(error)


def parse_jobs(told: str) -> dict[str, Job]:
    """Return the jobs in what squeue printed, by name; of several, the one that lives, else the newest."""
    found: dict[str, Job] = {}
    for line in told.splitlines():
        parts = line.split("|")
        if len(parts) != len(_FIELDS.split("|")):
            continue
        job = Job(parts[0], parts[1], _seconds(parts[3]), _seconds(parts[4]), parts[5], parts[6])
        other = found.get(parts[2])
        if other is None or (job.is_terminal, -int(job.job_id)) < (other.is_terminal, -int(other.job_id)):
            found[parts[2]] = job
    return found


def run_slurm(argv: list[str], timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Return what a command of Slurm's prints. Raises DriverError with its words and a remedy."""
    program = shutil.which(argv[0])
    if program is None:
        raise DriverError(
            f"{argv[0]} is not installed on this host; install Slurm's client commands (Debian: apt-get install "
            "slurm-client), or run the agent on a login node of the cluster"
        )
    kept = {name: os.environ[name] for name in ("HOME", "USER", "SLURM_CONF") if name in os.environ}
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            # Nothing of the agent's environment goes to a job; times are printed as seconds.
            env={"PATH": os.defpath, "SLURM_TIME_FORMAT": "%s", **kept},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise SlurmAwayError(
            f"{argv[0]} did not answer within {timeout_s:.0f} s; is slurmctld alive? `scontrol ping` tells"
        ) from None
    except OSError as error:
        raise DriverError(f"{argv[0]} cannot be started ({error}); reinstall Slurm's client commands") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-400:] or f"exit code {done.returncode}"
        kind = SlurmAwayError if any(words in said.lower() for words in _AWAY) else DriverError
        raise kind(f"{argv[0]} failed: {said}; {remedy_for(said)}")
    return done.stdout


def remedy_for(said: str) -> str:
    """Return what to do about an error of Slurm's."""
    return next((remedy for words, remedy in _REMEDIES if words in said.lower()), "see slurmctld's log")


def sbatch_script(python: str, node_program: Path, folder: Path) -> str:
    """Return the job's script: one warden on each node; when one dies without a word, Slurm ends the others."""
    quoted = " ".join(_quoted(word) for word in (python, "-I", "-S", str(node_program), str(folder)))
    return (
        "#!/bin/sh\n"
        "exec srun --mpi=none --input=none --ntasks-per-node=1 --kill-on-bad-exit=1 "
        f"${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} {quoted}\n"
    )


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _seconds(word: str) -> int | None:
    return int(word) if word.isdigit() else None
