"""A probe's way through the market: asked of two sites, certificates for it alone, two reports, one measurement each way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from sqlalchemy import select

from broker.database.probes import LinkMeasurement, LinkProbe
from broker.database.tables import Site
from broker.links.probes import plan_probes
from broker.retention import DAY_MS, LINKS_LIFE_MS, sweep
from broker.rounds.snapshot import take
from sites.identity import certificate_request_pem
from sites.links.messages import Flow, ProbeOrder, ProbeReply, ProbeReport, ProbeTerms
from sites.links.probe import PROBE_EPOCH
from sites.protocol import LinkOffer
from tests.broker.speaking import Scene, SpeakingSite, without
from training.roundlog.credentials import peer_uri, read_peer
from training.roundlog.signing import public_hex

MEGABIT = 1e6
PATIENCE_S = 60
SKILLS = ("gang", "probe")
INTERVAL_S = 100.0


@pytest.fixture
def scene(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    """A market that leaves a pair alone for less long than by default."""
    scene = Scene(market_url, tmp_path / "home", link_probe_interval_s=INTERVAL_S)
    yield scene
    scene.close()


def able(scene: Scene, *names: str) -> list[SpeakingSite]:
    """Let these sites say that they can be probed, long enough after they joined."""
    scene.clock.advance_s(INTERVAL_S)
    sites = [scene.sites[name] for name in names]
    for site in sites:
        site.say(skills=SKILLS)
    return sites


def order(site: SpeakingSite, **items: Any) -> ProbeOrder:
    """Look, and return the only probe that is ordered."""
    (found,) = site.say(skills=SKILLS, **items).probes or ()
    return found


def reply(site: SpeakingSite, found: ProbeOrder, **changes: Any) -> ProbeReply:
    csr_pem = certificate_request_pem(site.key, peer_uri(found.probe_id, PROBE_EPOCH, site.site_id))
    fields = {"probe_key": public_hex(site.key), "csr_pem": csr_pem}
    fields |= {"address": "127.0.0.1:7600"} if found.listens else {}
    return ProbeReply(probe_id=found.probe_id, **{**fields, **changes})


def begun(scene: Scene, *names: str) -> tuple[list[SpeakingSite], list[ProbeOrder]]:
    """Bring a probe between two sites to where both run it."""
    sites = able(scene, *names)
    assert plan_probes(scene.market) == 1
    for site in sites:
        order(site, probe_replies=(reply(site, order(site)),))
    return sites, [order(site) for site in sites]


def report(found: ProbeOrder, sent: float = 50, received: float = 40, trip_s: float = 0.1) -> ProbeReport:
    def flow(megabits: float) -> Flow:
        return Flow(size_bytes=1_000_000, seconds=8 / megabits, bits_per_s=megabits * MEGABIT)

    return ProbeReport(probe_id=found.probe_id, sent=flow(sent), received=flow(received), round_trip_s=trip_s)


def probe(scene: Scene) -> LinkProbe:
    return scene.read(select(LinkProbe).order_by(LinkProbe.probe_id.desc()))[0]


def links(scene: Scene) -> dict[tuple[str, str], tuple[float, float]]:
    """Return bandwidth and delay of each link as the next round would see them."""
    snapshot = scene.market.database.read(lambda session: take(session, scene.market)).snapshot
    return {(link.from_site, link.to_site): (link.bandwidth_bits_per_s, link.delay_s) for link in snapshot.links}


def test_a_probe_goes_from_order_to_the_market_s_snapshot(scene: Scene) -> None:
    (ada, bob), (to_ada, to_bob) = begun(scene, "ada", "bob")
    assert (to_ada.listens, to_bob.listens) == (True, False)
    assert to_bob.address == "127.0.0.1:7600"
    for site, found, other in ((ada, to_ada, bob), (bob, to_bob, ada)):
        assert found.peer == other.site_id
        assert found.peer_key == public_hex(other.key)
        assert found.certificate_pem is not None
        peer = read_peer(x509.load_pem_x509_certificate(found.certificate_pem.encode()))
        assert (peer.job_id, peer.epoch, peer.site_id) == (found.probe_id, PROBE_EPOCH, site.site_id)
        assert peer.not_after_ms - scene.clock.now_ms() <= (3 * PATIENCE_S) * 1000
    before = links(scene)
    rounds_due = scene.is_due()
    assert ada.say(skills=SKILLS, probe_reports=(report(to_ada, 50, 40),)).probes
    assert bob.say(skills=SKILLS, probe_reports=(report(to_bob, 42, 48),)).probes == ()
    assert probe(scene).state == "done"
    assert probe(scene).bytes_charged == 2_000_000
    assert scene.is_due() or rounds_due
    after = links(scene)
    assert after["ada", "bob"] == (48 * MEGABIT, 0.05)  # ada sent 50, bob received 48; declared are 100
    assert after["bob", "ada"] == (40 * MEGABIT, 0.05)
    assert after["ada", "cid"] == before["ada", "cid"] == (1e8, 0.02)
    assert [event.after for event in scene.events("link_probe")] == ["asked", "running", "done"]


def test_an_agent_without_the_skill_is_sent_no_field_of_it(scene: Scene) -> None:
    able(scene, "ada", "bob")
    scene.sites["ada"].say(skills=("gang",))
    assert plan_probes(scene.market) == 0
    answer = scene.sites["ada"].beat()
    assert answer.probes is None
    assert "probes" not in answer.model_dump(mode="json", exclude_none=True)


def test_sites_without_links_both_ways_are_not_probed(scene: Scene) -> None:
    ada, _ = able(scene, "ada", "bob")
    ada.offer = without(ada.offer, links=(LinkOffer(target="cid", bandwidth_bits_per_s=1e8, delay_s=0.02),))
    ada.say(skills=SKILLS)
    assert plan_probes(scene.market) == 0


def test_a_pair_rests_after_a_probe_until_its_measurement_is_old(scene: Scene) -> None:
    sites, orders = begun(scene, "ada", "bob")
    for site, found in zip(sites, orders, strict=True):
        site.say(skills=SKILLS, probe_reports=(report(found),))
    scene.pass_s(INTERVAL_S + 1)
    for site in sites:
        site.say(skills=SKILLS)
    assert plan_probes(scene.market) == 0
    scene.clock.advance_s(86_400 / 2)
    for site in sites:
        site.say(skills=SKILLS)
    assert plan_probes(scene.market) == 1


def test_a_disagreement_is_named_and_the_lower_figure_counts(scene: Scene) -> None:
    (ada, bob), (to_ada, to_bob) = begun(scene, "ada", "bob")
    ada.say(skills=SKILLS, probe_reports=(report(to_ada, sent=5000),))
    bob.say(skills=SKILLS, probe_reports=(report(to_bob, received=20),))
    assert links(scene)["ada", "bob"][0] == 20 * MEGABIT
    assert "ada says 5e+03 Mbit/s went, bob that 20 came" in probe(scene).detail
    rows = {row.source: row.disagreement for row in scene.read(select(LinkMeasurement))}
    assert rows["ada"]
    assert not rows["bob"]
    assert "ada says" in scene.events("link_probe")[-1].detail


def test_no_probe_begins_where_a_job_that_spans_sites_runs(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    members = scene.start(job_id)
    assert len(members) == 2
    able(scene, *(site.site_id for site in members))
    assert plan_probes(scene.market) == 0
    for site in members:
        site.say(skills=SKILLS, probe_terms=ProbeTerms(while_syncing=True))
    assert plan_probes(scene.market) == 1


def test_a_probe_gives_way_to_a_job_that_begins_before_it(scene: Scene) -> None:
    sites = able(scene, "ada", "bob")
    plan_probes(scene.market)
    wanted = [(site, order(site)) for site in sites]
    job_id = scene.submit(4, sites_max=2, sites_allowed=["ada", "bob"])
    scene.round()
    assert {lease.site_id for lease in scene.leases(job_id)} == {"ada", "bob"}
    for site, found in wanted:
        site.say(skills=SKILLS, probe_replies=(reply(site, found),))
    assert (probe(scene).state, probe(scene).bytes_charged) == ("failed", 0)
    assert "a job that spans sites began" in probe(scene).detail


def test_an_owner_s_refusal_ends_the_probe_with_its_reason(scene: Scene) -> None:
    ada, _ = able(scene, "ada", "bob")
    plan_probes(scene.market)
    found = order(ada)
    assert (
        ada.say(skills=SKILLS, probe_replies=(ProbeReply(probe_id=found.probe_id, refused="not today"),)).probes == ()
    )
    assert probe(scene).detail == "ada: not today"


@pytest.mark.parametrize(
    "changes",
    [{"probe_key": "0" * 64}, {"csr_pem": "no request"}, {"address": None}],
    ids=lambda item: next(iter(item)),
)
def test_a_reply_that_cannot_be_used_ends_the_probe(scene: Scene, changes: dict[str, Any]) -> None:
    ada, _ = able(scene, "ada", "bob")
    plan_probes(scene.market)
    ada.say(skills=SKILLS, probe_replies=(reply(ada, order(ada), **changes),))
    assert probe(scene).state == "failed"
    assert probe(scene).detail.startswith("ada: ")


def test_a_site_says_nothing_of_a_probe_that_is_not_its_own(scene: Scene) -> None:
    cid = scene.sites["cid"]
    _, (to_ada, _) = begun(scene, "ada", "bob")
    forged = ProbeReport(probe_id=to_ada.probe_id, failed="never ran")
    cid.say(skills=SKILLS, probe_reports=(forged,), probe_replies=(reply(cid, to_ada),))
    assert probe(scene).state == "running"
    assert public_hex(cid.key) not in {probe(scene).dialler_key, probe(scene).listener_key}


def test_a_report_before_the_probe_began_is_no_report(scene: Scene) -> None:
    ada, _ = able(scene, "ada", "bob")
    plan_probes(scene.market)
    found = order(ada)
    ada.say(skills=SKILLS, probe_reports=(report(found),))
    assert probe(scene).state == "asked"


def test_a_silent_end_is_named_when_the_probe_is_overdue_and_it_costs_its_bytes(scene: Scene) -> None:
    (ada, _), (to_ada, _) = begun(scene, "ada", "bob")
    ada.say(skills=SKILLS, probe_reports=(report(to_ada),))
    scene.clock.advance_s(PATIENCE_S)
    plan_probes(scene.market)
    found = probe(scene)
    assert (found.state, found.detail) == ("failed", "bob did not answer in time")
    assert found.bytes_charged == 2 * found.bytes_max == 50_000_000


def test_bytes_of_a_day_are_never_exceeded_however_often_probes_fail(scene: Scene) -> None:
    sites = able(scene, "ada", "bob")
    terms = ProbeTerms(bytes_per_day=120_000_000)  # two probes of 2 x 25 MB, and a rest
    for _ in range(6):
        scene.clock.advance_s(max(INTERVAL_S, PATIENCE_S))
        for site in sites:
            site.say(skills=SKILLS, probe_terms=terms)
        if plan_probes(scene.market):
            for site in sites:
                site.say(skills=SKILLS, probe_terms=terms, probe_replies=(reply(site, order(site)),))
    assert len(scene.read(select(LinkProbe.probe_id))) == 2
    scene.clock.advance_s(86_400)
    for site in sites:
        site.say(skills=SKILLS, probe_terms=terms)
    assert plan_probes(scene.market) == 1


def test_a_market_without_bytes_for_probes_asks_for_none(scene: Scene) -> None:
    able(scene, "ada", "bob")
    scene.market.settings.link_probe_bytes_per_day = 0
    assert plan_probes(scene.market) == 0


def test_a_failed_probe_keeps_an_old_measurement_in_force(scene: Scene) -> None:
    sites, orders = begun(scene, "ada", "bob")
    for site, found in zip(sites, orders, strict=True):
        site.say(skills=SKILLS, probe_reports=(report(found),))
    scene.clock.advance_s(3 * 86_400)
    assert links(scene)["ada", "bob"][0] == 100 * MEGABIT  # what is declared stands again
    for site in sites:
        site.say(skills=SKILLS)
    plan_probes(scene.market)
    scene.clock.advance_s(PATIENCE_S)
    plan_probes(scene.market)
    assert probe(scene).state == "failed"
    assert links(scene)["ada", "bob"][0] == 40 * MEGABIT


def test_measurements_are_forgotten_after_their_retention(scene: Scene) -> None:
    sites, orders = begun(scene, "ada", "bob")
    for site, found in zip(sites, orders, strict=True):
        site.say(skills=SKILLS, probe_reports=(report(found),))
    scene.clock.advance_s((LINKS_LIFE_MS - DAY_MS) / 1000)
    sweep(scene.market)
    assert len(scene.read(select(LinkMeasurement.probe_id))) == 2
    scene.clock.advance_s(DAY_MS / 1000)
    sweep(scene.market)
    assert scene.read(select(LinkMeasurement.probe_id)) == scene.read(select(LinkProbe.probe_id)) == []
    assert scene.read(select(Site.site_id))
