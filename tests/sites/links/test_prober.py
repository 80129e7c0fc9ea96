"""The agent's part in probes: what it refuses for its owner, what it says when, and what it leaves behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sites.agent import _skills
from sites.doctor import Level, examine
from sites.drivers.process import ProcessDriver
from sites.links.messages import Flow, ProbeOrder, ProbeReport
from sites.links.prober import NEWEST_FILE, NewestProbe, Prober
from sites.protocol import Heartbeat, HeartbeatAnswer, Offer, Skill
from sites.settings import SiteSettings, load_settings
from tests.sites.conftest import SITE_YAML
from tests.sites.waiting import wait_until
from training.clock import SystemClock

CLOCK = SystemClock()
LINKS = "links: [{target: bremen, bandwidth: 100 Mbit/s}]\n"
ORDER = ProbeOrder(
    probe_id="probe_a", peer="bremen", listens=True, streams=2, bytes_max=10**6, seconds_max=1, expires_s=30
)


def site(tmp_path: Path, more: str = "") -> SiteSettings:
    (tmp_path / "site.yaml").write_text(SITE_YAML + LINKS + more)
    settings = load_settings(tmp_path / "site.yaml")
    settings.folder.mkdir(mode=0o700, exist_ok=True)
    return settings


def prober(settings: SiteSettings) -> Prober:
    return Prober(settings, "no CA", ProcessDriver(sys.executable, CLOCK), CLOCK)


def answer(*probes: ProbeOrder, **fields: Any) -> HeartbeatAnswer:
    return HeartbeatAnswer(leases=(), usage_acknowledged={}, heartbeat_s=5, probes=probes or None, **fields)


def follow(at: Prober, *probes: ProbeOrder) -> None:
    at.follow(answer(*probes), set(), CLOCK.monotonic_s())


def refused(settings: SiteSettings, order: ProbeOrder = ORDER, *, peers: tuple[str, ...] = ()) -> str:
    at = prober(settings)
    lease = {"lease_id": "l", "job_id": "j", "tenant_id": "t", "epoch": 1, "gpu_type": "cpu-slot", "gpu_ids": ("0",)}
    terms = {"phase": "active", "price_micros_per_gpu_hour": 1, "term_ends_ms": 1, "liveness_s": 9, "peers": peers}
    said = HeartbeatAnswer.model_validate(answer(order).model_dump() | {"leases": [lease | terms]})
    at.follow(said, set(), CLOCK.monotonic_s())
    ((reply,), _) = at.speak()
    assert bool(reply.refused) == (reply.probe_key is None) == (reply.csr_pem is None)
    return reply.refused


def test_an_owner_s_terms_are_kept(tmp_path: Path) -> None:
    assert refused(site(tmp_path), peers=("bremen",)).startswith("a job that spans sites runs here")
    assert refused(site(tmp_path, "probes: {while_syncing: true}\n"), peers=("bremen",)) == ""
    assert refused(site(tmp_path)) == ""
    assert "allows no probes" in refused(site(tmp_path, "probes: {allowed: false}\n"))
    assert "gb_per_day" in refused(site(tmp_path, "probes: {gb_per_day: 0.001}\n"))
    dials_only = site(tmp_path).model_copy(update={"listen": None})
    assert "listen.ports" in refused(dials_only)
    assert refused(dials_only, ORDER.model_copy(update={"listens": False})) == ""


def test_an_owner_who_allows_none_says_no_skill(tmp_path: Path) -> None:
    assert Skill.PROBE in _skills(site(tmp_path))
    assert Skill.PROBE not in _skills(site(tmp_path, "probes: {allowed: false}\n"))


def test_a_heartbeat_beside_no_probe_says_nothing_that_an_older_broker_would_refuse(tmp_path: Path) -> None:
    at = prober(site(tmp_path))
    replies, reports = at.speak()
    beat = Heartbeat(
        agent_version="1",
        boot="b",
        offer=Offer(pools=()),
        probe_terms=at.terms,
        probe_replies=replies,
        probe_reports=reports,
    )
    assert not [name for name in beat.model_dump(exclude_defaults=True) if name.startswith("probe")]


def test_what_became_of_a_probe_is_said_until_it_is_no_longer_ordered(tmp_path: Path) -> None:
    settings = site(tmp_path)
    at = prober(settings)
    follow(at, ORDER)
    assert at.has_news
    ((reply,), reports) = at.speak()
    assert reports == ()
    follow(at, ORDER)
    assert not at.has_news  # said once at once; then with every heartbeat
    assert reply.address is not None
    assert reply.address in at.addresses
    # It cannot be begun with that, and its process says why.
    ready = ORDER.model_copy(update={"peer_key": "0" * 64, "certificate_pem": "no certificate"})
    follow(at, ready)
    wait_until(lambda: at.has_news, limit_s=90)
    (_, (report,)) = at.speak()
    assert "certificate" in report.failed
    kept = NewestProbe.model_validate_json((settings.folder / NEWEST_FILE).read_bytes())
    assert kept.report == report
    follow(at)
    assert at.speak() == ((), ())
    assert not list((settings.folder / "probes").glob("*"))


@pytest.mark.parametrize(
    ("report", "level", "told"),
    [
        (ProbeReport(probe_id="p", failed="refused"), Level.WARNING, "refused"),
        (None, Level.OK, "has not asked"),
        (90.0, Level.OK, "90.0 Mbit/s out, 90.0 in, 20.0 ms there and back"),
        (40.0, Level.WARNING, "site.yaml declares 100.0 out"),
    ],
    ids=["failed", "none", "well", "slower than declared"],
)
def test_the_doctor_tells_the_newest_probe(tmp_path: Path, report: Any, level: Level, told: str) -> None:
    settings = site(tmp_path).model_copy(update={"python": "/bin/false"})
    if isinstance(report, float):
        flow = Flow(size_bytes=10**6, seconds=1, bits_per_s=report * 1e6)
        report = ProbeReport(probe_id="p", sent=flow, received=flow, round_trip_s=0.02)
    if report is not None:
        kept = NewestProbe(peer="bremen", ended_ms=CLOCK.now_ms(), report=report)
        (settings.folder / NEWEST_FILE).write_text(kept.model_dump_json())
    (finding,) = [each for each in examine(settings, CLOCK) if each.check == "links"]
    assert finding.level is level
    assert told in finding.detail
    assert bool(finding.remedy) == (level is not Level.OK)
