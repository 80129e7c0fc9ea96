"""Watch one run to its end: `python -I -S warden.py FOLDER`. Stands alone: the standard library only.

The warden is what makes a lease's liveness true. It is a process of its own, so it outlives a
killed agent, and it ends the run when the deadline in FOLDER/liveness passes, when it gets
SIGTERM, or when the command has ended by itself. Ending means every descendant: the warden is
their *subreaper* (Linux gives it the orphans, double-forked daemons too), so it can wait until
none is left. Only then it writes status.json.

    FOLDER/run.json       what to run (written by sites.drivers.process, or on a cluster's node by node.py)
    FOLDER/liveness       {"era": boot id, "deadline_s": CLOCK_MONOTONIC}, replaced by the agent; run.json may name
                          another path. {"stop": true} in it asks for the end, as SIGTERM does. On a host that is not
                          the agent's {"remaining_s", "until_ms"} count, see `deadline_s`
    FOLDER/lock           held by the one warden of this folder
    FOLDER/warden.json    who watches, and since when the command runs
    FOLDER/exits/RANK     how each rank ended (written by rank.py)
    FOLDER/status.json    how it ended: every process is dead

Secrets come by standard input and are handed on as open files that lie in memory alone; run.json says under which numbers.

Where the agent could make control groups, the command is put into them, and what met a limit is
read from them at the end. What the run writes is measured every few seconds.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # both from <linux/prctl.h>
PR_SET_CHILD_SUBREAPER = 36
TICK_S = 0.1
# At expiry the broker is about to lend the GPUs again: its own margin is at least twice this.
GRACE_EXPIRED_S = 2.0
CHUNK = 65_536
# Walking a folder of many files costs time; a disk is filled in seconds at best.
DISK_INTERVAL_S = 3.0


def main(folder: Path) -> None:
    """Run the command in `folder` and watch it; return when nothing of it lives."""
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # another warden has this folder
    if (folder / "status.json").exists():
        return
    Warden(folder).watch()


class Warden:
    """One run being watched."""

    def __init__(self, folder: Path) -> None:
        """Read the run; nothing is started."""
        self.folder = folder
        self.run: dict[str, Any] = json.loads((folder / "run.json").read_text())
        # Read at once: whatever comes next, they are in no pipe and no file.
        self.secrets: dict[str, str] = json.loads(sys.stdin.buffer.read()) if self.run.get("secrets") else {}
        self.log = Log(Path(self.run["log_path"]), self.run["log_bytes_max"])
        self.liveness = Path(self.run.get("liveness", folder / "liveness"))
        self.exits = Path(self.run.get("exits", folder / "exits"))
        self.seen: tuple[dict[str, Any], float] | None = None
        self.asked = False
        self.told = False
        self.limit: str | None = None
        self.measured_s = 0.0
        self.child = 0
        self.wait_status: int | None = None
        self.started_s: float | None = None

    def watch(self) -> None:
        """Start the command, wait for a reason to end, end all, and say how it was."""
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._publish()
        if self._expired():
            self._finish("expired", "the lease's liveness was over before the start")
            return
        if self.told:
            self._finish("stopped", "the agent ended it before the start")
            return
        try:
            output = self._start()
        except (OSError, subprocess.SubprocessError) as error:
            self._finish("not_started", f"{self.run['argv'][0]} cannot be started: {error}")
            return
        self._publish()
        cause = self._until_over(output)
        self._end_all(cause, output)
        self.log.take(output)
        self.log.close()
        self.limit = self.limit or self._limit_met()
        self._finish(cause, _LIMIT_WORDS.get(self.limit or "", ""))

    def _start(self) -> int:
        files = self._secret_files()
        try:
            process = subprocess.Popen(
                self.run["argv"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self.run["cwd"],
                env=self.run["environment"],
                start_new_session=True,
                pass_fds=files,
                preexec_fn=self._limit,  # noqa: PLW1509 - safe here: the warden has one thread
            )
        finally:
            for number in files:
                os.close(number)
        assert process.stdout is not None
        self.child = process.pid
        self.started_s = time.monotonic()
        output = os.dup(process.stdout.fileno())
        process.stdout.close()
        process.returncode = 0  # this class reaps by itself, orphans included
        os.set_blocking(output, False)
        return output

    def _secret_files(self) -> list[int]:
        """Put each secret into an open file under the number that the command knows, and forget it."""
        for name, number in self.run.get("secrets", {}).items():
            memory = os.memfd_create("hansa")
            os.write(memory, self.secrets.pop(name).encode())
            os.lseek(memory, 0, os.SEEK_SET)
            os.dup2(memory, number)
            os.close(memory)
        return list(self.run.get("secrets", {}).values())

    def _limit(self) -> None:
        """Bind the command to the warden's life and to its limits. Runs in the child, before exec."""
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for group in self.run["groups"]:
            Path(group, "cgroup.procs").write_text("0")  # the writer itself
        limits = self.run["limits"]
        wanted = [
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, limits["open_files"]),
            (resource.RLIMIT_FSIZE, limits["file_bytes"]),
            (resource.RLIMIT_AS, limits["address_space_bytes"]),
            (resource.RLIMIT_NPROC, limits["processes"]),
        ]
        for kind, value in wanted:
            if value is not None:
                hard = resource.getrlimit(kind)[1]
                bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(kind, (bounded, bounded))

    def _until_over(self, output: int) -> str:
        """Return why the run is over; the command may still live."""
        timeout_s = self.run["timeout_s"]
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while True:
                if selector.get_map():
                    readable = selector.select(TICK_S)
                else:
                    time.sleep(TICK_S)  # the command has closed its output and goes on
                    readable = []
                if readable and not self.log.take(output):
                    selector.unregister(output)
                self._reap()
                if self.wait_status is not None:
                    return "exit"
                if self._expired():
                    return "expired"
                if self.asked or self.told:
                    return "stopped"
                if timeout_s is not None and time.monotonic() - (self.started_s or 0) > timeout_s:
                    return "timeout"
                if self._fills_the_disk():
                    self.limit = "disk"
                    return "limit"

    def _end_all(self, cause: str, output: int) -> None:
        """End every descendant: asked first if the command still runs, then forced, until none is left."""
        if cause != "exit":
            grace_s = GRACE_EXPIRED_S if cause == "expired" else self.run["grace_s"]
            give_up_s = time.monotonic() + grace_s
            _signal_all(descendants(), signal.SIGTERM)
            while descendants() and time.monotonic() < give_up_s:
                self.log.take(output)
                self._reap()
                time.sleep(TICK_S / 4)
        while left := descendants():
            # Stopped first: what is stopped cannot fork its way out between the listing and the kill.
            _signal_all(left, signal.SIGSTOP)
            _signal_all(descendants(), signal.SIGKILL)
            self.log.take(output)
            self._reap()
            time.sleep(TICK_S / 10)
        self._reap()

    def _fills_the_disk(self) -> bool:
        """Look every few seconds at what the run has written; its own folders alone count."""
        limits = self.run["limits"]
        now_s = time.monotonic()
        if limits["disk_bytes"] is None or now_s < self.measured_s + DISK_INTERVAL_S:
            return False
        size, files = taken([Path(folder) for folder in limits["disk_folders"]], limits["disk_files"])
        self.measured_s = time.monotonic() + 10 * (time.monotonic() - now_s)  # a slow walk is made more seldom
        return bool(size > limits["disk_bytes"] or files > limits["disk_files"])

    def _limit_met(self) -> str | None:
        """Return the limit of the whole run that its groups counted, and remove them."""
        met = None
        for group in map(Path, self.run["groups"]):
            for file, key, name in _COUNTERS:
                if _counter(group / file, key):
                    met = met or name
            try:
                group.rmdir()
            except OSError:
                continue  # the kernel still holds a dying process in it; an empty group costs nothing
        return met

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.wait_status = status

    def _expired(self) -> bool:
        try:
            liveness = json.loads(self.liveness.read_text())
            self.told = self.told or bool(liveness.get("stop"))
            if liveness["era"] == _era():
                return bool(time.monotonic() >= liveness["deadline_s"])
            if self.seen is None or self.seen[0] != liveness:
                self.seen = (liveness, deadline_s(liveness, time.monotonic(), time.time_ns() // 1_000_000))
            return time.monotonic() >= self.seen[1]
        except (OSError, ValueError, KeyError, TypeError):
            return True  # whoever takes the file away takes the right to run away

    def _ask(self, _number: int, _frame: object) -> None:
        self.asked = True

    def _publish(self) -> None:
        _write(
            self.folder / "warden.json",
            {
                "pid": os.getpid(),
                "started_ticks": started_ticks(os.getpid()),
                "era": _era(),
                "started_s": self.started_s,
                "host": socket.gethostname(),
                # UTC, for readers on another host: when this was written, and since when the command runs.
                "written_ms": time.time_ns() // 1_000_000,
                "started_ms": None if self.started_s is None else _utc_ms(self.started_s),
            },
        )

    def _finish(self, cause: str, detail: str) -> None:
        stopped_s = time.monotonic()
        code = None if self.wait_status is None else os.waitstatus_to_exitcode(self.wait_status)
        first = self._first_failure() if code else None
        _write(
            self.folder / "status.json",
            {
                "cause": cause,
                "exit_code": first if first is not None else code,
                "detail": detail,
                "limit": self.limit,
                "running_s": 0.0 if self.started_s is None else stopped_s - self.started_s,
                "asked": self.asked,
                "ended_ms": _utc_ms(stopped_s),
            },
        )

    def _first_failure(self) -> int | None:
        """Return the exit code of the rank that failed first; torchrun's own is 1 whatever happened."""
        exits = []
        for path in sorted(self.exits.glob("[0-9]*"))[:100_000]:
            try:
                exit_code, when_s = json.loads(path.read_text())
                exits.append((float(when_s), int(exit_code)))
            except (OSError, ValueError, TypeError):
                continue  # a rank shares our user and may have written anything
        failed = sorted(entry for entry in exits if entry[1] != 0)
        return failed[0][1] if failed else None


class Log:
    """What the command printed, up to a limit."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        """Append to the file at `path`."""
        self._stream = path.open("ab", buffering=0)
        self._left = bytes_max - self._stream.tell()
        self._full = False

    def take(self, output: int) -> bool:
        """Move what can be read now from `output` into the log; False at its end."""
        for _ in range(64):  # bounded, so that a flood cannot keep the warden from its watch
            try:
                chunk = os.read(output, CHUNK)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self._keep(chunk)
        return True

    def _keep(self, chunk: bytes) -> None:
        if self._full:
            return
        self._stream.write(chunk[: max(0, self._left)])
        self._left -= len(chunk)
        if self._left < 0:
            self._full = True
            self._stream.write(b"\n[hansa] this log is full; what follows is not kept\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


# Where a control group counts that a limit was met: of version 1 and of version 2.
_COUNTERS = (
    ("memory.oom_control", "oom_kill", "memory"),
    ("memory.events", "oom_kill", "memory"),
    ("pids.events", "max", "processes"),
)
_LIMIT_WORDS = {
    "memory": "the run needed more memory than this site grants a lease of its size",
    "processes": "the run started more processes and threads than this site allows",
    "disk": "the run wrote more bytes or more files than this site allows",
}


def deadline_s(liveness: dict[str, Any], now_s: float, now_ms: int) -> float:
    """Return until when, on this host's monotonic clock, a liveness of another host lets a run live.

    It is seen for the first time at `now_s`, `now_ms`. Two bounds hold at once: the time that was left when it was
    written, counted from now, needs no clocks that agree, but does not know how long the file lay unread; UTC does,
    where the hosts' clocks agree. The earlier one counts, so a wrong clock ends a run too early, never too late.
    """
    return now_s + min(float(liveness["remaining_s"]), (float(liveness["until_ms"]) - now_ms) / 1000)


def _utc_ms(when_s: float) -> int:
    """Return an instant of this host's monotonic clock in UTC, as the clocks stand now."""
    return round(time.time_ns() / 1e6 - (time.monotonic() - when_s) * 1000)


def _counter(path: Path, key: str) -> int:
    try:
        fields = dict(line.split()[:2] for line in path.read_text().splitlines())
        return int(fields.get(key, "0"))
    except (OSError, ValueError):
        return 0


def taken(folders: list[Path], files_max: int) -> tuple[int, int]:
    """Return the bytes that files below `folders` take on disk, and their number, counted up to beyond `files_max`."""
    size = files = 0
    left = [str(folder) for folder in folders]
    while left and files <= files_max:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    files += 1
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue  # it was removed while we looked
    return size, files


def descendants() -> set[int]:
    """Return the living processes below this one; zombies, which hold nothing, are left out."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(entry.name))) and fields[0] not in (b"Z", b"X"):
            parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    reached = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in reached and pid not in reached}:
        found |= new
        reached |= new
    return found


def started_ticks(pid: int) -> int | None:
    """Return when process `pid` started, in clock ticks since boot: with the number it names a process for good."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else None


def _stat(pid: int) -> list[bytes] | None:
    try:
        # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None


def _signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _era() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _write(path: Path, document: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document))
    partial.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
