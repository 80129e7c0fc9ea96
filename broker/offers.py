"""What a site sells, as its heartbeats state it, written to the tables that a round reads."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.tables import Gpu, Link, Pool, Round, Site
from broker.errors import RefusedError
from broker.refusals import forget_refusals
from broker.transitions import SiteState, note_change
from sites.protocol import LinkOffer, Offer, PoolOffer
from training.catalogue import GPU_TYPES


class OfferError(RefusedError):
    """An offer that makes no sense."""

    code = "offer.invalid"


def apply_offer(session: Session, site: Site, offer: Offer) -> bool:
    """Write `offer` where it differs from what the site offered before; say whether it did.

    Raises OfferError for a GPU type that the catalogue does not know, or a type or GPU named twice.
    """
    document = offer.model_dump_json()
    if document == site.offer:
        return False
    _check(offer)
    if site.offer and Offer.model_validate_json(site.offer).policy_digest != offer.policy_digest:
        forget_refusals(session, site.site_id)
    site.offer = document
    site.version += 1
    pools = {pool.pool_id: pool for pool in session.scalars(select(Pool).where(Pool.site_id == site.site_id))}
    gpus = {gpu.gpu_id: gpu for gpu in session.scalars(select(Gpu).where(Gpu.site_id == site.site_id))}
    for gpu in gpus.values():
        gpu.present = False
    for offered in offer.pools:
        _write_pool(session, site.site_id, offered, pools, gpus)
    links = {link.target: link for link in session.scalars(select(Link).where(Link.source == site.site_id))}
    for target in set(links) - {link.target for link in offer.links}:
        session.delete(links[target])
    for link in offer.links:
        _write_link(session, site.site_id, link)
    session.flush()
    note_change(session)
    return True


def note_times_passed(session: Session, now_ms: int) -> None:
    """Ask for a round where a time that an owner announced has come since the last one: what is sold has changed."""
    last_ms = session.scalar(select(Round.taken_ms).order_by(Round.round_number.desc()).limit(1))
    if last_ms is None:
        return
    for document in session.scalars(select(Site.offer).where(Site.state == SiteState.LIVE)):
        if any(last_ms < time_ms <= now_ms for time_ms in _times(Offer.model_validate_json(document))):
            note_change(session)
            return


def _times(offer: Offer) -> Iterator[int]:
    for pool in offer.pools:
        for kept in pool.reserved:
            yield from (kept.from_ms, kept.to_ms)
    if offer.drains_at_ms is not None:
        yield offer.drains_at_ms


def _check(offer: Offer) -> None:
    types = [pool.gpu_type for pool in offer.pools]
    unknown = sorted(set(types) - set(GPU_TYPES))
    if unknown:
        message = f"unknown GPU type {', '.join(unknown)}; the market knows {', '.join(sorted(GPU_TYPES))}"
        raise OfferError(message)
    if len(set(types)) != len(types):
        message = "each GPU type may stand in one pool of a site; join the pools of one type"
        raise OfferError(message)
    gpu_ids = [gpu_id for pool in offer.pools for gpu_id in pool.gpu_ids]
    if len(set(gpu_ids)) != len(gpu_ids):
        message = "a GPU is listed twice; GPU ids must be unique within a site"
        raise OfferError(message)


def _write_pool(
    session: Session, site_id: str, offered: PoolOffer, pools: dict[str, Pool], gpus: dict[str, Gpu]
) -> None:
    pool_id = f"{site_id}/{offered.gpu_type}"
    pool = pools.get(pool_id)
    if pool is None:
        pool = Pool(pool_id=pool_id, site_id=site_id, gpu_type=offered.gpu_type)
        session.add(pool)
    pool.ask_micros_per_gpu_hour = offered.ask_micros_per_gpu_hour
    pool.flops_per_s = offered.flops_per_s
    session.flush()
    for gpu_id in offered.gpu_ids:
        gpu = gpus.get(gpu_id)
        if gpu is None:
            session.add(Gpu(site_id=site_id, gpu_id=gpu_id, pool_id=pool_id, present=True))
        else:
            gpu.pool_id, gpu.present = pool_id, True


def _write_link(session: Session, site_id: str, link: LinkOffer) -> None:
    session.merge(
        Link(
            source=site_id,
            target=link.target,
            bandwidth_bits_per_s=link.bandwidth_bits_per_s,
            delay_s=link.delay_s,
            loss=link.loss,
            egress_price_micros_per_gb=link.egress_price_micros_per_gb,
        )
    )
