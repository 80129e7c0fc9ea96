"""Probes from order to measurement: orders ride in the answers to heartbeats, replies and reports come with the next ones.

    asked     both sites are asked for a key        -> running when both have replied
    running   both have a certificate for this probe, the dialler the address   -> done when both have reported
    done, failed

Which pairs, and when, `broker.links.choice` decides; `broker.links.verdict` what two reports come to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.database.probes import LinkMeasurement, LinkProbe
from broker.database.tables import Lease, Link, Site
from broker.identity.errors import CertificateRequestError
from broker.links.choice import ProbePair, ProbeSite, choose
from broker.links.estimates import read_estimates
from broker.links.states import ProbeState, change_probe
from broker.links.verdict import judge
from broker.market import Market
from broker.transitions import LeaseState, SiteState, note_change
from sites.links.messages import ProbeOrder, ProbeReply, ProbeReport, ProbeTerms
from sites.links.probe import PROBE_EPOCH
from sites.protocol import Heartbeat, Skill

DAY_MS: Final = 86_400_000
# As a long fat pipe needs them, and as a gateway opens connections for one blob.
STREAMS: Final = 4
SECONDS_MAX: Final = 4.0
# For both sites to reply, or to run the probe: some heartbeats, and what a process takes to start on a busy host.
PATIENCE_S: Final = 60.0
PATIENCE_HEARTBEATS: Final = 4
# A clock that is a little ahead must not find the certificate ended; the key is pinned, and serves once.
CERTIFICATE_MARGIN_S: Final = 60
_LIVE: Final = (ProbeState.ASKED, ProbeState.RUNNING)


def plan_probes(market: Market) -> int:
    """End the probes that are overdue, begin those that are due; return how many were begun."""

    def work(session: Session) -> set[str]:
        now_ms = market.clock.now_ms()
        for probe in _live_probes(session):
            if now_ms >= probe.expires_ms:
                _fail(session, probe, now_ms, f"{_missing(probe)} did not answer in time")
        session.flush()
        return _begin(session, market, now_ms)

    woken = market.database.write("link probes", work)
    for site_id in sorted(woken):
        market.doorbell.wake_site(site_id)
    return len(woken) // 2


def take_word(session: Session, market: Market, site: Site, heartbeat: Heartbeat) -> set[str]:
    """Take what a heartbeat says of probes; return the sites that should look at once."""
    allows = Skill.PROBE in heartbeat.skills
    site.probe_terms = heartbeat.probe_terms.model_dump_json() if allows else None
    wake: set[str] = set()
    for reply in heartbeat.probe_replies:
        probe = _of(session, site.site_id, reply.probe_id)
        if probe is not None and probe.state == ProbeState.ASKED:
            wake |= _take_reply(session, market, probe, site.site_id, reply)
    for report in heartbeat.probe_reports:
        probe = _of(session, site.site_id, report.probe_id)
        if probe is not None and probe.state == ProbeState.RUNNING:
            _take_report(session, market, probe, site.site_id, report)
    return wake - {site.site_id}


def orders_for(session: Session, market: Market, heartbeat: Heartbeat, site_id: str) -> tuple[ProbeOrder, ...] | None:
    """Return the probes that a site should take part in now; None for an agent that understands none."""
    if Skill.PROBE not in heartbeat.skills:
        return None
    now_ms = market.clock.now_ms()
    return tuple(
        _order(probe, site_id, now_ms)
        for probe in _live_probes(session)
        if site_id in {probe.dialler, probe.listener} and probe.expires_ms > now_ms
    )


# -- what sites say ---------------------------------------------------------------------------------


def _take_reply(session: Session, market: Market, probe: LinkProbe, site_id: str, reply: ProbeReply) -> set[str]:
    now_ms, listens = market.clock.now_ms(), site_id == probe.listener
    if (probe.listener_key if listens else probe.dialler_key) is not None:
        return set()  # the first key stands: its certificate may be on the way
    try:
        certificate = _certificate(market, probe, site_id, reply)
    except CertificateRequestError as error:
        _fail(session, probe, now_ms, f"{site_id}: {error}")
        return set()
    if listens:
        probe.listener_key, probe.listener_certificate, probe.address = reply.probe_key, certificate, reply.address
    else:
        probe.dialler_key, probe.dialler_certificate = reply.probe_key, certificate
    ends = {probe.dialler, probe.listener}
    if probe.listener_key is None or probe.dialler_key is None:
        return set()
    if _syncing(session, _terms(session, ends)):
        _fail(session, probe, now_ms, "a job that spans sites began there meanwhile")
        return set()
    probe.expires_ms = now_ms + round(_patience_s(market) * 1000)
    probe.bytes_charged = 2 * probe.bytes_max
    change_probe(session, probe, ProbeState.RUNNING, now_ms=now_ms)
    return ends


def _certificate(market: Market, probe: LinkProbe, site_id: str, reply: ProbeReply) -> str:
    """Return a certificate for this probe alone. Raises CertificateRequestError where a site is not ready for it."""
    if reply.refused:
        raise CertificateRequestError(reply.refused)
    if reply.probe_key is None or reply.csr_pem is None or (site_id == probe.listener and reply.address is None):
        raise CertificateRequestError("it replied without a key, a request or an address")
    issued = market.authority.issue_attempt_certificate(
        reply.csr_pem,
        job_id=probe.probe_id,
        epoch=PROBE_EPOCH,
        site_id=site_id,
        life_s=round(2 * _patience_s(market)) + CERTIFICATE_MARGIN_S,
        attempt_key=reply.probe_key,
    )
    return issued.pem


def _take_report(session: Session, market: Market, probe: LinkProbe, site_id: str, report: ProbeReport) -> None:
    now_ms = market.clock.now_ms()
    if site_id == probe.listener:
        probe.listener_report = report.model_dump_json()
    else:
        probe.dialler_report = report.model_dump_json()
    if report.failed:
        _fail(session, probe, now_ms, f"{site_id}: {report.failed}")
        return
    if probe.dialler_report is None or probe.listener_report is None:
        return
    reports = {
        probe.dialler: ProbeReport.model_validate_json(probe.dialler_report),
        probe.listener: ProbeReport.model_validate_json(probe.listener_report),
    }
    disagreements = []
    for source, target in ((probe.dialler, probe.listener), (probe.listener, probe.dialler)):
        verdict = judge(reports[source], reports[target], (source, target))
        if verdict is None:
            _fail(session, probe, now_ms, f"one end saw nothing of what went from {source} to {target}")
            return
        disagreements += [verdict.disagreement] if verdict.disagreement else []
        session.add(
            LinkMeasurement(
                source=source,
                target=target,
                probe_id=probe.probe_id,
                measured_ms=now_ms,
                bandwidth_bits_per_s=verdict.bandwidth_bits_per_s,
                delay_s=verdict.delay_s,
                loss=verdict.loss,
                sent_bits_per_s=verdict.sent_bits_per_s,
                received_bits_per_s=verdict.received_bits_per_s,
                disagreement=verdict.disagreement[:1000],
            )
        )
    moved = [
        sum(flow.size_bytes for flow in (report.sent, report.received) if flow is not None)
        for report in reports.values()
    ]
    probe.bytes_charged = min(probe.bytes_charged, max(moved))
    probe.detail = "; ".join(dict.fromkeys(disagreements))[:1000]
    change_probe(session, probe, ProbeState.DONE, now_ms=now_ms)
    note_change(session)  # what a link carries is part of the next round's snapshot


# -- what is to be probed ---------------------------------------------------------------------------


def _begin(session: Session, market: Market, now_ms: int) -> set[str]:
    settings = market.settings
    if settings.link_probe_bytes_per_day == 0:
        return set()
    terms = _terms(session)
    chosen = choose(
        _sites(session, terms, settings.link_probe_bytes_per_day, now_ms),
        _pairs(session, market, set(terms), now_ms),
        now_ms,
        interval_s=settings.link_probe_interval_s,
        bytes_max=settings.link_probe_bytes_max,
    )
    for each in chosen:
        probe = LinkProbe(
            probe_id=market.ids.new("probe"),
            dialler=each.dialler,
            listener=each.listener,
            bytes_max=each.bytes_max,
            bytes_charged=0,
            asked_ms=now_ms,
            expires_ms=now_ms + round(_patience_s(market) * 1000),
            detail="",
        )
        session.add(probe)
        change_probe(session, probe, ProbeState.ASKED, now_ms=now_ms)
    return {name for each in chosen for name in (each.dialler, each.listener)}


def _terms(session: Session, among: Iterable[str] | None = None) -> dict[str, ProbeTerms]:
    """Return what the owners of the live sites that can be probed allow."""
    wanted = select(Site.site_id, Site.probe_terms).where(
        Site.state == SiteState.LIVE, Site.probe_terms.is_not(None), Site.offer.is_not(None)
    )
    if among is not None:
        wanted = wanted.where(Site.site_id.in_(sorted(among)))
    return {name: ProbeTerms.model_validate_json(text or "{}") for name, text in session.execute(wanted)}


def _sites(session: Session, terms: dict[str, ProbeTerms], bytes_per_day: int, now_ms: int) -> dict[str, ProbeSite]:
    busy = _syncing(session, terms) | {
        name for probe in _live_probes(session) for name in (probe.dialler, probe.listener)
    }
    spent: Counter[str] = Counter()
    for probe in session.scalars(select(LinkProbe).where(LinkProbe.asked_ms > now_ms - DAY_MS)):
        spent.update({probe.dialler: probe.bytes_charged, probe.listener: probe.bytes_charged})
    # What an offer says of listening is read as text: it may name thousands of GPUs.
    listening = set(session.scalars(select(Site.site_id).where(Site.offer.like('%"listens":true%'))))
    return {
        name: ProbeSite(
            site_id=name,
            listens=name in listening,
            bytes_left=min(bytes_per_day, allowed.bytes_per_day) - spent[name],
            is_busy=name in busy,
        )
        for name, allowed in terms.items()
    }


def _pairs(session: Session, market: Market, able: set[str], now_ms: int) -> list[ProbePair]:
    """Return the pairs of able sites that offer links both ways: a site that refuses another offers none to it."""
    links = {
        (link.source, link.target): link.bandwidth_bits_per_s
        for link in session.scalars(select(Link).where(Link.source.in_(able), Link.target.in_(able)))
    }
    both = sorted(pair for pair in links if pair[0] < pair[1] and (pair[1], pair[0]) in links)
    if not both:
        return []
    joined = {name: at_ms for name, at_ms in session.execute(select(Site.site_id, Site.joined_ms))}  # noqa: C416
    tried: dict[tuple[str, ...], int] = {}
    newest = select(LinkProbe.dialler, LinkProbe.listener, func.max(LinkProbe.asked_ms)).group_by(
        LinkProbe.dialler, LinkProbe.listener
    )
    for dialler, listener, asked_ms in session.execute(newest):
        ends = tuple(sorted((dialler, listener)))
        tried[ends] = max(tried.get(ends, 0), asked_ms)
    found = read_estimates(session, market.settings.link_half_life_s, now_ms)
    return [
        ProbePair(
            sites=pair,
            bandwidth_bits_per_s=max(links[pair], links[pair[1], pair[0]]),
            confidence=min((found[way].confidence if way in found else 0.0) for way in (pair, (pair[1], pair[0]))),
            tried_ms=max(tried.get(pair, 0), *(joined[name] for name in pair)),
        )
        for pair in both
    ]


def _syncing(session: Session, terms: dict[str, ProbeTerms]) -> set[str]:
    """Return the sites in `terms` that run, or are about to run, a part of a job that spans sites, and want it left in peace."""
    live = (
        select(Lease.placement_id)
        .where(Lease.state != LeaseState.ENDED)
        .group_by(Lease.placement_id)
        .having(func.count() > 1)
    )
    held = select(Lease.site_id).where(
        Lease.state != LeaseState.ENDED,
        Lease.placement_id.in_(live),
    )
    return {name for name in session.scalars(held) if name in terms and not terms[name].while_syncing}


# -- what all of them need --------------------------------------------------------------------------


def _live_probes(session: Session) -> list[LinkProbe]:
    live = select(LinkProbe).where(LinkProbe.state.in_(_LIVE)).order_by(LinkProbe.probe_id)
    return list(session.scalars(live))


def _of(session: Session, site_id: str, probe_id: str) -> LinkProbe | None:
    """Return a probe that this site takes part in; what is said of another is nobody's business here."""
    probe = session.get(LinkProbe, probe_id)
    return probe if probe is not None and site_id in {probe.dialler, probe.listener} else None


