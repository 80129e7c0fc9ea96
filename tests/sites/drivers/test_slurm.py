"""What the Slurm driver promises beyond the suite for drivers: on a real cluster of two nodes, with GPUs that are none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sites.drivers import node, warden
from sites.drivers.interface import EndCause, Run, RunPhase, RunState
from sites.drivers.node import GPU, expanded
from sites.drivers.process import ProcessDriver
from sites.drivers.slurm import SlurmDriver
from sites.drivers.slurm_outcome import cluster_gpus, end_by_slurm, job_name, layout, skew
from sites.drivers.slurm_queue import parse_jobs, run_slurm
from sites.errors import DriverError
from sites.settings import SlurmSettings
from tests.sites.slurm_cluster import Cluster
from tests.sites.waiting import lives, wait_until
from training.clock import SystemClock

CLOCK = SystemClock()
WAIT = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
TELL = (
    "import json, os, sys\n"
    "number = sys.argv[1]\n"
    "told = {name: os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'SECRET')}\n"
    "open(f'told-{number}', 'w').write(json.dumps(told | {'argv': sys.argv[2:], 'pid': os.getpid()}))\n"
)


class Site:
    """One driver and the runs that a test starts with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: list[tuple[SlurmDriver, Path]] = []

    def driver(self, **settings: object) -> SlurmDriver:
        chosen = {"gpus_per_node": 4, "extra_args": ("--mem=100M",), "fabric": "trusted"} | settings
        local = ProcessDriver(sys.executable, CLOCK)
        return SlurmDriver(SlurmSettings.model_validate(chosen), sys.executable, CLOCK, local)

    def start(self, driver: SlurmDriver, code: str, *arguments: str, name: str = "run", **changes: object) -> Path:
        folder = self.folder / name
        self._runs.append((driver, folder))
        settings = {
            "folder": folder,
            "argv": (sys.executable, "-I", "-S", "-c", code, *arguments),
            "cwd": self.folder,
            "environment": {"PATH": os.defpath},
            "log_path": self.folder / "rank.log",
            "deadline_s": CLOCK.monotonic_s() + 60,
            "grace_s": 0.5,
        }
        driver.start(Run(**(settings | changes)))  # type: ignore[arg-type]  # named settings
        return folder

    def end(self) -> None:
        for driver, folder in self._runs:
            driver.stop(folder)
            wait_until(lambda driver=driver, folder=folder: driver.stop(folder) or driver.poll(folder).is_over)


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.end()


def ended(driver: SlurmDriver, folder: Path) -> RunState:
    wait_until(lambda: driver.poll(folder).is_over)
    return driver.poll(folder)


def running(driver: SlurmDriver, folder: Path) -> None:
    wait_until(lambda: driver.poll(folder).phase is RunPhase.RUNNING)


def job(folder: Path) -> str:
    return run_slurm(["squeue", "--noheader", f"--name={job_name(folder)}", "--format=%A %T %D"])


def test_gang_has_a_warden_and_gpus_on_each_node_and_ends_as_one(site: Site) -> None:
    driver = site.driver()
    code = TELL + WAIT + "print(f'node {number} says goodbye', flush=True)\n"
    folder = site.start(driver, code, "{hansa-node}", "{hansa-address}:{hansa-port}", gpus=6)
    running(driver, folder)
    told = [
        json.loads(wait_until(lambda n=n: (p := site.folder / f"told-{n}").exists() and p.read_text())) for n in (0, 1)
    ]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in told] == ["0,1,2", "0,1,2"]
    assert told[0]["argv"] == told[1]["argv"]  # one place to meet
    assert job(folder).split()[1:] == ["RUNNING", "2"]
    (site.folder / "go").touch()
    state = ended(driver, folder)
    assert (state.cause, state.exit_code) == (EndCause.EXIT, 0)
    log = (site.folder / "rank.log").read_text()
    assert "node 0 says goodbye" in log
    assert "node 1 says goodbye" in log


def test_one_node_s_failure_ends_the_others_and_is_the_run_s(site: Site) -> None:
    driver = site.driver()
    code = TELL + "if number == '1': raise SystemExit(75)\nimport time; time.sleep(600)"
    folder = site.start(driver, code, "{hansa-node}", gpus=8)
    state = ended(driver, folder)
    assert (state.cause, state.exit_code) == (EndCause.EXIT, 75)
    pids = [json.loads((site.folder / f"told-{n}").read_text())["pid"] for n in (0, 1)]
    assert not any(lives(pid) for pid in pids)


