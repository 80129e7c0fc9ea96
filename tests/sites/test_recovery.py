"""What holds when agents die and brokers fall silent; a setup of some seconds stands for the work."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sites.identity import Identity
from sites.journal import Journal
from sites.protocol import AttemptPhase, ExitCause, Refusal, Usage
from sites.settings import SiteSettings
from tests.sites.conftest import StartAgent, job
from tests.sites.market import Grant, Market
from tests.sites.waiting import lives, wait_until
from training.clock import SystemClock


class ShiftedClock(SystemClock):
    """The machine's clock, which a test may set ahead; wardens go on by the machine's own."""

    ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


def waiting_job(market: Market, folder: Path, *, then: str = "exit 3") -> tuple[Grant, Path, Path]:
    """Return a grant whose setup counts its starts, names its process and waits for a file."""
    folder.mkdir()
    go, pid = folder.parent / "go", folder.parent / "pid"
    setup = f"echo x >> {folder.parent}/starts; echo $$ > {pid}; while [ ! -e {go} ]; do sleep 0.05; done; {then}"
    return Grant("lease_a", "job_a", job(market, folder, "pass", setup=setup)), go, pid


def pid_in(path: Path) -> int:
    return int(wait_until(lambda: path.exists() and path.read_text().strip()))


@contextmanager
def agent_process(settings: SiteSettings) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "sites", "run", "--settings", str(settings.folder.parent / "site.yaml"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_killed_agent_finds_its_attempt_again(
    market: Market, settings: SiteSettings, identity: Identity, tmp_path: Path
) -> None:
    market.grants["lease_a"], go, pid_path = waiting_job(market, tmp_path / "work")
    with agent_process(settings) as first:
        pid = pid_in(pid_path)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert lives(pid)
    with agent_process(settings) as second:
        heard = len(market.heartbeats)
        wait_until(lambda: len(market.heartbeats) > heard + 1)
        assert market.reports["lease_a"].phase is AttemptPhase.SETUP
        go.touch()
        wait_until(lambda: market.reports["lease_a"].phase is AttemptPhase.EXITED)
        report = market.reports["lease_a"]
        assert (report.cause, report.exit_code) == (ExitCause.SETUP, 3)
        assert (tmp_path / "starts").read_text() == "x\n"
        market.grants.clear()
        wait_until(lambda: not market.heartbeats[-1].attempts)
        second.terminate()
        assert second.wait(20) == 0
    boots = {heartbeat.boot for heartbeat in market.heartbeats}
    assert len(boots) == 2


def test_killed_agents_attempt_dies_when_its_liveness_ends(
    market: Market, settings: SiteSettings, identity: Identity, tmp_path: Path
) -> None:
    market.grants["lease_a"], _, pid_path = waiting_job(market, tmp_path / "work")
    market.grants["lease_a"].liveness_s = 4.0
    with agent_process(settings) as agent:
        pid = pid_in(pid_path)
        agent.kill()
        agent.wait()
        killed_s = SystemClock().monotonic_s()
        wait_until(lambda: not lives(pid))
    assert SystemClock().monotonic_s() - killed_s < 4.0 + 2.0 + 1.0


def test_unanswered_heartbeats_end_the_attempt_in_time(market: Market, start_agent: StartAgent, tmp_path: Path) -> None:
    market.grants["lease_a"], _, pid_path = waiting_job(market, tmp_path / "work")
    clock = ShiftedClock()
    agent = start_agent(clock)
    wait_until(lambda: agent.tick() and pid_path.exists() and pid_path.read_text().strip())
    pid = pid_in(pid_path)
    agent.tick()
    market.answers = False
    clock.ahead_s = 15.0
    assert not agent.tick()
    assert lives(pid)  # still inside the liveness of the last answer
    clock.ahead_s = 20.1
    # Well before the warden, which goes by the machine's clock, would end it.
    wait_until(lambda: agent.attend() or not lives(pid), limit_s=12)
    market.answers = True
    wait_until(lambda: agent.tick() and market.reports["lease_a"].phase is AttemptPhase.EXITED)
    assert market.reports["lease_a"].cause is ExitCause.EXPIRED


def test_answered_heartbeat_renews_from_when_it_was_sent(
    market: Market, start_agent: StartAgent, tmp_path: Path
) -> None:
    market.grants["lease_a"], _, pid_path = waiting_job(market, tmp_path / "work")
    agent = start_agent()
    wait_until(lambda: agent.tick() and pid_path.exists())
    before_s = SystemClock().monotonic_s()
    assert agent.tick()
    after_s = SystemClock().monotonic_s()
    (record,) = agent.records
    assert before_s <= record.deadline_s - 20.0 <= after_s


def test_ended_lease_is_stopped_and_reported_dead(market: Market, start_agent: StartAgent, tmp_path: Path) -> None:
    grant, _, pid_path = waiting_job(market, tmp_path / "work")
    market.grants["lease_a"] = grant
    agent = start_agent()
    wait_until(lambda: agent.tick() and pid_path.exists() and pid_path.read_text().strip())
    pid = pid_in(pid_path)
    grant.phase = type(grant.phase).ENDED
    wait_until(lambda: agent.tick() and market.reports["lease_a"].phase is AttemptPhase.EXITED)
    assert market.reports["lease_a"].cause is ExitCause.ORDERED
    assert not lives(pid)


def test_veto_reaches_the_broker_with_its_reason(market: Market, start_agent: StartAgent, tmp_path: Path) -> None:
    spec = job(market, tmp_path / "work", "pass")
    market.grants["lease_a"] = Grant("lease_a", "job_a", spec, price=1)
    agent = start_agent()
    wait_until(lambda: agent.tick() and market.vetoes)
    assert market.vetoes["lease_a"].code == "price.below_ask"
    assert "lease_a" not in market.confirmations


def test_hostile_bundle_ends_the_attempt_with_its_code(market: Market, start_agent: StartAgent, tmp_path: Path) -> None:
    spec = job(market, tmp_path / "work", "pass").model_copy(update={"workdir_digest": market.store(b"no archive")})
    market.grants["lease_a"] = Grant("lease_a", "job_a", spec)
    agent = start_agent()
    wait_until(lambda: agent.tick() and "lease_a" in market.reports and market.reports["lease_a"].cause)
    assert market.reports["lease_a"].cause is ExitCause.BUNDLE
    assert market.reports["lease_a"].detail.startswith("bundle.invalid")


def test_unacknowledged_usage_is_sent_again_exactly(
    market: Market, settings: SiteSettings, identity: Identity, start_agent: StartAgent
) -> None:
    journal = Journal(settings.folder / "journal.sqlite3")
    rows = [Usage(lease_id="lease_z", epoch=1, sequence=n, gpu_milliseconds=10 * n, samples=n) for n in (1, 2)]
    for row in rows:
        journal._database.execute(
            "INSERT INTO usage VALUES (?, ?, ?, ?)", (row.lease_id, row.epoch, row.sequence, row.model_dump_json())
        )
    journal.close()
    market.acknowledges = False
    agent = start_agent()
    agent.tick()
    agent.tick()
    assert market.usage == rows + rows
    market.acknowledges = True
    agent.tick()
    market.usage.clear()
    agent.tick()
    assert market.usage == []


def test_usage_that_the_broker_never_takes_is_not_sent_for_ever(
    market: Market, settings: SiteSettings, identity: Identity, start_agent: StartAgent
) -> None:
    waiting = Usage(lease_id="lease_z", epoch=1, sequence=1, gpu_milliseconds=1, samples=0)
    journal = Journal(settings.folder / "journal.sqlite3")
    row = (waiting.lease_id, 1, 1, waiting.model_dump_json())
    journal._database.execute("INSERT INTO usage VALUES (?, ?, ?, ?)", row)
    journal.close()
    market.acknowledges = False
    market.refusals = [Refusal(lease_id="lease_z", code="usage.refused", detail="too late")]
    agent = start_agent()
    agent.tick()
    agent.tick()
    assert market.usage == [waiting]


def test_agent_stays_small(settings: SiteSettings, identity: Identity, market: Market) -> None:
    with agent_process(settings) as agent:
        wait_until(lambda: len(market.heartbeats) > 2)
        status = Path(f"/proc/{agent.pid}/status").read_text()
        resident_kb = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        modules = Path(f"/proc/{agent.pid}/maps").read_text()
    assert resident_kb < 80_000, f"{resident_kb} kB"
    assert "libtorch" not in modules
