"""Run a handful of named processes as one: started in order, watched, and ended in reverse order without a trace.

    with Supervisor(log_dir) as supervisor:
        supervisor.start(valkey)       # returns once its readiness probe is satisfied
        supervisor.start(api)
        while work():
            supervisor.check()         # raises if one has died, with the end of its log

Each child leads a process group of its own, so that Ctrl-C in the terminal reaches the supervisor alone, which then
ends the children properly. Should the supervisor itself be killed, `deathwatch` has the kernel tell them.
Used by the demo and by tests; the probes are in `readiness`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

from broker.supervise import deathwatch, descendants
from broker.supervise.errors import NotReadyError, ProcessDiedError, StartError
from broker.supervise.readiness import Probe
from training.clock import Clock, SystemClock

MARK: Final = "HANSA_SUPERVISOR"
LOG_TAIL_LINES: Final = 15
LOG_TAIL_BYTES: Final = 16_384
PROCESSES_MAX: Final = 64
POLL_S: Final = 0.02  # a probe costs well under a millisecond; a person notices nothing below 50 ms
ENDING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class ProcessSpec:
    """What to run. `env` adds to the supervisor's own environment; `ready` of None means ready once started."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    ready: Probe | None = None
    ready_timeout_s: float = 30.0
    stop_timeout_s: float = 10.0
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGTERM
    """What the kernel sends when the supervisor itself is killed."""


@dataclass(frozen=True)
class _Child:
    spec: ProcessSpec
    popen: subprocess.Popen[bytes]
    log_path: Path


class Supervisor:
    """Named processes with readiness, logs and an ordered end. Use it from the main thread, as a context manager."""

    def __init__(self, log_dir: Path, *, clock: Clock | None = None, end_together: bool = False) -> None:
        """Write each process's output to `log_dir`/NAME.log; the folder is made if it is missing.

        `end_together` asks all processes to end at once, where nothing of theirs is to be kept and haste counts.
        """
        self._end_together = end_together
        self._log_dir = log_dir
        self._clock = clock or SystemClock()
        self._children: dict[str, _Child] = {}
        self._mark = secrets.token_hex(16)
        self._impatient = False
        self._former_handlers: dict[signal.Signals, signal._HANDLER] = {}
        log_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        """Turn SIGTERM and SIGHUP into SystemExit, so that they too run through the ordered end."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._former_handlers[number] = signal.signal(number, _exit_on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End everything; what was raised inside goes on."""
        self.stop()
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers.clear()

    def start(self, spec: ProcessSpec) -> int:
        """Start `spec`, wait until it is ready, and return its process number.

        Raises `StartError` if it cannot run, `ProcessDiedError` if it or another process ends meanwhile, and
        `NotReadyError` after `ready_timeout_s`. What was started stays, and `stop` ends it.
        """
        self._assert_main_thread()
        assert spec.name not in self._children or self._ended(spec.name), f"{spec.name} is running already"
        assert len(self._children) < PROCESSES_MAX, "a supervisor is for the handful of processes of one market"
        # A Ctrl-C between fork and the entry in the table would leave a child that nobody knows of.
        with _signals_blocked():
            child = self._spawn(spec)
            self._children.pop(spec.name, None)  # a process started again moves to the end of the order
            self._children[spec.name] = child
        self._wait_until_ready(child)
        return child.popen.pid

    def check(self) -> None:
        """Raise `ProcessDiedError` for the first process that ended by itself, with the end of its log."""
        for child in self._children.values():
            status = child.popen.poll()
            if status is not None:
                raise ProcessDiedError(
                    f"{child.spec.name} ended by itself ({_status_in_words(status)}). {_log_tail(child.log_path)}"
                )

    def pid(self, name: str) -> int:
        """Return the process number of `name`, which must have been started."""
        return self._children[name].popen.pid

    def log_path(self, name: str) -> Path:
        """Return the file that holds what `name` printed."""
        return self._log_dir / f"{name}.log"

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send `number` to `name` itself; after SIGKILL wait for its end, so that `start` may follow."""
        child = self._children[name]
        child.popen.send_signal(number)
        if number == signal.SIGKILL:
            child.popen.wait()

    def stop(self) -> None:
        """End every process, the last started first, then whatever they have left behind. May be called twice.

        A Ctrl-C while this runs does not break it off; it cuts the patience with those still running.
        """
        self._assert_main_thread()
        self._impatient = False
        former = {number: signal.signal(number, self._lose_patience) for number in ENDING_SIGNALS}
        try:
            family = descendants.descendants({child.popen.pid for child in self._children.values()})
            if self._end_together:
                for child in self._children.values():
                    child.popen.send_signal(child.spec.stop_signal)
            asked_s = self._clock.monotonic_s()
            while self._children:
                _, child = self._children.popitem()
                family |= descendants.descendants({child.popen.pid})  # what it has started since
                self._end(child, asked_s if self._end_together else None)
            descendants.kill(family | descendants.marked(f"{MARK}={self._mark}"))
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _spawn(self, spec: ProcessSpec) -> _Child:
        log_path = self.log_path(spec.name)
        watch = (sys.executable, "-I", "-S", deathwatch.__file__, str(os.getpid()), str(int(spec.death_signal)))
        try:
            with log_path.open("ab") as log:
                popen = subprocess.Popen(
                    [*watch, *spec.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **spec.env, MARK: self._mark},
                    cwd=spec.cwd,
                    process_group=0,
                )
        except OSError as error:
            raise StartError(
                f"{spec.name} could not be started: {error.strerror or error}. "
                f"Look at its folder ({spec.cwd or Path.cwd()}), its log ({log_path}) and the machine's free memory."
            ) from error
        return _Child(spec, popen, log_path)

    def _wait_until_ready(self, child: _Child) -> None:
        if child.spec.ready is None:
            return
        deadline_s = self._clock.monotonic_s() + child.spec.ready_timeout_s
        while not child.spec.ready():
            self.check()
            if self._clock.monotonic_s() >= deadline_s:
                raise NotReadyError(
                    f"{child.spec.name} runs but was not ready within {child.spec.ready_timeout_s:g} s. "
                    f"{_log_tail(child.log_path)}"
                )
            time.sleep(POLL_S)
        self.check()  # a probe may have been answered by a stranger, such as a former process on the same port

    def _end(self, child: _Child, asked_s: float | None = None) -> None:
        """Ask the process, unless that was done at `asked_s`, wait, then force its whole group."""
        if child.popen.poll() is None:
            if asked_s is None:
                asked_s = self._clock.monotonic_s()
                child.popen.send_signal(child.spec.stop_signal)
            deadline_s = asked_s + child.spec.stop_timeout_s
            while child.popen.poll() is None and not self._impatient and self._clock.monotonic_s() < deadline_s:
                time.sleep(POLL_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.popen.pid, signal.SIGKILL)
        child.popen.wait()

    def _ended(self, name: str) -> bool:
        return self._children[name].popen.poll() is not None

    def _lose_patience(self, _number: int, _frame: FrameType | None) -> None:
        self._impatient = True

    def _assert_main_thread(self) -> None:
        # Only the main thread may set handlers; and the kernel's signal comes at the end of the *thread* that forked.
        assert threading.current_thread() is threading.main_thread(), "a Supervisor is used from the main thread"


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    former = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _status_in_words(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _log_tail(path: Path) -> str:
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
        lines = log.read().decode("utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    if not lines:
        return f"It printed nothing ({path})."
    return "\n".join([f"The end of its log ({path}):", *(f"    {line}" for line in lines)])
