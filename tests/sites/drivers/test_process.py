"""The suite for drivers, and what the process driver promises beyond it.

A new driver adds itself to `driver` and passes everything above the line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sites.drivers import ranks
from sites.drivers.interface import Driver, EndCause, Limits, Run, RunPhase, RunState
from sites.drivers.process import ProcessDriver
from sites.drivers.slurm import SlurmDriver
from sites.settings import SlurmSettings
from tests.sites.waiting import lives, wait_until
from training.clock import SystemClock

CLOCK = SystemClock()
SLURM = SlurmSettings(gpus_per_node=4, extra_args=("--mem=100M",))

# A tenant's worst habit: a grandchild in a session of its own, with a clean environment, that ignores SIGTERM.
DAEMON = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(sys.argv[1], "w").write(str(os.getpid()))
        os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"], {})
    os._exit(0)
os.wait()
while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():
    time.sleep(0.01)
"""


@pytest.fixture(params=["process", "slurm"])
def driver(request: pytest.FixtureRequest) -> Driver:
    local = ProcessDriver(sys.executable, CLOCK)
    if request.param == "process":
        return local
    request.getfixturevalue("cluster")
    return SlurmDriver(SLURM, sys.executable, CLOCK, local)


@pytest.fixture
def folder(tmp_path: Path, driver: Driver) -> Iterator[Path]:
    yield tmp_path / "run"
    driver.stop(tmp_path / "run")
    wait_until(lambda: driver.poll(tmp_path / "run").is_over)


ON_PROCESSES = pytest.mark.parametrize("driver", ["process"], indirect=True)


def python(folder: Path, code: str, *arguments: str, **changes: object) -> Run:
    settings = {
        "folder": folder,
        "argv": (sys.executable, "-I", "-S", "-c", code, *arguments),
        "cwd": folder.parent,
        "environment": {"PATH": os.defpath},
        "log_path": folder.parent / "rank.log",
        "deadline_s": CLOCK.monotonic_s() + 60,
        "grace_s": 0.5,
    }
    return Run(**(settings | changes))  # type: ignore[arg-type]  # named settings


def ended(driver: Driver, folder: Path) -> RunState:
    wait_until(lambda: driver.poll(folder).is_over)
    return driver.poll(folder)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_exit_code_and_output_are_reported(driver: Driver, folder: Path, code: int) -> None:
    driver.start(python(folder, f"print('hello', flush=True); raise SystemExit({code})"))
    state = ended(driver, folder)
    assert (state.phase, state.cause, state.exit_code) == (RunPhase.ENDED, EndCause.EXIT, code)
    assert (folder.parent / "rank.log").read_text() == "hello\n"


def test_starting_twice_runs_once(driver: Driver, folder: Path) -> None:
    run = python(folder, "print('once', flush=True)")
    driver.start(run)
    driver.start(run)
    ended(driver, folder)
    driver.start(run)
    ended(driver, folder)
    assert (folder.parent / "rank.log").read_text() == "once\n"


def test_everything_dies_at_expiry_even_a_daemon_that_fled(driver: Driver, folder: Path) -> None:
    pid_path = folder.parent / "daemon.pid"
    code = DAEMON + "\ntime.sleep(600)"
    driver.start(python(folder, code, str(pid_path), deadline_s=CLOCK.monotonic_s() + 1.5))
    daemon = int(wait_until(lambda: pid_path.exists() and pid_path.read_text()))
    assert lives(daemon)
    state = ended(driver, folder)
    assert state.cause is EndCause.EXPIRED
    assert not lives(daemon)
    assert 1.0 < state.running_s < 1.5 + 2.0 + 2.0


def test_daemon_does_not_outlive_a_script_that_ends(driver: Driver, folder: Path) -> None:
    pid_path = folder.parent / "daemon.pid"
    driver.start(python(folder, DAEMON, str(pid_path)))
    state = ended(driver, folder)
    assert (state.cause, state.exit_code) == (EndCause.EXIT, 0)
    assert not lives(int(pid_path.read_text()))


def test_renewed_run_outlives_its_first_deadline(driver: Driver, folder: Path) -> None:
    code = "import sys; sys.stdin.read(); import time\nwhile not __import__('os').path.exists('go'): time.sleep(0.01)"
    first_s = CLOCK.monotonic_s() + 1.0
    driver.start(python(folder, code, deadline_s=first_s))
    driver.renew(folder, first_s + 60)
    wait_until(lambda: CLOCK.monotonic_s() > first_s + 0.3)
    (folder.parent / "go").touch()
    assert ended(driver, folder).cause is EndCause.EXIT


