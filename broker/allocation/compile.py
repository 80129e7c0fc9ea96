"""From a snapshot's columns to the market in numbers: what every part of the solver reads.

Rows of the tables stand in canonical order already. Here kinds of GPU are told apart, incumbents
decided, candidates listed, and supply written as rows with steps of rising cost. `Names` leads
back from numbers to pools, links, jobs and configurations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation import supply
from broker.allocation.errors import AllocationError
from broker.allocation.incumbents import Leases, Own, kept_leases, own_places
from broker.allocation.instance import (
    NONE,
    RATE_MICROS_PER_HOUR_MAX,
    SPAN_SITES_MAX,
    TIERS,
    Bundles,
    Flag,
    Goods,
    Index,
    Instance,
    Int,
    Jobs,
    Kinds,
    Links,
    Patterns,
    Pools,
    Real,
    Rows,
    Singles,
    Sites,
    Spans,
)
from broker.allocation.kernel import CODECS
from broker.allocation.names import Names, barred_keys, vetoed_leases
from broker.allocation.patterns import Families, joined
from broker.allocation.singles import (
    CANDIDATES_MAX,
    Offered,
    Requests,
    fill_singles,
    singles_bound,
    spans_of,
)
from broker.allocation.tables import CODECS as SNAPSHOT_CODECS
from broker.allocation.tables import STRATEGIES, Tables, starts
from training.catalogue import GPU_TYPES

TYPES: Final = tuple(GPU_TYPES)
_CODEC_INDEX: Final = np.array(
    [CODECS.index(codec) if codec in CODECS else NONE for codec in SNAPSHOT_CODECS], np.int32
)


class CompileError(AllocationError):
    """A market that is too large to be stated in numbers."""

    code = "allocation.too_large"


@dataclass(frozen=True, slots=True)
class Compiled:
    """The market in numbers and the way back. `spans_left_out` counts sets of sites beyond the cap on patterns."""

    instance: Instance
    names: Names
    spans_left_out: int


class _Market(NamedTuple):
    """The parts of an instance that everything else is computed from."""

    sites: Sites
    pools: Pools
    kinds: Kinds
    links: Links
    asks: Int


def compile_market(tables: Tables) -> Compiled:
    """Return a snapshot in numbers. Raises CompileError where its candidates are too many."""
    capacity = supply.capacity_by_slot(tables)
    market = _market(tables, capacity)
    jobs, site_sets = _jobs(tables)
    skeleton = _skeleton(tables, market, jobs, site_sets)
    slot_s = float(tables.market("slot_s"))
    leases = _leases(tables, market)
    inside = tables["incumbents.term_ends_ms"] > tables.market("taken_at_ms")
    kept = kept_leases(leases, inside, tables["pools.capacity_gpus"])
    own = own_places(skeleton, leases, kept, vetoed_leases(tables), slot_s)
    jobs = _with_own(jobs, leases, own, kept, tables)
    skeleton = skeleton._replace(jobs=jobs)
    requests = _requests(tables, jobs)
    offered = _offered(tables, market, capacity, slot_s)
    goods, singles = _singles(skeleton, requests, offered, capacity)
    patterns, families, left_out = _patterns(tables, market, requests)
    spans = _spans(skeleton._replace(patterns=patterns), requests, families, offered)
    stocked = supply.stock(tables, capacity, skeleton, patterns, leases, own, kept)
    instance = skeleton._replace(
        rows=stocked.rows,
        links=stocked.links,
        goods=goods,
        jobs=stocked.jobs,
        singles=singles,
        patterns=stocked.patterns,
        spans=spans,
        bundles=stocked.bundles,
    )
    barred_start, barred = barred_keys(tables, instance, leases, own)
    instance = instance._replace(jobs=instance.jobs._replace(barred_start=barred_start, barred=barred))
    return Compiled(instance, Names(tables, instance, leases, own), left_out)


def _market(tables: Tables, capacity: Int) -> _Market:
    """Return sites, pools, kinds and links in canonical order."""
    types = _type_of_name(tables)[tables["pools.gpu_type"]]
    peaks = np.array([gpu.peak_flops_per_s * gpu.achieved_share for gpu in GPU_TYPES.values()])
    rings = np.array([gpu.intra_site_bits_per_s for gpu in GPU_TYPES.values()])
    flops, ring = tables["pools.flops_per_s"], tables["pools.intra_site_bits_per_s"]
    flops = np.where(np.isnan(flops), peaks[types], flops)
    ring = np.where(np.isnan(ring), rings[types], ring)
    distinct, kind = np.unique(np.stack([types.astype(np.float64), flops, ring], axis=1), axis=0, return_inverse=True)
    quota = tables["pools.job_gpus_max"]
    job_max = np.minimum(np.where(quota < 0, capacity[0], quota), capacity[0])
    apart = tables["links.from_site"] != tables["links.to_site"]
    return _Market(
        Sites(tables["sites.region"].copy(), tables["sites.continent"].copy()),
        Pools(tables["pools.site"].copy(), kind.reshape(-1).astype(np.int32), job_max),
        Kinds(
            distinct[:, 0].astype(np.int32), np.ascontiguousarray(distinct[:, 1]), np.ascontiguousarray(distinct[:, 2])
        ),
        Links(
            0,
            tables["links.from_site"][apart],
            tables["links.to_site"][apart],
            tables["links.bandwidth_bits_per_s"][apart],
            tables["links.delay_s"][apart],
            tables["links.loss"][apart],
            tables["links.egress_price_micros_per_gb"][apart],
        ),
        tables["pools.ask_micros_per_gpu_hour"].copy(),
    )


def _type_of_name(tables: Tables) -> Index:
    """Return the catalogue's index of each name, -1 where it is no GPU type."""
    index = {name.encode(): place for place, name in enumerate(TYPES)}
    return np.array([index.get(text, NONE) for text in tables["names.text"].tolist()], np.int32)


