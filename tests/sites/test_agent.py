"""An attempt as a tenant would have it: two ranks, a real session, a real gateway, the broker's protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sites.drivers import cgroups
from sites.errors import AgentRunningError
from sites.protocol import AttemptPhase, ExitCause, LeasePhase
from tests.sites.conftest import StartAgent, job
from tests.sites.market import Grant, Market
from tests.sites.test_secrets import holding
from tests.sites.waiting import wait_until
from training.roundlog.view import GENESIS_HASH

SCRIPT = """
import os, pathlib, sys
import torch, training
from torch.nn.parallel import DistributedDataParallel

# One write: the ranks share one log, and two prints of a line may mix.
line = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} safe {sys.flags.safe_path}\\n"
os.write(1, (line + "".join(f"{name}\\n" for name in os.environ if "SECRET" in name)).encode())
if "HANSA_SECRETS" in os.environ and os.environ["RANK"] == "0":
    value = pathlib.Path(os.environ["HANSA_SECRETS"], "HF_TOKEN").read_text()
    os.write(1, f"token of {len(value)}, in variables {value in str(os.environ)}\\n".encode())
torch.manual_seed(1)
model = DistributedDataParallel(torch.nn.Linear(10, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(torch.randn(1000, 10), torch.randn(1000, 10))
with training.join(model, optimizer, data=data) as session:
    for inputs, targets in session.batches():
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
if session.rank == 0:
    attempt = pathlib.Path(os.environ["HANSA_ATTEMPT"]).parent
    (attempt / "output" / "answer.txt").write_text(str(session.step))
"""


TOKEN = "kept-from-every-disk-7f3a"


@pytest.mark.parametrize("sandbox", [pytest.param("plain", marks=pytest.mark.soak), "bubblewrap"])
def test_attempt_runs_from_proposal_to_done(
    market: Market, start_agent: StartAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: str
) -> None:
    monkeypatch.setenv("AGENT_SECRET", "not for tenants")
    market.secrets = {"HF_TOKEN": TOKEN} if sandbox == "bubblewrap" else {}
    spec = job(market, tmp_path / "work", SCRIPT, secrets=tuple(market.secrets) or None)
    market.grants["lease_a"] = Grant("lease_a", "job_a", spec, gpu_ids=("0", "1"))
    agent = start_agent()
    with pytest.raises(AgentRunningError):
        start_agent()  # a second agent in the folder would fence the first one's attempts
    wait_until(
        lambda: agent.tick() and "lease_a" in market.reports and market.reports["lease_a"].phase is AttemptPhase.EXITED,
        limit_s=100,
    )
    report = market.reports["lease_a"]
    log = market.streams["lease_a", "log"].decode()
    assert (report.cause, report.exit_code, report.detail) == (ExitCause.DONE, 0, ""), log
    assert "rank 0 of 2 safe True" in log
    assert "rank 1 of 2 safe True" in log
    if market.secrets:
        assert f"token of {len(TOKEN)}, in variables False" in log
        # The attempt's folder, its runs, its journal and its log are all still there.
        assert (agent._settings.folder / "attempts/lease_a-1/runs/ranks/run.json").exists()
        assert holding(TOKEN, tmp_path) == []
        assert TOKEN not in log + "".join(beat.model_dump_json() for beat in market.heartbeats)
    assert "AGENT_SECRET" not in log
    # What the round log says, as the broker hears it.
    assert report.gateway is not None
    assert report.gateway.samples_by_site == {"hamburg": 1000}
    assert report.gateway.sealed_round == report.gateway.applied_round > 0
    assert report.gateway.chain_hash != GENESIS_HASH
    # What the attempt leaves.
    assert report.outputs["answer.txt"]
    assert market.artifacts[report.outputs["answer.txt"]] == b"50"  # 1000 samples in steps of 2 x 10
    assert report.checkpoint is not None
    assert len(market.artifacts[report.checkpoint.digest]) == report.checkpoint.size_bytes
    assert [json.loads(line) for line in market.streams["lease_a", "metrics"].splitlines()]
    # What is paid for.
    assert [usage.sequence for usage in market.usage] == list(range(1, len(market.usage) + 1))
    assert sum(usage.samples for usage in market.usage) == 1000
    assert sum(usage.gpu_milliseconds for usage in market.usage) > 1000
    # The gateway stays for the other sites until the lease ends; then nothing is left.
    market.grants["lease_a"].phase = LeasePhase.ENDED
    agent.tick()
    market.grants.clear()
    wait_until(lambda: agent.tick() and not agent.records)
    assert not (agent._settings.folder / "attempts/lease_a-1").exists()


@pytest.mark.parametrize("sandbox", ["bubblewrap"])
@pytest.mark.parametrize(
    ("limits", "script", "named"),
    [
        ("{processes_in_all: 100}", "import os\nwhile True: os.fork()", "processes"),
        ("{memory_gb: 1}", "held = bytearray(4_000_000_000)\nheld[::4096] = b'x' * len(held[::4096])", "memory"),
        pytest.param(
            "{disk_gb: 0.2}",
            "import time\nfor n in range(500): open(f'fill-{n}', 'wb').write(b'x' * 1_000_000)\ntime.sleep(600)",
            "disk",
            marks=pytest.mark.soak,
        ),
    ],
    ids=["fork bomb", "memory hog", "disk filler"],
)
def test_a_hostile_job_ends_at_its_limit_and_no_heartbeat_is_missed(
    market: Market, start_agent: StartAgent, tmp_path: Path, script: str, named: str
) -> None:
    controllers = {each.name for each in cgroups.controllers()}
    if not {"memory", "pids"} <= controllers:
        pytest.skip("this user may make no control groups; run as root or with a delegated group")
    market.grants["lease_a"] = Grant("lease_a", "job_a", job(market, tmp_path / "work", script), gpu_ids=("0", "1"))
    agent = start_agent()

    def is_over() -> bool:
        assert agent.tick()  # every heartbeat is answered while the job does its worst
        return "lease_a" in market.reports and market.reports["lease_a"].phase is AttemptPhase.EXITED

    wait_until(is_over, limit_s=100)
    report = market.reports["lease_a"]
    assert report.cause is ExitCause.LIMIT
    assert report.detail.startswith(f"{named}: ")
