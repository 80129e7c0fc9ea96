"""The groups of sites over which the verifier spreads jobs, as columns: its own, as `demand` is.

Which groups there are follows the chapter: pairs of sites with a listening hub and links both ways, larger groups of a
hub and its best neighbours. A *spread* is every way to divide a number of GPUs over the groups of some types and size:
rows of pools, counts and links, made once and shared by all jobs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from broker.allocation.errors import AllocationError
from broker.allocation.rules import SPAN_SITES_MAX, WEIGHTS, Pair, Rules

Array = NDArray[Any]
# Sites of a pair: it may mix types, and its hub is the first by name.
PAIR: Final = 2
# As the chapter says: how many groups there may be, and of how many of a hub's best neighbours.
GROUPS_MAX: Final = 200_000
NEIGHBOURS_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class Bench:
    """The pools by column: index of site, speed, supply and price by slot."""

    pool_ids: tuple[str, ...]
    site: Array
    flops_per_s: Array
    ring_bits_per_s: Array
    most: Array
    price: Array


@dataclass(frozen=True, slots=True)
class _Groups:
    """Groups of sites with one way to divide GPUs: [group, part] pools of a bench, and links."""

    weights: tuple[int, ...]
    pool: Array
    up: Array
    down: Array


@dataclass(frozen=True, slots=True)
class Spread:
    """Every way to divide `total` GPUs over groups of `parts` sites: [row, part] pools, counts and links.

    `pools` are the distinct pools; `price` [slot, pool] is the bench's.
    """

    parts: int
    total: int
    pool: Array
    counts: Array
    up: Array
    down: Array
    pools: Array
    price: Array
    _sorted: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def cost(self, slots: int) -> Array:
        """Return what the rows' GPUs cost over the first slots, in rising order."""
        return self._by_cost(slots)[0]

    def order(self, slots: int) -> Array:
        """Return the rows in the order of `cost`."""
        return self._by_cost(slots)[1]

    def _by_cost(self, slots: int) -> tuple[Array, Array]:
        if slots not in self._sorted:
            cost = (self.counts * self.price[:slots].sum(axis=0)[self.pool]).sum(axis=1)
            order = np.argsort(cost, kind="stable")
            self._sorted[slots] = cost[order], order
        return self._sorted[slots]