def _jobs(tables: Tables) -> tuple[Jobs, NDArray[np.uint64]]:
    """Return the jobs without what depends on incumbents and rows; tenants stand for their rows."""
    count = tables.rows("jobs")
    base, slope = _bids(tables)
    sites = tables.rows("sites")
    site_of_name = np.full(tables.rows("names") + 1, NONE, np.int64)
    site_of_name[tables["sites.site_id"]] = np.arange(sites)
    sets = np.zeros((tables.rows("site_lists"), (sites + 63) // 64 or 1), np.uint64)
    owner = np.repeat(np.arange(len(sets)), tables["site_lists.length"])
    listed = site_of_name[tables["site_list_sites.site_id"]]
    owner, listed = owner[listed >= 0], listed[listed >= 0]
    np.bitwise_or.at(sets, (owner, listed >> 6), np.uint64(1) << (listed & 63).astype(np.uint64))
    home, residency = tables["jobs.data_home"], tables["jobs.data_residency"]
    tier_price = np.zeros((count, TIERS), np.int64)
    for tier, column in enumerate(("to_region", "to_continent", "beyond"), start=1):
        price = np.where(residency >= tier, np.append(tables[f"sites.{column}"], 0)[home], NONE)
        tier_price[:, tier] = np.where(home >= 0, price, 0)
    deadline = tables["jobs.deadline_ms"]
    taken_at_ms = tables.market("taken_at_ms")
    tenant_of_name = np.full(tables.rows("names") + 1, NONE, np.int32)
    tenant_of_name[tables["tenants.tenant_id"]] = np.arange(tables.rows("tenants"))
    tenant = tenant_of_name[tables["jobs.tenant_id"]]
    measured = np.full((2, count, len(TYPES)), np.nan)
    speeds = tables["speeds.job"], _type_of_name(tables)[tables["speeds.gpu_type"]]
    measured[0][speeds], measured[1][speeds] = tables["speeds.flops_per_s"], tables["speeds.ring_bits_per_s"]
    return Jobs(
        must=np.zeros(count, np.bool_),
        own=np.full(count, NONE, np.int32),
        locked=np.zeros(count, np.int64),
        home=home.copy(),
        tier_price=tier_price,
        site_set=tables["jobs.site_list"].copy(),
        budget_row=tenant,
        budget=np.zeros(count, np.int64),
        floor_row=tenant.copy(),
        value_base=base,
        value_slope=slope,
        hold_left=tables["jobs.hold_left_micros"].copy(),
        samples_left=np.maximum(0, tables["jobs.samples"] - tables["jobs.samples_done"]).astype(np.float64),
        deadline_s=np.where(deadline < 0, np.inf, (deadline - taken_at_ms) / 1000.0),
        restart=np.zeros(count, np.int64),
        batch_per_gpu=tables["jobs.batch_per_gpu"].astype(np.float64),
        parameters=tables["jobs.parameters"].astype(np.float64),
        flops_per_sample=tables["jobs.flops_per_sample"].copy(),
        data_bytes_per_sample=tables["jobs.data_bytes_per_sample"].copy(),
        period_steps=tables["jobs.period_steps"].astype(np.float64),
        codec=_CODEC_INDEX[tables["jobs.codec"]],
        sync_open=tables["jobs.sync_open"] & (tables["jobs.strategy"] == STRATEGIES.index("auto")),
        samples=tables["jobs.samples"].astype(np.float64),
        target=tables["jobs.target_utilisation"].copy(),
        egress_gb_max=np.where(tables["jobs.max_egress_gb"] > 0, tables["jobs.max_egress_gb"], np.inf),
        fragments=tables["jobs.fragments"].astype(np.float64),
        flops_per_s=measured[0],
        ring_bits_per_s=measured[1],
        barred_start=np.zeros(count + 1, np.int64),
        barred=np.zeros(0, np.int64),
    ), sets


def _bids(tables: Tables) -> tuple[Real, Real]:
    """Return the bids as pieces of a concave function: micro-credits per hour at 0 and per sample/s."""
    count = tables.rows("jobs")
    owner = tables["bid_steps.job"]
    place = np.arange(len(owner)) - starts(owner, count)[owner] + 1
    pieces = int(place.max(initial=0)) + 1
    base, slope = np.full((count, pieces), np.inf), np.zeros((count, pieces))
    base[:, 0], slope[:, 0] = 0.0, tables["jobs.bid_micros_per_million_samples"] * 3600.0 / 1e6
    for piece in range(1, pieces):
        rows = np.flatnonzero(place == piece)
        job = owner[rows]
        slope[job, piece] = tables["bid_steps.bid_micros_per_million_samples"][rows] * 3600.0 / 1e6
        fall = slope[job, piece - 1] - slope[job, piece]
        base[job, piece] = base[job, piece - 1] + fall * tables["bid_steps.above_samples_per_s"][rows]
    return base, slope


def _skeleton(tables: Tables, market: _Market, jobs: Jobs, site_sets: NDArray[np.uint64]) -> Instance:
    """Return an instance without rows and candidates, for the kernel to compute with."""
    none, nothing = np.zeros(0, np.int32), np.zeros(0, np.int64)
    start = np.zeros(1, np.int64)
    apart = np.zeros((0, SPAN_SITES_MAX), np.int32)
    return Instance(
        slots=tables.market("slots"),
        term_s=float(tables.market("term_s")),
        rows=Rows(nothing, start, nothing, nothing),
        sites=market.sites,
        pools=market.pools,
        kinds=market.kinds,
        links=market.links,
        goods=Goods(none, none, none, start, none, nothing),
        jobs=jobs,
        site_sets=site_sets,
        singles=Singles(start, none, nothing, nothing, np.zeros(0), nothing),
        patterns=Patterns(apart, apart, none, none, apart, apart, start),
        spans=Spans(start, none, nothing, none, none),
        bundles=Bundles(start, nothing, nothing, start, none, nothing),
    )


def _leases(tables: Tables, market: _Market) -> Leases:
    """Return what incumbents hold, in numbers."""
    count, names = tables.rows("incumbents"), tables.rows("names")
    site_of_name = np.full(names + 1, NONE, np.int64)
    site_of_name[tables["sites.site_id"]] = np.arange(tables.rows("sites"))
    part_site = site_of_name[tables["incumbent_parts.site_id"]]
    owner = tables["incumbent_parts.incumbent"]
    pool = _found(
        tables["pools.site"].astype(np.int64) * names + tables["pools.gpu_type"],
        part_site * names + tables["incumbent_parts.gpu_type"],
        part_site >= 0,
    )
    sites = max(1, tables.rows("sites"))
    link_key = market.links.from_site.astype(np.int64) * sites + market.links.to_site
    hub_name = tables["incumbents.hub_site"]
    hub_site = site_of_name[hub_name][owner]
    is_hub = tables["incumbent_parts.site_id"] == hub_name[owner]
    start = starts(owner, count)
    hub_part = np.full(count, NONE, np.int32)
    hub_part[owner[is_hub]] = np.flatnonzero(is_hub) - start[owner[is_hub]]
    both = (part_site >= 0) & (hub_site >= 0) & ~is_hub
    sent_from = site_of_name[tables["incumbent_traffic.from_site"]]
    sent_to = site_of_name[tables["incumbent_traffic.to_site"]]
    prices = np.zeros(len(owner), np.int64)
    pool_names = tables.names("locked_prices.pool_id")
    locked = dict(
        zip(
            zip(tables["locked_prices.incumbent"].tolist(), pool_names, strict=True),
            tables["locked_prices.price_micros_per_gpu_hour"].tolist(),
            strict=True,
        )
    )
    part_names = zip(tables.names("incumbent_parts.site_id"), tables.names("incumbent_parts.gpu_type"), strict=True)
    for part, (lease, (site, gpu_type)) in enumerate(zip(owner.tolist(), part_names, strict=True)):
        prices[part] = locked.get((lease, f"{site}/{gpu_type}"), 0)
    gpus = tables["incumbent_parts.gpus"]
    paid = np.zeros(count, np.int64)
    np.add.at(paid, owner, np.minimum(prices, RATE_MICROS_PER_HOUR_MAX // gpus) * gpus)
    # Where the plan was not the market's to choose, a streaming round counts as if nothing went on beside it.
    streaming = tables["jobs.sync_open"][tables["incumbents.job"]]
    streaming = streaming & (tables["incumbents.strategy"] == STRATEGIES.index("streaming"))
    return Leases(
        job=tables["incumbents.job"].copy(),
        part_start=start,
        part_pool=pool,
        part_gpus=gpus.copy(),
        part_up=_found(link_key, part_site * sites + hub_site, both),
        part_down=_found(link_key, hub_site * sites + part_site, both),
        hub_part=hub_part,
        codec=np.where(
            tables["incumbents.strategy"] == STRATEGIES.index("auto"), NONE, _CODEC_INDEX[tables["incumbents.codec"]]
        ),
        period_steps=tables["incumbents.period_steps"].copy(),
        groups=np.where(streaming, tables["incumbents.fragments"], 1),
        overlap_steps=np.where(streaming, tables["incumbents.overlap_steps"], 0),
        speed=tables["incumbents.samples_per_s"].copy(),
        traffic_start=starts(tables["incumbent_traffic.incumbent"], count),
        traffic_link=_found(link_key, sent_from * sites + sent_to, (sent_from >= 0) & (sent_to >= 0)),
        traffic_bytes_per_s=tables["incumbent_traffic.bytes_per_s"].copy(),
        paid=paid,
    )


def _found(keys: Int, wanted: Int, valid: Flag) -> Index:
    """Return where each wanted key stands among the sorted `keys`, -1 where it does not."""
    if len(keys) == 0:
        return np.full(len(wanted), NONE, np.int32)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(valid & (keys[place] == wanted), place, NONE).astype(np.int32)


def _with_own(jobs: Jobs, leases: Leases, own: Own, kept: Flag, tables: Tables) -> Jobs:
    """Return the jobs with what their incumbent places mean to them."""
    must, place, locked, restart = jobs.must.copy(), jobs.own.copy(), jobs.locked.copy(), jobs.restart.copy()
    must[leases.job] = kept
    place[leases.job] = np.where(own.stands, np.cumsum(own.stands) - 1, NONE)
    locked[leases.job] = own.locked
    restart[leases.job] = tables["incumbents.restart_cost_micros"]
    return jobs._replace(must=must, own=place, locked=locked, restart=restart)


def _requests(tables: Tables, jobs: Jobs) -> Requests:
    """Return what jobs ask for."""
    tenant = jobs.floor_row
    floored = np.append(tables["tenants.floor_gpus"], NONE)[tenant] > 0
    return Requests(
        start=starts(tables["accelerators.job"], tables.rows("jobs")),
        gpu_type=_type_of_name(tables)[tables["accelerators.gpu_type"]],
        count_min=tables["accelerators.count_min"].copy(),
        count_max=tables["accelerators.count_max"].copy(),
        active=jobs.samples_left > 0.0,
        spanning=(tables["jobs.sites_max"] > 1) & (tables["jobs.strategy"] != STRATEGIES.index("local")),
        mixed=tables["jobs.mixed_types"].copy(),
        sites_max=np.minimum(tables["jobs.sites_max"], SPAN_SITES_MAX).astype(np.int32),
        penalty=np.where(floored, tables.market("floor_penalty_micros_per_gpu_hour"), 0),
    )


def _offered(tables: Tables, market: _Market, capacity: Int, slot_s: float) -> Offered:
    """Return what each kind has in every window of slots."""
    slots, kinds = len(capacity), len(market.kinds.gpu_type)
    quota = np.where(tables["pools.job_gpus_max"] < 0, np.iinfo(np.int64).max, tables["pools.job_gpus_max"])
    most = np.zeros((kinds, slots, slots), np.int64)
    for first in range(slots):
        for last in range(first, slots):
            free = np.minimum(capacity[first : last + 1].min(axis=0), quota)
            np.maximum.at(most[:, first, last], market.pools.kind, free)
    ask_low = np.full(kinds, np.iinfo(np.int64).max)
    np.minimum.at(ask_low, market.pools.kind, market.asks)
    left = 1.0 - float(tables["market.waiting_discount"][0])
    waiting = np.cumprod(np.append(1.0, np.full(slots - 1, left)))
    return Offered(
        np.searchsorted(market.kinds.gpu_type, np.arange(len(TYPES) + 1)).astype(np.int64),
        most,
        ask_low,
        quota,
        waiting,
        slot_s,
    )


def _singles(skeleton: Instance, requests: Requests, offered: Offered, capacity: Int) -> tuple[Goods, Singles]:
    """Return the candidates on one site, and the goods that they ask for with who offers them."""
    slots, pools = skeleton.slots, skeleton.pools
    bound = int(singles_bound(requests, offered.first, slots))
    _affordable(bound, "places on one site")
    start = np.zeros(len(requests.active) + 1, np.int64)
    window, gpus, value = np.zeros(bound, np.int32), np.zeros(bound, np.int64), np.zeros(bound, np.int64)
    speed, data = np.zeros(bound), np.zeros(bound, np.int64)
    count = int(fill_singles(skeleton, requests, offered, start, window, gpus, value, speed, data))
    window = window[:count]
    used = np.zeros(len(skeleton.kinds.gpu_type) * slots * slots, np.bool_)
    used[window] = True
    number = np.cumsum(used, dtype=np.int32) - np.int32(1)
    goods = np.flatnonzero(used)
    kind, first, end = goods // (slots * slots), goods // slots % slots, goods % slots + 1
    by_kind = np.argsort(pools.kind, kind="stable").astype(np.int32)
    kind_start = np.searchsorted(pools.kind[by_kind], np.arange(len(skeleton.kinds.gpu_type) + 1))
    offer_start, offer_pool, offer_limit = [0], [], []
    for row in range(len(goods)):
        pool = by_kind[kind_start[kind[row]] : kind_start[kind[row] + 1]]
        limit = np.minimum(capacity[first[row] : end[row], pool].min(axis=0), offered.quota[pool])
        offer_pool.append(pool[limit > 0])
        offer_limit.append(limit[limit > 0])
        offer_start.append(offer_start[-1] + len(offer_pool[-1]))
    return Goods(
        kind.astype(np.int32),
        first.astype(np.int32),
        end.astype(np.int32),
        np.array(offer_start, np.int64),
        np.concatenate([*offer_pool, np.zeros(0, np.int32)]).astype(np.int32),
        np.concatenate([*offer_limit, np.zeros(0, np.int64)]).astype(np.int64),
    ), Singles(
        start,
        number[window],
        gpus[:count].copy(),
        value[:count].copy(),
        speed[:count].copy(),
        data[:count].copy(),
    )


def _patterns(tables: Tables, market: _Market, requests: Requests) -> tuple[Patterns, Families, int]:
    """Return the patterns that some job could use."""
    owner = tables["accelerators.job"]
    spans = (requests.active & requests.spanning)[owner]
    wanted = np.zeros(len(TYPES), np.bool_)
    wanted[requests.gpu_type[spans]] = True
    mixes = np.zeros((len(TYPES), len(TYPES)), np.bool_)
    masks = np.zeros(tables.rows("jobs"), np.int64)
    mixing = spans & requests.mixed[owner]
    np.bitwise_or.at(masks, owner[mixing], np.int64(1) << requests.gpu_type[mixing].astype(np.int64))
    for mask in np.unique(masks).tolist():
        chosen = [index for index in range(len(TYPES)) if mask >> index & 1]
        mixes[np.ix_(chosen, chosen)] = True
    np.fill_diagonal(mixes, val=False)
    most = int(requests.sites_max[requests.active & requests.spanning].max(initial=1))
    found = joined(
        links=market.links,
        pools=market.pools,
        kind_type=market.kinds.gpu_type,
        usable=wanted[market.kinds.gpu_type[market.pools.kind]] & (market.pools.job_max > 0),
        asks=market.asks,
        listens=tables["sites.listens"],
        sites_max=most,
        mixes=mixes,
    )
    return found.patterns, found.families, found.left_out


def _spans(skeleton: Instance, requests: Requests, families: Families, offered: Offered) -> Spans:
    """Return the candidates across sites."""
    start = np.zeros(len(requests.active) + 1, np.int64)
    none, nothing, parts = np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(2, np.int64)
    if len(families.mixed) == 0:
        return Spans(start, none, nothing, none, none)
    count = int(spans_of(skeleton, requests, families, offered, parts, start, none, nothing, none, none))
    _affordable(count, "places across sites")
    family, gpus = np.zeros(count, np.int32), np.zeros(count, np.int64)
    sites_max, slots = np.zeros(count, np.int32), np.zeros(count, np.int32)
    spans_of(skeleton, requests, families, offered, parts, start, family, gpus, sites_max, slots)
    return Spans(start, family, gpus, sites_max, slots)


def _affordable(count: int, what: str) -> None:
    if count > CANDIDATES_MAX:
        message = (
            f"the market has {count} {what}, at most {CANDIDATES_MAX} fit a round; state measured speeds of pools "
            "rounded, so that pools of one type are alike, or narrow the jobs' requests"
        )
        raise CompileError(message)
