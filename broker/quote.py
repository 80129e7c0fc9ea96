"""What a job would get now: its candidate configurations, priced, without any effect.

Also answers, at submit, whether any state of this federation could ever hold the job.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.allocation.quote import QuoteRow, never_possible, quote
from broker.allocation.snapshot import PoolState
from broker.allocation.snapshot import SiteState as Listening
from broker.database.tables import Gpu, Pool, Site
from broker.market import Market
from broker.rounds.snapshot import job_state, standing_links, take
from broker.transitions import SiteState
from sites.protocol import Offer
from training.spec import JobSpec

QUOTED_JOB_ID: Final = "quoted"


def quote_job(market: Market, spec: JobSpec) -> list[QuoteRow]:
    """Return the candidates of `spec` at the prices of the last round, best first."""

    def work(session: Session) -> list[QuoteRow]:
        taken = take(session, market)
        job = job_state(
            QUOTED_JOB_ID,
            spec,
            version=0,
            submitted_ms=market.clock.now_ms(),
            hold_left_micros=spec.market.budget_micros,
            sites=taken.site_versions,
        )
        return quote(taken.snapshot, job)

    return market.database.read(work)


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
    whole = []
    for pool in session.scalars(
        select(Pool).join(Site, Site.site_id == Pool.site_id).where(Site.state != SiteState.REMOVED)
    ):
        present = session.scalar(select(func.count()).select_from(Gpu).where(Gpu.pool_id == pool.pool_id, Gpu.present))
        quotas = [each.job_gpus_max for each in offers[pool.site_id].pools if each.gpu_type == pool.gpu_type]
        whole.append(
            PoolState(
                pool_id=pool.pool_id,
                site_id=pool.site_id,
                gpu_type=pool.gpu_type,
                # What one job may have of it: a quota of the owner's never ends.
                capacity_gpus=min([present or 0, *(quota for quota in quotas if quota is not None)]),
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
    )
    listening = [Listening(site_id=site_id, listens=offer.listens) for site_id, offer in offers.items()]
    return never_possible(job, whole, listening, standing_links(session, {site.site_id for site in sites}))
