"""The whole journey as a person sees it: `hansa demo` as a process, to its end and through Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

# Alone on two cores it takes some 80 s; a busy machine may take three times as long.
DEMO_LIMIT_S = 400
ENDING_LIMIT_S = 60
COMMAND = (sys.executable, "-P", "-m", "broker.cli.main", "demo")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for the demo's own folder, with a path short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="hj-") as folder:
        yield Path(folder)


def leftovers(scratch: Path) -> list[str]:
    """The command lines of processes that know the demo's folder, by argument or environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if int(entry.name) != os.getpid() and state != "Z" and f"{scratch}/hansa-demo".encode() in words:
            found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def demo_folder(scratch: Path) -> Path:
    """Where the demo lives: in the scratch folder, else the checks of what it leaves would check nothing."""
    return next(scratch.glob("hansa-demo-*"))


def start(scratch: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        COMMAND, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def until_its_end(demo: subprocess.Popen[str]) -> str:
    """Return all that a demo prints; where it does not end in time, fail with what it had printed."""
    try:
        return demo.communicate(timeout=DEMO_LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        demo.send_signal(signal.SIGINT)
        printed, _ = demo.communicate(timeout=ENDING_LIMIT_S)
        pytest.fail(f"the demo did not end within {DEMO_LIMIT_S} s; it said:\n{printed}")


@pytest.mark.timeout(DEMO_LIMIT_S + 30)
def test_demo_trains_across_sites_pays_everyone_and_leaves_nothing(scratch: Path) -> None:
    demo = start(scratch)
    printed = until_its_end(demo)
    assert demo.returncode == 0, printed
    assert "CPU slots stand in for GPUs" in printed
    assert re.search(r"round 1: bergen/cpu-slot \S+ \(ask 0\.6", printed), printed
    jobs = {line.split()[0]: line for line in printed.splitlines() if re.match(r"(cog|holk|knarr)\s", line)}
    assert set(jobs) == {"cog", "holk", "knarr"}, printed
    for line in jobs.values():
        assert " finished " in line
        before, after = map(float, re.search(r"(\d\.\d+) → (\d\.\d+)", line).groups())
        assert after < before - 1, line
    assert re.search(r"(\w+) 2 \+ (\w+) 2", jobs["cog"]), "four slots are on two sites, two ranks each"
    sent, plain = re.findall(r"([\d.]+) (KiB|MiB)", jobs["cog"])
    units = {"KiB": 1, "MiB": 1024}
    assert float(plain[0]) * units[plain[1]] > 16 * float(sent[0]) * units[sent[1]]
    paid = [float(amount) for amount in re.findall(r"was paid ([\d.]+) credits", printed)]
    assert len(paid) == 3
    assert all(amount > 0 for amount in paid)
    books = re.search(
        r"charged ([\d.]+)(?:, refunded ([\d.]+))?, paid out ([\d.]+) credits; the ledger's sum is 0", printed
    )
    assert books, printed
    charged, refunded, paid_out = (Decimal(amount or 0) for amount in books.groups())
    assert charged - refunded == paid_out
    assert "audit: clean; round 1 replays to the same bits" in printed
    assert leftovers(scratch) == []
    assert list(scratch.iterdir()) == []


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("loading the broker", marks=pytest.mark.soak),
        pytest.param("starting the API", marks=pytest.mark.soak),
        "its agent starts",
        pytest.param("clears, sites confirm", marks=pytest.mark.soak),
        "is running on",
    ],
)
def test_ctrl_c_at_any_moment_ends_everything(scratch: Path, moment: str) -> None:
    demo = start(scratch)
    assert demo.stdout is not None
    watchdog = threading.Timer(150, demo.kill)
    watchdog.start()
    try:
        for line in demo.stdout:
            if moment in line:
                break
        else:
            pytest.fail(f"the demo never said {moment!r}")
        if moment != "loading the broker":
            assert demo_folder(scratch).is_dir()
            assert leftovers(scratch), "what is not seen while it runs would not be seen if it were left"
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=ENDING_LIMIT_S)
    finally:
        watchdog.cancel()
    assert demo.returncode == 130, rest
    assert "nothing of it is left running" in rest
    assert "Traceback" not in rest
    assert leftovers(scratch) == []
    assert list(scratch.iterdir()) == []


@pytest.mark.timeout(120)
def test_process_that_dies_is_named_and_the_folder_kept(scratch: Path) -> None:
    demo = start(scratch)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "measuring what a CPU slot can do" in line:
            break
    folder = demo_folder(scratch)
    valkey = [pid for pid in _pids_with(b"valkey-server") if str(folder).encode() in pid[1]]
    os.kill(valkey[0][0], signal.SIGKILL)
    printed, _ = demo.communicate(timeout=90)
    assert demo.returncode == 1, printed
    assert "valkey ended by itself (killed by SIGKILL)" in printed
    assert (folder / "logs" / "demo.log").exists()
    assert leftovers(scratch) == []


def _pids_with(word: bytes) -> list[tuple[int, bytes]]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if word in words:
            found.append((int(entry.name), words))
    return found
