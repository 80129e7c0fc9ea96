"""A real broker behind a real socket, and `hansa` as a person would call it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from werkzeug.serving import make_server

from broker.api.app import create_app
from broker.bootstrap import open_market
from broker.cli.main import main
from broker.identity.join import invite_site
from broker.identity.tokens import TokenKind, create_token
from broker.market import Market
from broker.settings import Settings
from broker.tenants import create_tenant
from sites.client import BrokerClient, enrol
from sites.identity import (
    Identity,
    certificate_request_pem,
    decode_join_string,
    prepare_identity,
    site_uri,
    store_identity,
)
from sites.protocol import Heartbeat, Offer, PoolOffer
from tests.broker.cli.calling import Broker, Hansa, Outcome
from training.clock import SystemClock

JOB = """\
name: tiny
workdir: .
run: python train.py
resources: {accelerators: "cpu-slot:2"}
market:
  budget: 2
  workload: {samples: 1000, batch_per_gpu: 4, parameters: 1000, flops_per_sample: 1.0e+6}
"""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    folder = tmp_path_factory.mktemp("broker")
    # The address is known only once the server stands, and the join string must carry it.
    server = make_server("127.0.0.1", 0, _nothing, threaded=True)
    url = f"http://127.0.0.1:{server.server_port}"
    market = open_market(Settings(home=folder / "home", database_url="", redis_url="", public_url=url))
    server.app = create_app(market)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    admin = create_token(market, TokenKind.ADMIN, life_s=3600)
    create_tenant(market, "acme")
    tenant = create_token(market, TokenKind.TENANT, tenant_id="acme", life_s=3600)
    _offer_slots(market, folder / "site")
    yield Broker(market, url, {"admin": admin.text, "acme": tenant.text})
    server.shutdown()
    serving.join()
    market.database.close()


@pytest.fixture
def hansa(broker: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Hansa:
    """Call `hansa` as the tenant, or as whom `who` says ("" for nobody)."""

    def call(*words: str, who: str = "acme", **environment: str) -> Outcome:
        variables = {
            "HANSA_CONFIG": str(tmp_path / "config.toml"),
            "HANSA_URL": broker.url,
            "HANSA_TOKEN": broker.tokens.get(who, ""),
            **environment,
        }
        with monkeypatch.context() as patch:
            for name in ("HANSA_CA", "HANSA_CONTEXT", "HANSA_DEBUG"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["hansa", *words])
            with pytest.raises(SystemExit) as ended:
                main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 1, captured.out, captured.err)

    return call


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "train.py").write_text("print('hello')\n")
    path = folder / "job.yaml"
    path.write_text(JOB)
    return path


def _nothing(_environ: object, _start: object) -> list[bytes]:
    return []


def _offer_slots(market: Market, folder: Path) -> None:
    join = decode_join_string(invite_site(market, "lubeck"))
    key = prepare_identity(folder)
    store_identity(folder, join, enrol(join, certificate_request_pem(key, site_uri("lubeck"))))
    pool = PoolOffer(gpu_type="cpu-slot", gpu_ids=("0", "1"), ask_micros_per_gpu_hour=500_000)
    with BrokerClient(Identity(folder, SystemClock())) as site:
        site.heartbeat(Heartbeat(agent_version="1", boot="b", offer=Offer(pools=(pool,))))
