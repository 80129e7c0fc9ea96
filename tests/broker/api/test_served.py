"""The API as it is served: gunicorn, TLS with the market's own certificate, the agent's own client."""

from __future__ import annotations

import hashlib
import io
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from broker.bootstrap import open_market
from broker.identity.join import invite_site
from broker.identity.tokens import TokenKind, create_token
from broker.market import Market
from broker.settings import Settings
from broker.supervise.processes import ProcessSpec, Supervisor
from sites.client import BrokerClient, enrol
from sites.errors import RequestRefusedError
from sites.identity import (
    Identity,
    certificate_request_pem,
    decode_join_string,
    prepare_identity,
    site_uri,
    store_identity,
)
from sites.protocol import Heartbeat, Offer
from training.clock import SystemClock


@dataclass(frozen=True)
class Served:
    market: Market
    url: str
    ca: Path


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"https://127.0.0.1:{port}"
    market = open_market(Settings(home=tmp_path / "home", public_url=url))
    certificate = market.authority.server_certificate()
    ca = tmp_path / "ca.pem"
    ca.write_text(market.authority.ca_pem)

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/healthz", verify=str(ca), trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    supervisor = Supervisor(tmp_path / "logs")
    argv = (
        *(sys.executable, "-m", "gunicorn", "broker.api.wsgi:application()", "-k", "gthread", "--threads", "4"),
        *("-b", f"127.0.0.1:{port}"),
        *("--certfile", str(certificate.certificate_path), "--keyfile", str(certificate.key_path)),
    )
    env = {"HANSA_HOME": str(tmp_path / "home"), "HANSA_PUBLIC_URL": url}
    try:
        supervisor.start(ProcessSpec(name="api", argv=argv, cwd=Path(__file__).parents[3], env=env, ready=answers))
        yield Served(market, url, ca)
    finally:
        supervisor.stop()
        market.database.close()


def test_an_agent_joins_beats_and_is_refused_over_tls(served: Served, tmp_path: Path) -> None:
    join = decode_join_string(invite_site(served.market, "lyon"))
    folder = tmp_path / "site"
    csr = certificate_request_pem(prepare_identity(folder), site_uri("lyon"))
    store_identity(folder, join, enrol(join, csr))
    identity = Identity(folder, SystemClock())
    assert identity.authority_key == served.market.authority.authority_key
    with BrokerClient(identity) as broker:
        answer = broker.heartbeat(Heartbeat(agent_version="1", boot="b", offer=Offer(pools=())))
        assert answer.leases == ()
        content = b"nobody's"
        with pytest.raises(RequestRefusedError) as refused:
            broker.store_artifact(hashlib.sha256(content).hexdigest(), io.BytesIO(content), len(content))
        assert (refused.value.status, refused.value.problem_code) == (404, "request.not_found")
    token = create_token(served.market, TokenKind.ADMIN, life_s=60).text
    with httpx.Client(base_url=served.url, verify=str(served.ca), trust_env=False) as client:
        rows = client.get("/v1/admin/sites", headers={"Authorization": f"Bearer {token}"}).json()["items"]
        assert [(row["site_id"], row["state"]) for row in rows] == [("lyon", "live")]
        assert client.get("/openapi/openapi.json").json()["info"]["title"] == "Hansa"
        large = client.post("/v1/quote", content=(b" " * 65_536 for _ in range(10)))
        assert large.status_code == 413


def test_no_secret_stands_in_the_logs_of_a_served_market(served: Served, tmp_path: Path) -> None:
    token = create_token(served.market, TokenKind.ADMIN, life_s=60).text
    with httpx.Client(base_url=served.url, verify=str(served.ca), trust_env=False) as client:
        headers = {"Authorization": f"Bearer {token}"}
        made = client.post("/v1/admin/sites/invite", json={"site_id": "oslo"}, headers=headers).json()["join_string"]
        client.get("/v1/account", headers=headers)
        client.post("/site/v1/enrol", json={"site_id": "oslo", "join_token": "0" * 64, "csr_pem": "x"})
    secrets = [token.split("_")[3], decode_join_string(made).token, made]
    read = [path.read_text(errors="replace") for path in tmp_path.rglob("*.log")]
    assert read, "the supervisor keeps logs"
    assert not [secret for secret in secrets for text in read if secret in text]
