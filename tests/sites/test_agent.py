from __future__ import annotations

from pathlib import Path

import pytest

from sites.protocol import AttemptPhase, ExitCause, LeasePhase
from tests.sites.conftest import StartAgent, job
from tests.sites.market import Grant, Market
from tests.sites.waiting import wait_until

SCRIPT = """
import os, pathlib, sys
# One write: the ranks share one log, and two prints of a line may mix.
line = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} safe {sys.flags.safe_path}\\n"
os.write(1, (line + "".join(f"{name}\\n" for name in os.environ if "SECRET" in name)).encode())
if os.environ["RANK"] == "0":
    attempt = pathlib.Path(os.environ["HANSA_ATTEMPT"]).parent
    (attempt / "output" / "answer.txt").write_text("42")
"""


def test_attempt_runs_from_proposal_to_done(
    market: Market, start_agent: StartAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SECRET", "not for tenants")
    spec = job(market, tmp_path / "work", SCRIPT)
    market.grants["lease_a"] = Grant("lease_a", "job_a", spec, gpu_ids=("0", "1"))
    agent = start_agent()
    wait_until(
        lambda: (
            agent.tick() and market.reports.get("lease_a") and market.reports["lease_a"].phase is AttemptPhase.EXITED
        )
    )
    report = market.reports["lease_a"]
    assert (report.cause, report.exit_code, report.detail) == (ExitCause.DONE, 0, "")
    log = market.streams["lease_a", "log"].decode()
    assert "rank 0 of 2 safe True" in log
    assert "rank 1 of 2 safe True" in log
    assert "SECRET" not in log
    assert market.artifacts[report.outputs["answer.txt"]] == b"42"
    assert sum(usage.gpu_milliseconds for usage in market.usage) > 1000
    # The gateway stays for the other sites until the lease ends; then nothing is left.
    assert report.gateway is not None
    market.grants["lease_a"].phase = LeasePhase.ENDED
    agent.tick()
    market.grants.clear()
    wait_until(lambda: agent.tick() and not agent.records)
    assert not (agent._settings.folder / "attempts/lease_a-1").exists()