def _order(probe: LinkProbe, site_id: str, now_ms: int) -> ProbeOrder:
    listens, runs = site_id == probe.listener, probe.state == ProbeState.RUNNING
    return ProbeOrder(
        probe_id=probe.probe_id,
        peer=probe.dialler if listens else probe.listener,
        listens=listens,
        streams=STREAMS,
        bytes_max=probe.bytes_max,
        seconds_max=SECONDS_MAX,
        expires_s=(probe.expires_ms - now_ms) / 1000,
        certificate_pem=(probe.listener_certificate if listens else probe.dialler_certificate) if runs else None,
        peer_key=(probe.dialler_key if listens else probe.listener_key) if runs else None,
        address=probe.address if runs and not listens else None,
    )


def _fail(session: Session, probe: LinkProbe, now_ms: int, detail: str) -> None:
    """End a probe without a measurement. If it ran, it counts as all the bytes that it might have moved."""
    probe.detail = detail[:1000]
    change_probe(session, probe, ProbeState.FAILED, now_ms=now_ms)


def _missing(probe: LinkProbe) -> str:
    runs = probe.state == ProbeState.RUNNING
    said = (
        (probe.dialler, probe.dialler_report if runs else probe.dialler_key),
        (probe.listener, probe.listener_report if runs else probe.listener_key),
    )
    return " and ".join(name for name, word in said if word is None)


def _patience_s(market: Market) -> float:
    return max(PATIENCE_S, PATIENCE_HEARTBEATS * market.settings.heartbeat_s)
