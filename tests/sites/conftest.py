from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sites import bundle
from sites.agent import Agent
from sites.client import BrokerClient, enrol
from sites.identity import (
    Identity,
    certificate_request_pem,
    decode_join_string,
    prepare_identity,
    site_uri,
    store_identity,
)
from sites.settings import SiteSettings, load_settings
from tests.sites.market import Market
from tests.sites.slurm_cluster import cluster
from tests.sites.waiting import wait_until
from training.clock import Clock, SystemClock
from training.spec import JobSpec

__all__ = ["cluster"]  # a fixture for all tests of sites

SITE_YAML = """\
site_id: hamburg
folder: ./hamburg
pools:
  - {gpu_type: cpu-slot, gpus: 4, ask: 0.5}
listen: {host: 127.0.0.1}
sandbox: plain
i_trust_all_tenants: true
calibrate: false
"""


@pytest.fixture
def market() -> Iterator[Market]:
    market = Market()
    yield market
    market.close()


@pytest.fixture
def sandbox() -> str:
    """How strangers' code is confined; a test that asks for another way parametrises this."""
    return "plain"


@pytest.fixture
def limits() -> str:
    """The limits in the site's settings, as YAML."""
    return "{}"


@pytest.fixture
def data_yaml() -> str:
    """The site's part in datasets, as YAML; where it takes one, datasets may come from this host's own addresses."""
    return "{}"


@pytest.fixture
def settings(tmp_path: Path, sandbox: str, limits: str, data_yaml: str) -> SiteSettings:
    if sandbox == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("no bubblewrap; on Debian: sudo apt-get install bubblewrap")
    (tmp_path / "site.yaml").write_text(
        SITE_YAML.replace("sandbox: plain", f"sandbox: {sandbox}") + f"limits: {limits}\ndata: {data_yaml}\n"
        "policy: {data_sources_allowed: ['http://127.0.0.1/', 'file:///']}\n"
    )
    return load_settings(tmp_path / "site.yaml")


@pytest.fixture
def identity(market: Market, settings: SiteSettings) -> Identity:
    invitation = decode_join_string(market.join_string("hamburg"))
    key = prepare_identity(settings.folder)
    store_identity(settings.folder, invitation, enrol(invitation, certificate_request_pem(key, site_uri("hamburg"))))
    return Identity(settings.folder, SystemClock())


StartAgent = Callable[..., Agent]


@pytest.fixture
def start_agent(market: Market, settings: SiteSettings, identity: Identity) -> Iterator[StartAgent]:
    """Return a function that starts an agent in this process, with a clock of one's own if wanted."""
    agents: list[Agent] = []
    clients: list[BrokerClient] = []

    def start(clock: Clock | None = None) -> Agent:
        clients.append(BrokerClient(identity))
        agents.append(Agent(settings, identity, clients[-1], clock or SystemClock()))
        return agents[-1]

    yield start
    market.answers = True
    for agent in agents[-1:]:
        market.grants.clear()
        wait_until(lambda agent=agent: agent.tick() and not agent.records)
        agent.close()
    for client in clients:
        client.close()


def job(market: Market, folder: Path, script: str, **changes: object) -> JobSpec:
    """Return a job that runs `script`, its workdir stored in the market."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(script)
    document = {
        "name": "job",
        "run": "python train.py",
        "workdir_digest": market.store(bundle.pack(folder)),
        "resources": {"accelerators": [{"gpu_type": "cpu-slot", "count_min": 1, "count_max": 4}]},
        "market": {
            "budget_micros": 1_000_000,
            "workload": {"samples": 1000, "batch_per_gpu": 10, "parameters": 1000, "flops_per_sample": 1e6},
            "sync": {"strategy": "local", "codec": "fp32"},
        },
    }
    return JobSpec.model_validate(document | changes)
