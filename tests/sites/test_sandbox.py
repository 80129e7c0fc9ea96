"""Hostile code in the sandbox: it sees nothing of the host, reaches nobody, and ends at its limits, which are named."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from sites.drivers import cgroups
from sites.drivers.interface import EndCause, Limits, Run, RunState
from sites.drivers.process import ProcessDriver
from sites.errors import SandboxError
from sites.sandbox import Bubblewrap, View
from sites.seccomp import forbidden, program
from tests.sites.waiting import lives, wait_until
from training.clock import SystemClock

CLOCK = SystemClock()


class Cell:
    """One run in a sandbox: its folders, the driver that runs it, and what came of it."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        self.log = folder / "rank.log"
        self._run_folder = folder / "run"
        self._driver = ProcessDriver(sys.executable, CLOCK)
        self._sandbox = Bubblewrap(sys.executable, folder / "sandbox")

    def start(self, code: str, *arguments: str, **limits: object) -> None:
        command = (sys.executable, "-I", "-S", "-c", code, *arguments)
        self._driver.start(
            Run(
                folder=self._run_folder,
                argv=self._sandbox.argv(command, View(writable=(self.work,)), self.work),
                cwd=self.work,
                environment={"PATH": os.defpath},
                log_path=self.log,
                deadline_s=CLOCK.monotonic_s() + 60,
                grace_s=0.5,
                limits=Limits(disk_folders=(self.work,), **limits),  # type: ignore[arg-type]  named limits
            )
        )

    def end(self) -> RunState:
        wait_until(lambda: self._driver.poll(self._run_folder).is_over, limit_s=60)
        return self._driver.poll(self._run_folder)

    def stop(self) -> None:
        self._driver.stop(self._run_folder)
        self.end()

    def says(self, code: str, *arguments: str) -> object:
        """Run `code` to its end and return what it printed as JSON."""
        self.start(code, *arguments)
        state = self.end()
        assert state.exit_code == 0, self.log.read_text()
        return json.loads(self.log.read_text())


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    if not shutil.which("bwrap"):
        pytest.skip("no bubblewrap; on Debian: sudo apt-get install bubblewrap")
    return Cell(tmp_path / "cell")


def needs(controller: str) -> None:
    if controller not in {each.name for each in cgroups.controllers()}:
        pytest.skip(f"this user may make no control group for {controller}; run as root or with a delegated group")


def test_the_host_is_out_of_sight(cell: Cell, tmp_path: Path) -> None:
    secret = tmp_path / "key.pem"
    secret.write_text("the site's key")
    other = tmp_path / "attempts/lease_b-1/workdir/data.bin"
    other.parent.mkdir(parents=True)
    other.write_text("another tenant's data")
    code = (
        "import json, os, sys\n"
        "def reads(path):\n"
        "    try: return bool(open(path).read(1))\n"
        "    except OSError: return False\n"
        "print(json.dumps({'read': [path for path in sys.argv[1:] if reads(path)], 'home': os.path.exists('/home'),"
        " 'pids': [int(name) for name in os.listdir('/proc') if name.isdigit()], 'uid': os.getuid(),"
        " 'environment': sorted(os.environ)}))"
    )
    os.environ["SITE_SECRET"] = "not for tenants"
    paths = [str(secret), str(other), "/etc/shadow", "/etc/ssh/ssh_host_rsa_key", f"/proc/{os.getpid()}/environ"]
    seen = cell.says(code, *paths)
    assert isinstance(seen, dict)
    assert seen["read"] == []
    assert seen["home"] is False
    assert max(seen["pids"]) < 20  # its own processes alone
    assert seen["uid"] != 0
    assert set(seen["environment"]) <= {"PATH", "PWD", "HANSA_RUN", "LC_CTYPE"}


def test_nobody_can_be_dialled(cell: Cell) -> None:
    with socket.socket() as broker:
        broker.bind(("127.0.0.1", 0))
        broker.listen()
        code = (
            "import json, socket, sys\n"
            "reached = []\n"
            "for host, port in (('127.0.0.1', int(sys.argv[1])), ('169.254.169.254', 80), ('192.0.2.1', 443)):\n"
            "    try: socket.create_connection((host, port), timeout=2).close(); reached.append(host)\n"
            "    except OSError: pass\n"
            "print(json.dumps(reached))"
        )
        assert cell.says(code, str(broker.getsockname()[1])) == []


def test_calls_that_kernels_were_broken_through_are_refused(cell: Cell) -> None:
    code = (
        "import ctypes, errno, json, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "answers = {}\n"
        "for name, number in json.loads(sys.argv[1]).items():\n"
        "    ctypes.set_errno(0)\n"
        "    answers[name] = libc.syscall(number, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM\n"
        "print(json.dumps([name for name, refused in answers.items() if not refused]))"
    )
    calls = forbidden(os.uname().machine)
    if not calls:
        pytest.skip(f"no filter is known for {os.uname().machine}")
    assert cell.says(code, json.dumps(calls)) == []