def test_cancelled_by_someone_else_is_lost_and_leaves_nothing(site: Site) -> None:
    driver = site.driver()
    folder = site.start(driver, TELL + "import time; time.sleep(600)", "0", gpus=1)
    pid = json.loads(wait_until(lambda: (p := site.folder / "told-0").exists() and p.read_text()))["pid"]
    running(driver, folder)
    run_slurm(["scancel", f"--name={job_name(folder)}"])
    state = ended(driver, folder)
    assert state.phase is RunPhase.LOST
    assert "CANCELLED" in state.detail
    assert not lives(pid)


def test_preempted_run_is_lost_and_does_not_come_back(site: Site) -> None:
    driver = site.driver(partition="spot")
    folder = site.start(driver, TELL + "import time; time.sleep(600)", "0", gpus=8)
    running(driver, folder)
    strong = site.driver(partition="main")
    rival = site.start(strong, "print('strong')", name="rival", gpus=8)
    state = ended(driver, folder)
    assert state.phase is RunPhase.LOST
    assert "PREEMPTED" in state.detail
    assert ended(strong, rival).exit_code == 0
    assert job(folder) == ""


@pytest.mark.parametrize("number", [0, 1])
def test_warden_that_is_killed_takes_the_whole_gang_with_it(site: Site, number: int) -> None:
    driver = site.driver()
    folder = site.start(driver, TELL + "import time; time.sleep(600)", "{hansa-node}", gpus=8)
    told = [
        json.loads(wait_until(lambda n=n: (p := site.folder / f"told-{n}").exists() and p.read_text())) for n in (0, 1)
    ]
    os.kill(json.loads((folder / f"node-{number}" / "warden.json").read_text())["pid"], signal.SIGKILL)
    assert ended(driver, folder).phase is RunPhase.LOST
    assert not any(lives(each["pid"]) for each in told)


def test_stopped_while_it_waits_in_the_queue(site: Site) -> None:
    driver = site.driver()
    first = site.start(driver, "import time; time.sleep(600)", name="first", gpus=8)
    running(driver, first)
    second = site.start(driver, "open('ran', 'w')", name="second", gpus=8)
    state = wait_until(lambda: (found := driver.poll(second)).detail.startswith("waits in Slurm's queue") and found)
    assert state.phase is RunPhase.STARTING
    driver.stop(second)
    assert ended(driver, second).cause is EndCause.STOPPED
    assert not (site.folder / "ran").exists()
    driver.stop(first)
    assert ended(driver, first).cause is EndCause.STOPPED


def test_runs_go_on_and_end_while_slurmctld_is_away(site: Site, cluster: Cluster) -> None:
    driver = site.driver()
    folder = site.start(driver, WAIT + "raise SystemExit(7)", gpus=1)
    running(driver, folder)
    cluster.end("slurmctld")
    try:
        before_s = CLOCK.monotonic_s()
        driver.renew(folder, before_s + 60)
        assert driver.poll(folder).phase is RunPhase.RUNNING
        assert CLOCK.monotonic_s() - before_s < 1  # nobody waits for it
        (site.folder / "go").touch()
        state = ended(driver, folder)
        assert (state.cause, state.exit_code) == (EndCause.EXIT, 7)
        late = site.start(driver, "print('late', flush=True)", name="late", gpus=1)
        assert driver.poll(late).phase is RunPhase.STARTING
    finally:
        cluster.start_controller()
    assert ended(driver, late).exit_code == 0  # taken once slurmctld is back


def test_submission_whose_answer_was_lost_is_found_by_name(site: Site) -> None:
    driver = site.driver()
    folder = site.start(driver, WAIT, gpus=1)
    second = site.driver()  # as a new agent, which knows the folder alone
    running(second, folder)
    assert len(job(folder).splitlines()) == 1
    (site.folder / "go").touch()
    assert ended(second, folder).exit_code == 0


