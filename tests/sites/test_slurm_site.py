"""An attempt whose ranks are on two nodes of a Slurm cluster, sandboxed, reaching their gateway through the relay."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sites.protocol import AttemptPhase, ExitCause, LeasePhase
from sites.settings import SiteSettings, load_settings
from tests.sites.conftest import SITE_YAML, StartAgent, job
from tests.sites.market import Grant, Market
from tests.sites.slurm_cluster import Cluster
from tests.sites.test_agent import SCRIPT
from tests.sites.waiting import wait_until

SLURM = """\
driver: slurm
slurm: {gpus_per_node: %d, fabric: %s, gateway_host: 127.0.0.1, extra_args: ["--mem=2000M"]}
"""


@pytest.fixture
def fabric() -> str:
    return "trusted"


@pytest.fixture
def settings(tmp_path: Path, cluster: Cluster, fabric: str) -> SiteSettings:
    if not shutil.which("bwrap"):
        pytest.skip("no bubblewrap; on Debian: sudo apt-get install bubblewrap")
    confined = SITE_YAML.replace("sandbox: plain", "sandbox: bubblewrap")
    (tmp_path / "site.yaml").write_text(confined + SLURM % (1, fabric))
    return load_settings(tmp_path / "site.yaml")


def test_gang_of_two_nodes_runs_from_proposal_to_done(
    market: Market, start_agent: StartAgent, settings: SiteSettings, tmp_path: Path
) -> None:
    market.grants["lease_a"] = Grant("lease_a", "job_a", job(market, tmp_path / "work", SCRIPT), gpu_ids=("0", "1"))
    agent = start_agent()
    run = settings.folder / "attempts/lease_a-1/runs/ranks"
    wait_until(lambda: agent.tick() and (run / "node-1" / "warden.json").exists(), limit_s=60)
    assert (run / "relay" / "port.json").exists()
    wait_until(
        lambda: agent.tick() and "lease_a" in market.reports and market.reports["lease_a"].phase is AttemptPhase.EXITED,
        limit_s=100,
    )
    report = market.reports["lease_a"]
    log = market.streams["lease_a", "log"].decode()
    assert (report.cause, report.exit_code, report.detail) == (ExitCause.DONE, 0, ""), log
    assert "rank 0 of 2 safe True" in log
    assert "rank 1 of 2 safe True" in log  # of the other node
    assert report.gateway is not None
    assert report.gateway.samples_by_site == {"hamburg": 1000}
    assert report.outputs["answer.txt"]
    assert sum(usage.gpu_milliseconds for usage in market.usage) > 1000
    market.grants["lease_a"].phase = LeasePhase.ENDED
    agent.tick()


@pytest.mark.parametrize("fabric", ["none"])
def test_lease_of_two_nodes_is_refused_where_the_fabric_is_not_trusted(
    market: Market, start_agent: StartAgent, tmp_path: Path
) -> None:
    market.grants["lease_a"] = Grant("lease_a", "job_a", job(market, tmp_path / "work", "pass"), gpu_ids=("0", "1"))
    agent = start_agent()
    wait_until(lambda: agent.tick() and market.vetoes)
    assert market.vetoes["lease_a"].code == "policy.gpus_per_node"