def test_run_past_its_deadline_is_never_started(driver: Driver, folder: Path) -> None:
    driver.start(python(folder, "open('ran', 'w')", deadline_s=CLOCK.monotonic_s() - 1))
    assert ended(driver, folder).cause is EndCause.EXPIRED
    assert not (folder.parent / "ran").exists()


def test_stop_asks_first_and_forces_after_the_grace(driver: Driver, folder: Path) -> None:
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    driver.start(python(folder, code))
    log = folder.parent / "rank.log"
    wait_until(lambda: log.exists() and "ready" in log.read_text())
    driver.stop(folder)
    state = ended(driver, folder)
    assert (state.cause, state.exit_code) == (EndCause.STOPPED, -signal.SIGKILL)
    assert log.read_text() == "ready\nasked\n"


def test_run_that_takes_too_long_times_out(driver: Driver, folder: Path) -> None:
    driver.start(python(folder, "import time; time.sleep(600)", timeout_s=0.3))
    assert ended(driver, folder).cause is EndCause.TIMEOUT


def test_flooded_log_is_cut_and_the_job_goes_on(driver: Driver, folder: Path) -> None:
    code = "for n in range(3000): print('x' * 1000)\nraise SystemExit(3)"
    driver.start(python(folder, code, log_bytes_max=10_000))
    assert ended(driver, folder).exit_code == 3
    log = (folder.parent / "rank.log").read_text()
    assert len(log) < 10_200
    assert log.endswith("[hansa] this log is full; what follows is not kept\n")


def test_program_that_does_not_exist_says_so(driver: Driver, folder: Path) -> None:
    driver.start(python(folder, "", argv=("/nonexistent/python",)))
    state = ended(driver, folder)
    assert state.cause is EndCause.NOT_STARTED
    assert "/nonexistent/python" in state.detail


def test_limits_and_environment_hold(driver: Driver, folder: Path) -> None:
    code = (
        "import os, resource, json\n"
        "print(json.dumps([resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_CORE)[0],"
        " sorted(os.environ)]))"
    )
    os.environ["SITE_SECRET"] = "not for tenants"
    driver.start(python(folder, code, limits=Limits(open_files=100)))
    ended(driver, folder)
    files, core, names = json.loads((folder.parent / "rank.log").read_text())
    assert (files, core) == (100, 0)
    assert set(names) <= {"PATH", "HANSA_RUN", "LC_CTYPE"}


def test_another_agent_adopts_a_run_after_sigkill(driver: Driver, folder: Path) -> None:
    """A first agent starts the run and is killed at once; the run goes on and a second one sees its end."""
    code = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\nraise SystemExit(7)"
    starter = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sites.drivers.interface import Run\n"
        "from sites.drivers.process import ProcessDriver\n"
        "from sites.drivers.slurm import SlurmDriver\n"
        "from sites.settings import SlurmSettings\n"
        "from training.clock import SystemClock\n"
        "folder, code = Path(sys.argv[1]), sys.argv[2]\n"
        "driver = ProcessDriver(sys.executable, SystemClock())\n"
        "if sys.argv[3] == 'SlurmDriver':\n"
        "    settings = SlurmSettings(gpus_per_node=4, extra_args=('--mem=100M',))\n"
        "    driver = SlurmDriver(settings, sys.executable, SystemClock(), driver)\n"
        "driver.start(Run(folder=folder,"
        " argv=(sys.executable, '-I', '-S', '-c', code), cwd=folder.parent, environment={},"
        " log_path=folder.parent / 'rank.log', deadline_s=SystemClock().monotonic_s() + 60))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", starter, str(folder), code, type(driver).__name__], check=False, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    wait_until(lambda: driver.adopt(folder).phase is RunPhase.RUNNING)
    (folder.parent / "go").touch()
    state = ended(driver, folder)
    assert (state.cause, state.exit_code) == (EndCause.EXIT, 7)


# ------------------------------------------------------------------ the process driver's own promises


