"""A snapshot in the order and the form that solving needs: sorted, indexed, incumbents decided.

Everything downstream walks these tuples, so the order of a snapshot's rows cannot matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.allocation.clearing import LINK_SHARES
from broker.allocation.configuration import Configuration
from broker.allocation.snapshot import JobState, LinkState, PoolState, Snapshot
from pricing.asks import Ask
from pricing.money import BYTES_PER_GB, SECONDS_PER_HOUR, divide_up
from training.throughput import Link, SitePart

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Market:
    """One round's market. `kept` are the jobs inside their term: they cannot be left without GPUs.

    `link_capacity` is in shares (ten-thousandths of a link's bandwidth); it is above LINK_SHARES
    only where kept jobs already use more than the link was last measured to carry.
    """

    snapshot: Snapshot
    pools: dict[str, PoolState]
    asks: dict[str, Ask]
    links: dict[Pair, LinkState]
    speeds: dict[Pair, Link]
    listening: frozenset[str]
    jobs: tuple[JobState, ...]
    kept: frozenset[str]
    link_capacity: dict[Pair, int]

    def site_part(self, pool: PoolState, gpus: int) -> SitePart:
        """Return `gpus` GPUs of a pool as the throughput model wants them."""
        return SitePart(pool.site_id, pool.gpu_type, gpus, pool.flops_per_s, pool.intra_site_bits_per_s)

    def shares(self, configuration: Configuration) -> dict[Pair, int]:
        """Return what a configuration uses of each link that exists, rounded up to whole shares."""
        return {
            pair: _shares(self.links[pair], row.bytes_per_s)
            for row in configuration.traffic
            if (pair := (row.from_site, row.to_site)) in self.links
        }

    def egress_micros_per_hour(self, configuration: Configuration) -> int:
        """Return the predicted egress cost of an hour, rounded up by link."""
        return sum(
            divide_up(row.bytes_per_s * SECONDS_PER_HOUR * link.egress_price_micros_per_gb, BYTES_PER_GB)
            for row in configuration.traffic
            if (link := self.links.get((row.from_site, row.to_site)))
        )

    def ask_micros_per_hour(self, configuration: Configuration) -> int:
        """Return what the sites of a configuration want for an hour of it."""
        return sum(self.asks[part.pool_id].cost_micros_per_hour(part.gpus) for part in configuration.parts)


def open_market(snapshot: Snapshot) -> Market:
    """Sort and index a snapshot, and decide which incumbents are inside their term and still fit."""
    pools = {pool.pool_id: pool for pool in sorted(snapshot.pools, key=lambda pool: pool.pool_id)}
    links = {(link.from_site, link.to_site): link for link in snapshot.links if link.from_site != link.to_site}
    links = dict(sorted(links.items()))
    jobs = tuple(sorted(snapshot.jobs, key=lambda job: (job.submitted_ms, job.job_id)))
    kept = _kept(snapshot, pools, jobs)
    return Market(
        snapshot=snapshot,
        pools=pools,
        asks={pool_id: Ask(pool_id, pool.ask_micros_per_gpu_hour) for pool_id, pool in pools.items()},
        links=links,
        speeds={pair: _speed(link) for pair, link in links.items()},
        listening=frozenset(site.site_id for site in snapshot.sites if site.listens),
        jobs=jobs,
        kept=kept,
        link_capacity=_link_capacity(links, jobs, kept),
    )


def _kept(snapshot: Snapshot, pools: dict[str, PoolState], jobs: tuple[JobState, ...]) -> frozenset[str]:
    """Return the incumbents inside their term, oldest first where a pool has shrunk below what they hold."""
    free = {pool_id: pool.capacity_gpus for pool_id, pool in pools.items()}
    kept = set()
    for job in jobs:
        if job.incumbent is None or job.incumbent.term_ends_ms <= snapshot.taken_at_ms:
            continue
        parts = job.incumbent.configuration.parts
        if all(free.get(part.pool_id, 0) >= part.gpus for part in parts):
            kept.add(job.job_id)
            for part in parts:
                free[part.pool_id] -= part.gpus
    return frozenset(kept)


def _link_capacity(links: dict[Pair, LinkState], jobs: tuple[JobState, ...], kept: frozenset[str]) -> dict[Pair, int]:
    used = dict.fromkeys(links, 0)
    for job in jobs:
        if job.incumbent is None or job.job_id not in kept:
            continue
        for row in job.incumbent.configuration.traffic:
            pair = (row.from_site, row.to_site)
            if pair in links:
                used[pair] += _shares(links[pair], row.bytes_per_s)
    return {pair: max(LINK_SHARES, shares) for pair, shares in used.items()}


def _shares(link: LinkState, bytes_per_s: int) -> int:
    return divide_up(bytes_per_s * 8 * LINK_SHARES, max(1, int(link.bandwidth_bits_per_s)))


def _speed(link: LinkState) -> Link:
    return Link(link.bandwidth_bits_per_s, link.delay_s, link.loss, link.egress_price_micros_per_gb)
