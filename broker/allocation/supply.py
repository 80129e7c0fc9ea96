"""What there is to sell, as rows: pools by slot with their ask curves, links, budgets and floors.

Also written here: the bundles of incumbents, since their entries name rows.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from broker.allocation import kernel
from broker.allocation.compiled import compiled_loop
from broker.allocation.incumbents import Leases, Own
from broker.allocation.instance import NONE, SHARES, Bundles, Flag, Index, Instance, Int, Jobs, Links, Patterns, Rows
from broker.allocation.tables import Tables

# A lease a hundred million times its tenant's budget; sums of such stay far below 2^63.
_BUDGET_SHARES_MAX: Final = 10**12


class Stocked(NamedTuple):
    """Rows, and everything that names them."""

    rows: Rows
    links: Links
    patterns: Patterns
    jobs: Jobs
    bundles: Bundles


def capacity_by_slot(tables: Tables) -> Int:
    """Return the GPUs for sale [slot, pool]: what reservations and drains leave at the slot's worst moment.

    Without a horizon the one slot lasts as long as a new term would.
    """
    slots = tables.market("slots")
    length_ms = 1000 * (tables.market("slot_s") if slots > 1 else tables.market("term_s"))
    now_ms = tables.market("taken_at_ms")
    capacity = np.repeat(tables["pools.capacity_gpus"][None, :], slots, axis=0)
    drains = tables["pools.drains_at_ms"]
    for slot in range(slots):
        begins_ms, ends_ms = now_ms + slot * length_ms, now_ms + (slot + 1) * length_ms
        capacity[slot, (drains >= 0) & (drains < ends_ms)] = 0
        inside = np.flatnonzero((tables["reserved.from_ms"] < ends_ms) & (tables["reserved.to_ms"] > begins_ms))
        for pool in np.unique(tables["reserved.pool"][inside]):
            rows = inside[tables["reserved.pool"][inside] == pool]
            from_ms = np.maximum(tables["reserved.from_ms"][rows], begins_ms)
            gpus, to_ms = tables["reserved.gpus"][rows], tables["reserved.to_ms"][rows]
            worst = max(int(gpus[(from_ms <= moment) & (to_ms > moment)].sum()) for moment in from_ms)
            capacity[slot, pool] = max(0, capacity[slot, pool] - worst)
    return capacity


def stock(
    tables: Tables, capacity: Int, skeleton: Instance, patterns: Patterns, leases: Leases, own: Own, kept: Flag
) -> Stocked:
    """Return the rows and what names them. Kept leases always fit: a row supplies at least what they use."""
    slots, pools = capacity.shape
    links, patterns, use_link = _links_in_use(skeleton.links, patterns, own)
    links = links._replace(first_row=slots * pools)
    tenants = np.flatnonzero(tables["tenants.budget_micros_per_hour"] >= 0)
    penalty = tables.market("floor_penalty_micros_per_gpu_hour")
    floors = np.flatnonzero((tables["tenants.floor_gpus"] > 0) & (penalty > 0))
    first_budget = links.first_row + len(links.from_site)
    first_floor = first_budget + len(tenants)
    budget_row, floor_row = (np.full(tables.rows("tenants") + 1, NONE, np.int32) for _ in range(2))
    budget_row[tenants] = first_budget + np.arange(len(tenants))
    floor_row[floors] = first_floor + np.arange(len(floors))
    tenant = skeleton.jobs.floor_row
    budget = np.maximum(0, np.append(tables["tenants.budget_micros_per_hour"], 0))[tenant]
    jobs = skeleton.jobs._replace(
        budget_row=budget_row[tenant],
        budget=np.where(budget_row[tenant] >= 0, budget, 0),
        floor_row=floor_row[tenant],
    )
    bundles, lease_of = _bundles(jobs, leases, own, use_link, links.first_row, pools)
    used = np.zeros(first_floor + len(floors), np.int64)
    fixed = np.repeat(kept[lease_of], np.diff(bundles.entry_start))
    np.add.at(used, bundles.entry_row[fixed], bundles.entry_use[fixed])
    floor_gpus = tables["tenants.floor_gpus"][floors]
    shared = np.maximum(SHARES, used[links.first_row : first_floor])
    pool_start, pool_units, pool_cost = _curves(
        tables, np.maximum(capacity, used[: slots * pools].reshape(slots, pools))
    )
    rest = np.arange(1, len(shared) + len(floors) + 1)
    rows = Rows(
        base=np.concatenate([np.zeros(first_floor, np.int64), -floor_gpus]),
        step_start=np.concatenate([pool_start, pool_start[-1] + rest]),
        step_units=np.concatenate([pool_units, shared, floor_gpus]),
        step_cost=np.concatenate([pool_cost, np.zeros(len(shared), np.int64), np.full(len(floors), penalty)]),
    )
    return Stocked(rows, links, patterns, jobs, bundles)


def _curves(tables: Tables, capacity: Int) -> tuple[Int, Int, Int]:
    """Return the steps of the pools' rows: the flat ask first, the pool's last GPUs at its ask steps.

    Where a pool is smaller than its steps together, the dearest GPUs are the ones that are missing.
    """
    flat = tables["pools.ask_micros_per_gpu_hour"]
    owner, gpus = tables["ask_steps.pool"], tables["ask_steps.gpus"]
    slots, pools = capacity.shape
    if len(owner) == 0:
        steps = np.arange(slots * pools + 1)
        return steps, capacity.reshape(-1), np.tile(flat, slots)
    beyond = np.bincount(owner, gpus, pools).astype(np.int64)
    parent = np.concatenate([np.arange(pools), owner])
    order = np.argsort(parent, kind="stable")
    cost = np.concatenate([flat, tables["ask_steps.ask_micros_per_gpu_hour"]])[order]
    parent = parent[order]
    first = np.searchsorted(parent, np.arange(pools))
    units = []
    for free in capacity:
        wanted = np.concatenate([np.maximum(0, free - beyond), gpus])[order]
        before = np.cumsum(wanted) - wanted
        before -= before[first][parent]
        units.append(np.clip(free[parent] - before, 0, wanted))
    counts = np.tile(np.bincount(parent, minlength=pools), slots)
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return start, np.concatenate(units), np.tile(cost, slots)


def _links_in_use(links: Links, patterns: Patterns, own: Own) -> tuple[Links, Patterns, Index]:
    """Keep the links that some column uses: a market may measure many more."""
    used = np.zeros(len(links.from_site) + 1, np.bool_)
    used[patterns.up.reshape(-1)] = True
    used[patterns.down.reshape(-1)] = True
    entries = _own_entries(own)
    used[own.use_link[entries]] = True
    used = used[:-1]
    number = np.append(np.cumsum(used) - 1, NONE).astype(np.int32)
    kept = Links(
        0,
        links.from_site[used],
        links.to_site[used],
        links.bits_per_s[used],
        links.delay_s[used],
        links.loss[used],
        links.egress_micros_per_gb[used],
    )
    return kept, patterns._replace(up=number[patterns.up], down=number[patterns.down]), number[own.use_link]


def _own_entries(own: Own) -> Int:
    """Return the places of the link uses that exist."""
    room = np.diff(own.use_start)
    place = np.arange(len(own.use_link)) - np.repeat(own.use_start[:-1], room)
    return np.flatnonzero(place < np.repeat(np.where(own.stands, own.used, 0), room))


def _bundles(
    jobs: Jobs, leases: Leases, own: Own, use_link: Index, first_link_row: int, pools: int
) -> tuple[Bundles, Int]:
    """Return the incumbents' own places with their entries in the order of rows, and whose they are."""
    lease_of = np.flatnonzero(own.stands)
    number = np.cumsum(own.stands) - 1
    part_lease = np.repeat(np.arange(len(leases.job)), np.diff(leases.part_start))
    bundle, row, use = [], [], []
    for slot in range(int(own.slots.max(initial=1))):
        parts = np.flatnonzero(own.stands[part_lease] & (own.slots[part_lease] > slot))
        bundle.append(number[part_lease[parts]])
        row.append(slot * pools + leases.part_pool[parts].astype(np.int64))
        use.append(leases.part_gpus[parts])
    entries = _own_entries(own)
    use_lease = np.repeat(np.arange(len(leases.job)), np.diff(own.use_start))[entries]
    bundle.append(number[use_lease])
    row.append(first_link_row + use_link[entries].astype(np.int64))
    use.append(own.use_shares[entries])
    job = leases.job[lease_of]
    shares = np.zeros(len(lease_of), np.int64)
    _budget_shares(jobs, job, own.spends[lease_of], shares)
    held = np.bincount(part_lease, leases.part_gpus, len(leases.job)).astype(np.int64)[lease_of]
    for own_row, amount in ((jobs.budget_row[job], shares), (jobs.floor_row[job], -held)):
        counted = np.flatnonzero((own_row >= 0) & (amount != 0))
        bundle.append(counted)
        row.append(own_row[counted].astype(np.int64))
        use.append(amount[counted])
    owners, rows, uses = (np.concatenate(columns).astype(np.int64) for columns in (bundle, row, use))
    # Traffic over one link that a lease states twice is one use.
    key, place = np.unique(owners << 32 | rows, return_inverse=True)
    total = np.zeros(len(key), np.int64)
    np.add.at(total, place, uses)
    entry_owner = key >> 32
    start = np.zeros(len(jobs.must) + 1, np.int64)
    start[1:] = np.cumsum(np.bincount(job, minlength=len(jobs.must)))
    return Bundles(
        start,
        own.value[lease_of],
        own.charge_max[lease_of],
        np.searchsorted(entry_owner, np.arange(len(lease_of) + 1)).astype(np.int64),
        (key & 0xFFFFFFFF).astype(np.int32),
        total,
    ), lease_of


@compiled_loop
def _budget_shares(jobs: Jobs, job: Index, spends: Int, out: Int) -> None:
    for place in range(len(job)):
        out[place] = min(kernel.budget_shares(jobs, job[place], spends[place]), _BUDGET_SHARES_MAX)
