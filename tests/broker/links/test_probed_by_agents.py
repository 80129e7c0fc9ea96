"""Two real agents, the real broker's services between them: a probe from the decision to the next round's snapshot.

The agents' heartbeats are handed to the broker as the wire carries them; the probe itself goes over loopback, between two
processes with certificates for it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from broker.bootstrap import open_market
from broker.database.probes import LinkMeasurement, LinkProbe
from broker.database.tables import Link, Site
from broker.heartbeat import receive
from broker.links.probes import plan_probes
from broker.market import Market
from broker.rounds.snapshot import take
from broker.settings import Settings
from broker.transitions import SiteState, change_state
from sites.agent import Agent
from sites.client import BrokerClient
from sites.doctor import Level, examine
from sites.identity import (
    Identity,
    JoinString,
    certificate_request_pem,
    prepare_identity,
    site_uri,
    store_identity,
)
from sites.protocol import EnrolmentAnswer, Heartbeat, HeartbeatAnswer
from sites.settings import SiteSettings, load_settings
from tests.sites.waiting import wait_until
from training.clock import SystemClock

DECLARED_BITS_PER_S = 1e12
# Enough segments for loss to be told, of loopback's 64 KB each.
PROBE_BYTES = 16_000_000
SITE_YAML = """\
site_id: {name}
folder: ./{name}
pools: [{{gpu_type: cpu-slot, gpus: 1, ask: 0.5}}]
links: [{{target: {other}, bandwidth: 1 Tbit/s, delay_ms: 500}}]
listen: {{host: 127.0.0.1}}
sandbox: plain
i_trust_all_tenants: true
calibrate: false
"""


class Wire(BrokerClient):
    """A heartbeat's way to the broker without sockets: what is sent and answered is serialised as on the wire."""

    def __init__(self, identity: Identity, market: Market) -> None:
        super().__init__(identity)
        self.market = market
        self.site_id = identity.site_id
        self.sequence = 0
        self.answers: list[dict[str, Any]] = []

    def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatAnswer:
        self.sequence += 1
        sent = Heartbeat.model_validate_json(heartbeat.model_dump_json(exclude_defaults=True))
        answer = receive(self.market, self.site_id, sent, sequence=self.sequence)
        self.answers.append(answer.model_dump(mode="json", exclude_none=True))
        return HeartbeatAnswer.model_validate(self.answers[-1])


@pytest.fixture
def market(tmp_path: Path) -> Iterator[Market]:
    settings = Settings(home=tmp_path / "broker", link_probe_interval_s=0, link_probe_bytes_max=PROBE_BYTES)
    market = open_market(settings, clock=SystemClock())
    yield market
    market.database.close()


@dataclass
class Pair:
    """Both agents, each beating whenever it is told to."""

    agents: list[Agent]
    wires: list[Wire]
    settings: list[SiteSettings]

    def beat(self) -> None:
        assert all(agent.tick() for agent in self.agents)


@pytest.fixture
def pair(market: Market, tmp_path: Path) -> Iterator[Pair]:
    agents, wires, settings = [], [], []
    for name, other in (("bremen", "hamburg"), ("hamburg", "bremen")):
        (tmp_path / f"{name}.yaml").write_text(SITE_YAML.format(name=name, other=other))
        settings.append(load_settings(tmp_path / f"{name}.yaml"))
        _join(market, settings[-1])
        clock = SystemClock()
        identity = Identity(settings[-1].folder, clock)
        wires.append(Wire(identity, market))
        agents.append(Agent(settings[-1], identity, wires[-1], clock))
    yield Pair(agents, wires, settings)
    for part in (*agents, *wires):
        part.close()


def _join(market: Market, settings: SiteSettings) -> None:
    key = prepare_identity(settings.folder)
    csr_pem = certificate_request_pem(key, site_uri(settings.site_id))
    answer = EnrolmentAnswer(
        certificate_pem=market.authority.issue_site_certificate(csr_pem, settings.site_id, 3600).pem,
        ca_pem=market.authority.ca_pem,
        authority_key=market.authority.authority_key,
        heartbeat_s=5.0,
    )
    invitation = JoinString(url="https://127.0.0.1:1", site_id=settings.site_id, token="-", ca_pem=answer.ca_pem)
    store_identity(settings.folder, invitation, answer)

    def work(session: Any) -> None:
        site = Site(site_id=settings.site_id, offer="", joined_ms=0)
        session.add(site)
        change_state(session, site, SiteState.LIVE, now_ms=0)

    market.database.write("join", work)


def test_two_agents_measure_their_link_and_the_market_counts_with_it(market: Market, pair: Pair) -> None:
    pair.beat()
    declared = market.database.read(lambda session: [link.delay_s for link in session.scalars(select(Link))])
    assert declared == [0.5, 0.5]
    assert plan_probes(market) == 1

    def is_over() -> LinkProbe | None:
        pair.beat()
        probe = market.database.read(lambda session: session.scalars(select(LinkProbe)).one())
        return probe if probe.ended_ms is not None else None

    probe = wait_until(is_over, limit_s=90)
    assert (probe.state, probe.bytes_max) == ("done", PROBE_BYTES), probe.detail
    assert probe.bytes_charged == 2 * PROBE_BYTES
    rows = market.database.read(lambda session: list(session.scalars(select(LinkMeasurement))))
    assert {(row.source, row.target) for row in rows} == {("bremen", "hamburg"), ("hamburg", "bremen")}
    assert all(row.delay_s is not None and row.delay_s < 0.5 for row in rows)
    assert all(row.loss is not None and row.loss < 0.5 for row in rows)
    snapshot = market.database.read(lambda session: take(session, market)).snapshot
    counted = {(link.from_site, link.to_site): link for link in snapshot.links}
    for row in rows:
        link = counted[row.source, row.target]
        assert link.bandwidth_bits_per_s == row.bandwidth_bits_per_s < DECLARED_BITS_PER_S
        assert link.delay_s == row.delay_s
    # Nothing of it is left at the sites but the newest report, which the doctor tells.
    pair.beat()
    for settings in pair.settings:
        assert not list((settings.folder / "probes").glob("*"))
        (finding,) = [each for each in examine(settings, SystemClock()) if each.check == "links"]
        assert finding.level is Level.WARNING  # loopback is no terabit a second, as declared
        assert "Mbit/s out" in finding.detail
        assert "declare less" in finding.remedy
    assert "probes" in pair.wires[0].answers[0]


def test_an_owner_who_allows_no_probes_is_sent_no_field_of_them(market: Market, pair: Pair) -> None:
    for agent in pair.agents:
        probes = agent._settings.probes.model_copy(update={"allowed": False})
        agent._settings = agent._settings.model_copy(update={"probes": probes})
    pair.beat()
    assert plan_probes(market) == 0
    assert "probes" not in pair.wires[0].answers[0]