class Groups:
    """The groups of a snapshot's sites, and the spreads over them as they are asked for."""

    def __init__(
        self, rules: Rules, bench: Bench, of_type: Mapping[str, Array], link_number: Mapping[Pair, int]
    ) -> None:
        """Keep what groups are made of."""
        self._rules, self._bench, self._of_type, self._link_number = rules, bench, of_type, link_number
        self._found: dict[tuple[str, ...], list[_Groups]] = {}
        self._spreads: dict[tuple[tuple[str, ...], int, int], Spread | None] = {}

    def spread(self, types: tuple[str, ...], parts: int, total: int) -> Spread | None:
        """Return the ways to divide `total` GPUs over groups of `parts` sites with these types, None without any."""
        key = types, parts, total
        if key not in self._spreads:
            self._spreads[key] = self._spread(types, parts, total)
        return self._spreads[key]

    def _spread(self, types: tuple[str, ...], parts: int, total: int) -> Spread | None:
        kept = []
        for groups in self._groups_of(types):
            if len(groups.weights) != parts:
                continue
            counts = np.array(divided(total, groups.weights))
            if counts.min() < 1:
                continue
            fits = (counts <= self._bench.most[0][groups.pool]).all(axis=1)
            if fits.any():
                pool = groups.pool[fits]
                kept.append((pool, np.broadcast_to(counts, pool.shape), groups.up[fits], groups.down[fits]))
        if not kept:
            return None
        pool, counts, up, down = (np.concatenate(columns) for columns in zip(*kept, strict=True))
        return Spread(parts, total, pool, counts, up, down, np.unique(pool), self._bench.price)

    def _groups_of(self, types: tuple[str, ...]) -> list[_Groups]:
        """Return the groups whose pools have these types: one type for all parts, or one for each of two."""
        if types in self._found:
            return self._found[types]
        found: list[_Groups] = []
        for parts, (sites, hubs) in self._site_groups.items():
            if len(types) == PAIR and parts != PAIR:
                continue
            kinds = types if len(types) == PAIR else types * parts
            pools = np.stack([self._pool_at(kind)[sites[:, part]] for part, kind in enumerate(kinds)], axis=1)
            whole = (pools >= 0).all(axis=1)
            pools, here, hub = pools[whole], sites[whole], hubs[whole]
            if not len(pools):
                continue
            up, down = self._links_of(here, hub)
            found += [_Groups(weights, pools, up, down) for weights in WEIGHTS[parts]]
            if len(types) < PAIR:
                found += self._by_what_they_give(pools, up, down)
        self._found[types] = found
        return found

    def _by_what_they_give(self, pools: Array, up: Array, down: Array) -> list[_Groups]:
        """Return the groups of unlike pools, divided by the most that each gives one job."""
        gives = self._bench.most[0][pools]
        distinct, number = np.unique(gives, axis=0, return_inverse=True)
        number = number.reshape(-1)
        return [
            _Groups(tuple(weights), pools[number == place], up[number == place], down[number == place])
            for place, weights in enumerate(distinct.tolist())
            if len(set(weights)) > 1
        ]

    @cached_property
    def _site_groups(self) -> dict[int, tuple[Array, Array]]:
        """Return by number of sites: the groups [group, part] in order of site, and each group's hub.

        Two sites that could both be the hub are one group, whose hub is the first by name. Larger
        groups are made of a hub and some of its best neighbours: NEIGHBOURS_MAX of them, or as
        many fewer as keep the whole within GROUPS_MAX. Raises AllocationError where nothing does.
        """
        jobs = [j for j in self._rules.jobs.values() if j.sites_max > 1 and j.sync.strategy != "local"]
        jobs = [job for job in jobs if self._rules.left(job) > 0]
        wanted = {request.gpu_type for job in jobs for request in job.accelerators}
        mixes = {
            pair
            for job in jobs
            if job.mixed_types
            for pair in itertools.permutations(sorted({request.gpu_type for request in job.accelerators}), 2)
        }
        at = {gpu_type: self._pool_at(gpu_type) >= 0 for gpu_type in sorted(wanted)}
        neighbours = self._neighbours(at)
        room, found = GROUPS_MAX, {}
        for parts in range(PAIR, min(SPAN_SITES_MAX, max((job.sites_max for job in jobs), default=1)) + 1):
            nearest = NEIGHBOURS_MAX if parts > PAIR else 2**30
            while True:
                sites, hubs = self._grouped(neighbours, parts, nearest)
                count = sum(int(has[sites].all(axis=1).sum()) for has in at.values())
                if parts == PAIR:
                    count += sum(int((at[a][sites[:, 0]] & at[b][sites[:, 1]]).sum()) for a, b in mixes)
                count *= len(WEIGHTS[parts])
                count += sum(self._unlike(sites, gpu_type) for gpu_type in at)
                if count <= room or nearest <= parts - 1 or parts == PAIR:
                    break
                nearest -= 1
            if count > room:
                message = f"{count} groups of {parts} sites are more than can be verified; fewer links would help"
                raise AllocationError(message)
            room -= count
            found[parts] = (sites, hubs)
        return found

    def _unlike(self, sites: Array, gpu_type: str) -> int:
        """Return how many groups have pools of a type that do not all give the same."""
        pools = self._pool_at(gpu_type)[sites]
        gives = self._bench.most[0][pools[(pools >= 0).all(axis=1)]]
        return int((gives != gives[:, :1]).any(axis=1).sum())

    def _neighbours(self, at: Mapping[str, Array]) -> dict[int, list[int]]:
        """Return each listening site's partners by links both ways, the best links first."""
        rules = self._rules
        names = list(rules.sites)
        useful = np.logical_or.reduce([np.zeros(len(names), dtype=bool), *at.values()])
        ranked: dict[int, list[tuple[float, float, int]]] = {}
        for (hub, other), there in rules.links.items():
            back = rules.links.get((other, hub))
            a, b = rules.place[hub], rules.place[other]
            if back is None or hub not in rules.listening or not (useful[a] and useful[b]):
                continue
            speed = min(there.bandwidth_bits_per_s, back.bandwidth_bits_per_s)
            ranked.setdefault(a, []).append((-speed, there.delay_s + back.delay_s, b))
        return {hub: [site for _, _, site in sorted(found)] for hub, found in sorted(ranked.items())}

    def _grouped(self, neighbours: Mapping[int, list[int]], parts: int, nearest: int) -> tuple[Array, Array]:
        listens = {self._rules.place[site] for site in self._rules.listening if site in self._rules.place}
        groups, hubs = [], []
        for hub, others in neighbours.items():
            for chosen in itertools.combinations(others[:nearest], parts - 1):
                if parts == PAIR and chosen[0] in listens and chosen[0] < hub:
                    continue
                groups.append(sorted((hub, *chosen)))
                hubs.append(hub)
        return np.array(groups, dtype=np.int64).reshape(-1, parts), np.array(hubs, dtype=np.int64)

    def _pool_at(self, gpu_type: str) -> Array:
        """Return by site the number of its pool of a type, -1 without one."""
        at = np.full(len(self._rules.sites), -1, dtype=np.int64)
        pools = self._of_type.get(gpu_type, np.zeros(0, dtype=np.int64))
        pools = pools[self._bench.most[0][pools] > 0]
        at[self._bench.site[pools]] = pools
        return at

    def _links_of(self, sites: Array, hub: Array) -> tuple[Array, Array]:
        names = list(self._rules.sites)
        up, down = np.full(sites.shape, -1, dtype=np.int64), np.full(sites.shape, -1, dtype=np.int64)
        for row, (members, center) in enumerate(zip(sites.tolist(), hub.tolist(), strict=True)):
            for part, site in enumerate(members):
                if site != center:
                    up[row, part] = self._link_number[names[site], names[center]]
                    down[row, part] = self._link_number[names[center], names[site]]
        return up, down


def divided(total: int, weights: tuple[int, ...]) -> list[int]:
    """Divide GPUs by weight, largest remainders first, ties to the earlier part."""
    whole = sum(weights)
    counts = [total * weight // whole for weight in weights]
    remainders = sorted(range(len(weights)), key=lambda part: (-(total * weights[part] % whole), part))
    for part in remainders[: total - sum(counts)]:
        counts[part] += 1
    return counts
