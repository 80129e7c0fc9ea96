"""What a job would get now: its candidate configurations, priced, without any effect.

Each row says how far its speed is open, how likely the deadline is met, and what to bid at least.
Also answers, at submit, whether any state of this federation could ever hold the job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.abilities import lacking, read_abilities
from broker.allocation.quote import QuoteRow, never_possible, quote
from broker.allocation.snapshot import PoolState
from broker.allocation.snapshot import SiteState as Listening
from broker.database.tables import Gpu, Pool, Site
from broker.market import Market
from broker.rounds.round_links import declared_links
from broker.rounds.snapshot import TakenSnapshot, job_state, take
from broker.speeds import LINKS_HALF_WIDTH_LOG, Speeds, read_speeds
from broker.staging import Staging, read_from, require_known_sites, staging_at
from broker.transitions import SiteState
from pricing.money import divide_up
from sites.protocol import Offer
from training.spec import JobSpec
from training.speeds import (
    COLD_HALF_WIDTH_LOG,
    VALUED_QUANTILE,
    SpeedEstimate,
    chance_within,
)

QUOTED_JOB_ID: Final = "quoted"
# Prices move between a quote and the next round: what is recommended stands a tenth above the last.
BID_MARGIN_PERCENT: Final = 10


@dataclass(frozen=True, slots=True)
class QuotedRow(QuoteRow):
    """A candidate with its interval: 90 % of runs lie between the speeds `low` and `high`.

    `samples_per_s` is what the market counts with, `samples_per_s_expected` the middle of the interval.
    `deadline_probability` is None without a deadline. `recommended_bid...` is worth the last price and
    a tenth more. `staging_s` is how long the job's datasets take to its sites before it starts, of `staging_bytes`, for
    which holders ask `staging_egress_micros`. `measured` says whether this family ran on these GPUs before.
    """

    samples_per_s_low: float
    samples_per_s_expected: float
    samples_per_s_high: float
    measured: bool
    staging_s: float
    staging_bytes: int
    staging_egress_micros: int
    deadline_probability: float | None
    recommended_bid_micros_per_million_samples: int


def quote_job(market: Market, spec: JobSpec, tenant_id: str = "") -> list[QuotedRow]:
    """Return the candidates of `spec` at the prices of the last round, best first.

    `tenant_id` is whose measured speeds count.
    """
    return quote_jobs(market, [spec], tenant_id)[0]


def quote_jobs(market: Market, specs: Sequence[JobSpec], tenant_id: str) -> list[list[QuotedRow]]:
    """Return the candidates of several jobs in one state of the market, those of each best first."""

    def work(session: Session) -> list[list[QuotedRow]]:
        taken = take(session, market, with_jobs=False)
        speeds = read_speeds(session)
        return [_quoted(taken, speeds, spec, tenant_id, market.clock.now_ms()) for spec in specs]

    return market.database.read(work)


def _quoted(taken: TakenSnapshot, speeds: Speeds, spec: JobSpec, tenant_id: str, now_ms: int) -> list[QuotedRow]:
    job = job_state(
        QUOTED_JOB_ID,
        spec,
        version=0,
        submitted_ms=now_ms,
        hold_left_micros=spec.market.budget_micros,
        sites=taken.site_versions,
        refused=lacking(spec, taken.abilities),
        read_from=read_from(spec, taken.abilities),
        speeds=speeds.valued(tenant_id, spec),
    )
    known = speeds.of(tenant_id, spec)
    deadline_ms = spec.market.deadline_ms
    left_s = None if deadline_ms is None else (deadline_ms - now_ms) / 1000
    samples = spec.market.workload.samples
    rows = []
    for row in quote(taken.snapshot, job):
        brought = [staging_at(spec, site, taken.abilities) for site in row.configuration.site_ids]
        rows.append(with_interval(row, known, samples=samples, left_s=left_s, brought=brought))
    return rows


def with_interval(
    row: QuoteRow,
    known: Mapping[str, SpeedEstimate],
    *,
    samples: int,
    left_s: float | None,
    brought: Sequence[Staging] = (),
) -> QuotedRow:
    """Return a row with what is known of its GPU types; `left_s` is the time to the deadline, None without one.

    `brought` is what each of its sites must have brought before the job can start.
    """
    staging_s = max((each.seconds for each in brought), default=0.0)
    types = sorted({part.gpu_type for part in row.configuration.parts})
    half = max(known[name].half_width_log if name in known else COLD_HALF_WIDTH_LOG for name in types)
    if len(row.configuration.parts) > 1:
        half = math.hypot(half, LINKS_HALF_WIDTH_LOG)
    expected = row.samples_per_s
    if all(name in known for name in types):
        # The market counted with a quantile of the speed; its middle lies above.
        expected /= math.exp(NormalDist().inv_cdf(VALUED_QUANTILE) * half / NormalDist().inv_cdf(0.95))
    values = {field.name: getattr(row, field.name) for field in fields(QuoteRow)}
    per_million = divide_up(row.price_micros_per_hour * 1_000_000, max(1, math.floor(row.samples_per_s * 3600)))
    return QuotedRow(
        **values,
        samples_per_s_low=expected / math.exp(half),
        samples_per_s_expected=expected,
        samples_per_s_high=expected * math.exp(half),
        measured=all(name in known and known[name].measured for name in types),
        staging_s=staging_s,
        staging_bytes=sum(each.size_bytes for each in brought),
        staging_egress_micros=sum(each.egress_micros for each in brought),
        deadline_probability=None
        if left_s is None
        else chance_within(samples / expected, max(0.0, left_s - staging_s), half),
        recommended_bid_micros_per_million_samples=divide_up(per_million * (100 + BID_MARGIN_PERCENT), 100),
    )


def reason_never_possible(session: Session, spec: JobSpec) -> str | None:
    """Return why no state of this federation could ever hold `spec`, None where one could.

    Every pool counts with all its GPUs, also where they are taken or its site is silent now.
    """
    sites = list(session.scalars(select(Site).where(Site.state != SiteState.REMOVED)))
    offers = {site.site_id: Offer.model_validate_json(site.offer) for site in sites}
    data = spec.market.data
    if data is not None and data.home_site not in offers:
        known = ", ".join(sorted(offers)) or "none yet"
        return f"market.data.home_site {data.home_site!r} is no site of this market; the sites are: {known}"
    abilities = read_abilities(session)
    require_known_sites(spec, abilities)
    without = lacking(spec, abilities)
    if offers and without.sites >= set(offers):
        return f"no site of this market has what the job needs: {'; '.join(without.reasons)}"
    counted = select(Gpu.pool_id, func.count()).where(Gpu.present).group_by(Gpu.pool_id)
    present = {pool_id: count for pool_id, count in session.execute(counted)}  # noqa: C416  rows are not pairs to mypy
    whole = []
    for pool in session.scalars(
        select(Pool).join(Site, Site.site_id == Pool.site_id).where(Site.state != SiteState.REMOVED)
    ):
        quotas = [each.job_gpus_max for each in offers[pool.site_id].pools if each.gpu_type == pool.gpu_type]
        whole.append(
            PoolState(
                pool_id=pool.pool_id,
                site_id=pool.site_id,
                gpu_type=pool.gpu_type,
                # What one job may have of it: a quota of the owner's never ends.
                capacity_gpus=min([present.get(pool.pool_id, 0), *(quota for quota in quotas if quota is not None)]),
                ask_micros_per_gpu_hour=pool.ask_micros_per_gpu_hour,
                flops_per_s=pool.flops_per_s,
            )
        )
    job = job_state(
        QUOTED_JOB_ID,
        spec,
        version=0,
        submitted_ms=0,
        hold_left_micros=spec.market.budget_micros,
        sites=offers,
        refused=without,
    )
    listening = [Listening(site_id=site_id, listens=offer.listens) for site_id, offer in offers.items()]
    return never_possible(job, whole, listening, declared_links(session, {site.site_id for site in sites}))