def test_second_job_of_one_run_gives_way(site: Site) -> None:
    """Two were submitted because an answer was late: the second finds the first one's claim."""
    driver = site.driver()
    folder = site.start(driver, "print('once', flush=True)\n" + WAIT, gpus=1)
    running(driver, folder)
    run_slurm(
        [
            "sbatch",
            "--wait",
            "--output=/dev/null",
            "--mem=100M",
            f"--job-name={job_name(folder)}",
            str(folder / "job.sh"),
        ],
        timeout_s=20,
    )
    # Its further nodes give way too, else two jobs would share one gang.
    other = {"PATH": os.defpath, "SLURM_JOB_ID": "999999", "SLURM_NODEID": "1"}
    subprocess.run([sys.executable, "-I", "-S", node.__file__, str(folder)], env=other, check=True, timeout=20)
    assert not (folder / "node-1").exists()
    assert driver.poll(folder).phase is RunPhase.RUNNING
    (site.folder / "go").touch()
    assert ended(driver, folder).exit_code == 0
    assert (site.folder / "rank.log").read_text() == "once\n"


def test_job_that_an_older_state_starts_once_more_runs_once(site: Site) -> None:
    """A slurmctld that lost its last seconds starts the same job again beside its own processes."""
    driver = site.driver()
    folder = site.start(driver, "print('once', flush=True)\n" + WAIT, gpus=1)
    running(driver, folder)
    number = (folder / "claim").read_text()
    again = {"PATH": os.defpath, "SLURM_JOB_ID": number, "SLURM_NODEID": "0"}
    subprocess.run([sys.executable, "-I", "-S", node.__file__, str(folder)], env=again, check=True, timeout=20)
    (site.folder / "go").touch()
    assert ended(driver, folder).exit_code == 0
    assert (site.folder / "rank.log").read_text() == "once\n"


def test_run_that_was_never_submitted_is_absent_and_may_be_started_again(site: Site) -> None:
    driver = site.driver()
    folder = site.start(driver, "print('ran')", gpus=1)
    assert ended(driver, folder).exit_code == 0
    shutil.rmtree(folder / "node-0")
    (folder / "ended.json").unlink()
    (folder / "claim").unlink()
    # As it is where the agent was killed between writing and submitting: another name, which Slurm never heard.
    other = folder.with_name("other")
    folder.rename(other)
    plan = json.loads((other / "run.json").read_text())
    second = site.driver()
    (other / "run.json").write_text(json.dumps(plan | {"written_ms": CLOCK.now_ms()}))
    wait_until(lambda: second.poll(other).detail == "Slurm does not know the job yet")
    (other / "run.json").write_text(json.dumps(plan | {"written_ms": CLOCK.now_ms() - 20_000}))
    wait_until(lambda: second.poll(other).phase is RunPhase.ABSENT)


@pytest.mark.parametrize(
    ("settings", "gpus", "remedy"),
    [
        ({"partition": "nowhere"}, 1, "slurm.partition"),
        ({"gres": "tpu"}, 1, "slurm.gres"),
        ({"gpus_per_node": 99}, 99, "slurm.gpus_per_node"),
    ],
    ids=["partition", "gres", "too many"],
)
def test_refusal_by_slurm_names_the_setting(site: Site, settings: dict[str, object], gpus: int, remedy: str) -> None:
    driver = site.driver(**settings)
    folder = site.start(driver, "pass", gpus=gpus)
    state = ended(driver, folder)
    assert state.cause is EndCause.NOT_STARTED
    assert remedy in state.detail


def test_several_nodes_are_refused_without_a_trusted_fabric(site: Site) -> None:
    with pytest.raises(DriverError, match=r"slurm\.fabric: trusted"):
        site.start(site.driver(fabric="none"), "pass", gpus=8)


def test_host_without_slurm_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DriverError, match="apt-get install slurm-client"):
        run_slurm(["sbatch", "--version"])


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("TIMEOUT", (RunPhase.ENDED, EndCause.TIMEOUT)),
        ("OUT_OF_MEMORY", (RunPhase.ENDED, EndCause.LIMIT)),
        ("NODE_FAIL", (RunPhase.LOST, None)),
        ("PREEMPTED", (RunPhase.LOST, None)),
    ],
)
def test_word_of_slurm_decides_where_wardens_gave_none(state: str, expected: tuple[RunPhase, EndCause | None]) -> None:
    # Slurm looks at time limits every half minute and for lost nodes every five; what it says then is read here.
    found = parse_jobs(f"12|{state}|hansa-x|100|161|Reason|n1\n")["hansa-x"]
    assert found.is_terminal
    outcome = end_by_slurm(found, 61.0, stopped=False)
    assert (outcome.phase, outcome.cause) == expected
    assert "memory" in (outcome.limit or "memory")