def test_an_unknown_machine_has_no_filter() -> None:
    assert program("pdp11") is None
    assert program("aarch64") != program("x86_64")


@pytest.mark.parametrize("path", ["/usr/bin/python3-changed", "/etc/passwd", sys.executable + "-changed", "/run/x"])
def test_nothing_beyond_its_own_folders_can_be_written(cell: Cell, path: str) -> None:
    code = (
        "import json, sys\n"
        "try: open(sys.argv[1], 'w'); print('true')\n"
        "except OSError: print('false')\n"
        "open('own', 'w').write('fine')"
    )
    written = cell.says(code, path)
    assert (cell.work / "own").read_text() == "fine"
    # What lies in the sandbox's own memory is gone with it.
    assert not written or not Path(path).exists()


def test_a_link_out_of_the_sandbox_leads_nowhere(cell: Cell, tmp_path: Path) -> None:
    target = tmp_path / "victim"
    target.write_text("untouched")
    (cell.work / "link").symlink_to(target)
    cell.start("open('link', 'w').write('overwritten')")
    cell.end()  # what it wrote there, if anything, was in the sandbox's own memory
    assert target.read_text() == "untouched"


def test_a_fork_bomb_ends_at_the_limit_of_processes(cell: Cell) -> None:
    needs("pids")
    cell.start("import os\nwhile True: os.fork()", processes_in_all=64)
    state = cell.end()
    assert state.limit == "processes"
    assert "more processes" in state.detail


def test_a_hog_of_memory_ends_at_its_limit_and_nobody_else_does(cell: Cell) -> None:
    needs("memory")
    cell.start("held = bytearray(4_000_000_000)\nheld[::4096] = b'x' * len(held[::4096])", memory_bytes=200_000_000)
    state = cell.end()
    assert state.limit == "memory"
    assert "more memory" in state.detail


@pytest.mark.parametrize(
    "code",
    [
        "block = b'x' * 1_000_000\nfor n in range(400): open(f'fill-{n}', 'wb').write(block)",
        "for n in range(30_000): open(f'fill-{n}', 'w')",
    ],
    ids=["bytes", "files"],
)
def test_a_filler_of_the_disk_is_ended(cell: Cell, code: str) -> None:
    waiting = "\nimport time\nwhile True: time.sleep(0.1)"
    cell.start(code + waiting, disk_bytes=100_000_000, disk_files=10_000)
    state = cell.end()
    assert (state.cause, state.limit) == (EndCause.LIMIT, "disk")
    assert "wrote more" in state.detail


def test_everything_dies_when_a_run_is_stopped(cell: Cell) -> None:
    code = (
        "import os, signal, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        while True: time.sleep(0.1)\n"
        "open('ready', 'w').close()\n"
        "while True: time.sleep(0.1)"
    )
    cell.start(code)
    wait_until((cell.work / "ready").exists)
    inside = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _works_in(path, cell.work)]
    assert len(inside) >= 4
    cell.stop()
    assert not any(map(lives, inside))


def test_groups_are_removed_with_their_run(cell: Cell) -> None:
    needs("pids")
    groups = {each.group for each in cgroups.controllers()}
    before = {path for group in groups for path in group.glob("hansa-*")}
    cell.start("print('{}')", processes_in_all=64, memory_bytes=10**9)
    cell.end()
    assert {path for group in groups for path in group.glob("hansa-*")} == before


def test_a_host_without_bubblewrap_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        Bubblewrap(sys.executable, tmp_path / "sandbox").check()


def test_groups_of_version_2_are_made_in_the_agents_own(tmp_path: Path) -> None:
    # The files as a delegated group of version 2 shows them; the kernel's part cannot be had everywhere.
    (tmp_path / "self").write_text("0::/agent\n")
    (tmp_path / "mounts").write_text(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n")
    group = tmp_path / "agent"
    group.mkdir()
    (group / "cgroup.subtree_control").write_text("memory pids")
    assert cgroups.controllers(tmp_path / "self", tmp_path / "mounts") == ()  # nothing answers in a new group
    available = tuple(cgroups.Controller(name, 2, group) for name in ("memory", "pids"))
    made = cgroups.create("run", Limits(memory_bytes=1000, processes_in_all=7), available)
    assert made == (group / "run",)
    assert (made[0] / "memory.max").read_text() == "1000"
    assert (made[0] / "memory.swap.max").read_text() == "0"
    assert (made[0] / "pids.max").read_text() == "7"


def _works_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").readlink() == folder
    except OSError:
        return False