@ON_PROCESSES
def test_run_whose_warden_is_killed_is_ended_and_lost(folder: Path) -> None:
    driver = ProcessDriver(sys.executable, CLOCK)
    pid_path = folder.parent / "child.pid"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}')\n"
        "time.sleep(600)"
    )
    driver.start(python(folder, code, str(pid_path)))
    pids = [int(word) for word in wait_until(lambda: pid_path.exists() and pid_path.read_text()).split()]
    os.kill(json.loads((folder / "warden.json").read_text())["pid"], signal.SIGKILL)
    assert ended(driver, folder).phase is RunPhase.LOST
    assert not any(lives(pid) for pid in pids)


@ON_PROCESSES
def test_number_given_to_another_process_is_not_mistaken_for_the_warden(folder: Path) -> None:
    folder.mkdir(parents=True)
    document = {"pid": os.getpid(), "started_ticks": 1, "era": CLOCK.era(), "started_s": 0.0}
    (folder / "warden.json").write_text(json.dumps(document))
    driver = ProcessDriver(sys.executable, CLOCK)
    driver.stop(folder)  # would end this very test
    assert driver.poll(folder).phase is RunPhase.LOST


@ON_PROCESSES
def test_first_failing_rank_decides_the_exit_code(folder: Path) -> None:
    driver = ProcessDriver(sys.executable, CLOCK)
    code = (
        "import json, sys\n"
        "for rank, entry in {'0': [143, 20.0], '1': [75, 10.0], '2': [0, 5.0]}.items():\n"
        "    open(f'{sys.argv[1]}/{rank}', 'w').write(json.dumps(entry))\n"
        "raise SystemExit(1)"
    )
    driver.start(python(folder, code, str(folder / "exits")))
    assert ended(driver, folder).exit_code == 75


RANK = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else signal.SIG_DFL)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
seen = {name: os.environ[name] for name in names}
path = os.path.join(sys.argv[1], "seen-" + seen["RANK"])
open(path + ".partial", "w").write(json.dumps(seen))
os.rename(path + ".partial", path)
others = [os.path.join(sys.argv[1], f"seen-{rank}") for rank in range(int(seen["WORLD_SIZE"]))]
while not all(map(os.path.exists, others)):
    time.sleep(0.01)
if seen["RANK"] == "1" and "fails" in sys.argv:
    raise SystemExit(75)
if "waits" in sys.argv:
    time.sleep(600)
"""


def ranks_of_one_host(folder: Path, *words: str) -> Run:
    program = folder.parent / "rank.py"
    program.write_text(RANK)
    argv = (sys.executable, "-I", "-S", ranks.__file__, str(folder / "exits"), "3")
    return python(folder, "", argv=(*argv, sys.executable, "-I", "-S", str(program), str(folder.parent), *words))


@ON_PROCESSES
def test_ranks_are_told_who_they_are_as_torchrun_tells_them(driver: Driver, folder: Path) -> None:
    driver.start(ranks_of_one_host(folder))
    assert ended(driver, folder).exit_code == 0
    seen = [json.loads((folder.parent / f"seen-{rank}").read_text()) for rank in range(3)]
    assert [each["RANK"] for each in seen] == [each["LOCAL_RANK"] for each in seen] == ["0", "1", "2"]
    assert {(each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"], each["MASTER_ADDR"]) for each in seen} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({each["MASTER_PORT"] for each in seen}) == 1
    assert [json.loads((folder / "exits" / str(rank)).read_text())[0] for rank in range(3)] == [0, 0, 0]


@ON_PROCESSES
def test_rank_that_fails_ends_the_others_and_its_exit_code_stands(driver: Driver, folder: Path) -> None:
    driver.start(ranks_of_one_host(folder, "fails", "waits"))
    assert ended(driver, folder).exit_code == 75
    codes = [json.loads((folder / "exits" / str(rank)).read_text())[0] for rank in range(3)]
    assert codes == [128 + signal.SIGTERM, 75, 128 + signal.SIGTERM]


@ON_PROCESSES
def test_ranks_deaf_to_their_fellows_end_are_killed(
    driver: Driver, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "__file__", str(folder.parent / "impatient.py"))
    source = Path(ranks.__spec__.origin or "").read_text()
    Path(ranks.__file__).write_text(source.replace("GRACE_S: Final = 10", "GRACE_S: Final = 1"))
    driver.start(ranks_of_one_host(folder, "fails", "waits", "deaf"))
    assert ended(driver, folder).exit_code == 75
    codes = [json.loads((folder / "exits" / str(rank)).read_text())[0] for rank in range(3)]
    assert codes == [128 + signal.SIGKILL, 75, 128 + signal.SIGKILL]