def test_accounting_is_held_against_slurm_s_own_times(site: Site) -> None:
    driver = site.driver()
    folder = site.start(driver, "import time; time.sleep(1.5)", gpus=1)
    state = ended(driver, folder)
    wait_until(lambda: driver.poll(folder) and (folder / "accounting.json").exists())
    told = json.loads((folder / "accounting.json").read_text())
    assert 1.5 <= state.running_s == told["wardens_s"] < 2.5
    assert 1 <= told["slurm_s"] <= 6


# ------------------------------------------------------------------ without a cluster


@pytest.mark.parametrize(
    ("gpus", "per_node", "expected"),
    [(0, 8, (1, 0)), (1, 8, (1, 1)), (8, 8, (1, 8)), (12, 8, (2, 6)), (9, 8, (3, 3)), (7, 4, (7, 1)), (16, 4, (4, 4))],
)
def test_gpus_are_divided_evenly_over_the_fewest_nodes(gpus: int, per_node: int, expected: tuple[int, int]) -> None:
    assert layout(gpus, per_node) == expected


@pytest.mark.parametrize(
    ("clock_ahead_s", "unread_s", "expected_s"),
    [
        (0, 0, 19),  # clocks agree: the second that they may differ is taken off
        (0, 15, 4),  # the file lay unread: UTC knows
        (3600, 0, -3581),  # this host is ahead: too early, never too late
        (-3600, 0, 20),  # this host is behind: the time left when it was written still bounds it
    ],
)
def test_liveness_on_another_host_never_ends_later(clock_ahead_s: int, unread_s: int, expected_s: int) -> None:
    written_ms, node_ms = 1_000_000_000, 1_000_000_000 + (clock_ahead_s + unread_s) * 1000
    liveness = {"remaining_s": 20.0, "until_ms": written_ms + 19_000}
    assert warden.deadline_s(liveness, 500.0, node_ms) == pytest.approx(500 + expected_s)


def test_warden_on_another_host_obeys_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"log_path": str(tmp_path / "log"), "log_bytes_max": 1}
    (tmp_path / "run.json").write_text(json.dumps(run))
    watch = warden.Warden(tmp_path)
    liveness = {"era": "of another host", "deadline_s": 1e12, "remaining_s": 5.0, "until_ms": CLOCK.now_ms() + 4000}
    (tmp_path / "liveness").write_text(json.dumps(liveness))
    assert not watch._expired()
    (tmp_path / "liveness").write_text(json.dumps(liveness | {"until_ms": CLOCK.now_ms() - 1}))
    assert watch._expired()
    (tmp_path / "liveness").write_text(json.dumps({"era": "of a former boot", "deadline_s": 1e12}))
    assert watch._expired()  # says nothing that holds here


@pytest.mark.parametrize(
    ("written_ms", "looked_ago_s", "expected_s"),
    [(15_000, None, 5.0), (9_900, 0.2, 0.0), (5_000, 0.2, -4.8), (5_000, None, 0.0), (15_000, 0.2, 5.0)],
)
def test_skew_is_told_as_far_as_it_is_certain(written_ms: int, looked_ago_s: float | None, expected_s: float) -> None:
    assert skew(written_ms, 10_000, looked_ago_s) == pytest.approx(expected_s)


def test_sandbox_shows_the_gpus_that_slurm_chose() -> None:
    device = f"/dev/nvidia{GPU}"
    argv = ["bwrap", "--dev-bind-try", device, device, "--", "torchrun", "{hansa-node}"]
    found = expanded(argv, {"{hansa-node}": "1"}, ["2", "5"])
    both = ["--dev-bind-try", "/dev/nvidia2", "/dev/nvidia2", "--dev-bind-try", "/dev/nvidia5", "/dev/nvidia5"]
    assert found == ["bwrap", *both, "--", "torchrun", "1"]
    assert expanded(argv, {}, []) == ["bwrap", "--", "torchrun", "{hansa-node}"]


def test_gres_of_nodes_is_read() -> None:
    told = "n1|gpu:h100:8(S:0-1)\nn2|gpu:a100:4,gpu:h100:2\nn3|(null)\nn4|gpu:8,license:1\n"
    assert cluster_gpus(told) == {"n1": 8, "n2": 6, "n3": 0, "n4": 8}


def test_of_two_jobs_of_one_name_the_living_one_counts() -> None:
    lines = "7|RUNNING|hansa-x|1|N/A|None|n1\n8|COMPLETED|hansa-x|2|3|None|n1\nrubbish\n"
    assert parse_jobs(lines)["hansa-x"].job_id == "7"
