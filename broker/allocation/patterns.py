"""Ways to join pools of several sites: every span that links and hubs allow, best links first.

A set of sites can be spanned where one of them listens (the hub) and has links both ways with each
other one. On such a set a pattern takes one pool per site, all of one GPU type, and splits a job's
GPUs by a weight. Two sites may also mix types, for jobs that allow it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import NONE, SPAN_SITES_MAX, Flag, Index, Int, Links, Patterns, Pools

# Beyond this a master problem no longer fits a round; the best links come first.
PATTERNS_MAX: Final = 200_000
# Spans of three and four sites look at this many of a hub's best neighbours, fewer where that is too many.
NEIGHBOURS_MAX: Final = 16
# How a span's GPUs are divided, by number of sites: evenly, or with one site the largest. Pools of one
# type may also be divided by what each may give one job, so that what only just fits together is found.
WEIGHTS: Final = {2: ((1, 1), (3, 1), (1, 3)), 3: ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)), 4: ((1, 1, 1, 1),)}
# A family's place in the int64 that names it: four kinds, and how a mix of two types is divided.
_KIND_BITS: Final = 15


class Families(NamedTuple):
    """What the patterns of a family have in common.

    kinds       [family, 4] in rising order, -1 where fewer
    mixed       whether its kinds are of different types: then all its patterns divide alike, so
                that a job's limits by type hold in all of them or in none
    swapped     for a mix: whether the second kind is the first part
    weight      for a mix: the weights of its two parts
    parts_min   sites of its smallest pattern
    ask_low     the lowest flat ask among its pools
    """

    kinds: Index
    mixed: Flag
    swapped: Flag
    weight: Index
    parts_min: Index
    ask_low: Int


class Joining(NamedTuple):
    """Who can be joined with whom: neighbours of each hub, best links first."""

    start: Int
    site: Index
    up: Index
    down: Index


class Joined(NamedTuple):
    """The patterns found, their families, and how many sets of sites were left out."""

    patterns: Patterns
    families: Families
    left_out: int


def joined(
    *,
    links: Links,
    pools: Pools,
    kind_type: Index,
    usable: Flag,
    asks: Int,
    listens: Flag,
    sites_max: int,
    mixes: Flag,
) -> Joined:
    """Return all patterns of 2 to `sites_max` sites over the usable pools.

    `mixes[a, b]` says which two types a job may mix.
    """
    types = mixes.shape[0]
    pool_of = np.full((len(listens), types), NONE, dtype=np.int32)
    chosen = np.flatnonzero(usable)
    pool_of[pools.site[chosen], kind_type[pools.kind[chosen]]] = chosen
    joining = _joining(links, listens, pool_of)
    found = []
    left_out, room = 0, PATTERNS_MAX
    for parts in range(2, min(sites_max, SPAN_SITES_MAX) + 1):
        weights = np.array(WEIGHTS[parts], dtype=np.int32)
        neighbours = NEIGHBOURS_MAX if parts > 2 else 1 << 30
        mixed = mixes if parts == 2 else np.zeros_like(mixes)
        gives = np.minimum(pools.job_max, np.iinfo(np.int32).max).astype(np.int32)
        scratch = np.full((4, SPAN_SITES_MAX), NONE, np.int32)
        arguments = (joining, listens, pool_of, mixed, weights, gives, scratch)
        count = int(_enumerate(*arguments, neighbours, room, np.zeros((0, 1), np.int32)))
        while count > room and neighbours > parts - 1 and parts > 2:
            neighbours -= 1
            count = int(_enumerate(*arguments, neighbours, room, np.zeros((0, 1), np.int32)))
        rows = np.full((min(count, room), 4 * SPAN_SITES_MAX + 2), NONE, dtype=np.int32)
        _enumerate(*arguments, neighbours, room, rows)
        found.append(rows)
        left_out += _left_out(joining, listens, parts, neighbours) + max(0, count - room)
        room -= len(rows)
    rows = np.concatenate(found) if found else np.zeros((0, 4 * SPAN_SITES_MAX + 2), np.int32)
    return _by_family(rows, pools, kind_type, asks, left_out)


def _joining(links: Links, listens: Flag, pool_of: Index) -> Joining:
    """Return each site's neighbours by links both ways, best first; only sites with pools to join."""
    sites = len(listens)
    useful: Flag = np.any(pool_of >= 0, axis=1)
    key = links.from_site.astype(np.int64) * sites + links.to_site
    back = links.to_site.astype(np.int64) * sites + links.from_site
    order = np.argsort(key, kind="stable")
    place = np.minimum(np.searchsorted(key[order], back), max(0, len(key) - 1))
    reverse = order[place] if len(key) else order
    mutual = key[reverse] == back if len(key) else np.zeros(0, np.bool_)
    mutual = mutual & (links.from_site != links.to_site) & useful[links.from_site] & useful[links.to_site]
    mutual &= listens[links.from_site] | listens[links.to_site]
    down = np.flatnonzero(mutual)
    up = reverse[down]
    speed = np.minimum(links.bits_per_s[down], links.bits_per_s[up])
    delay = links.delay_s[down] + links.delay_s[up]
    ranked = np.lexsort((links.to_site[down], delay, -speed, links.from_site[down]))
    down, up = down[ranked], up[ranked]
    return Joining(
        np.searchsorted(links.from_site[down], np.arange(sites + 1)).astype(np.int64),
        links.to_site[down].astype(np.int32),
        up.astype(np.int32),
        down.astype(np.int32),
    )


def _left_out(joining: Joining, listens: Flag, parts: int, neighbours: int) -> int:
    """Return how many hubs with their sets of neighbours were not looked at."""
    degrees = np.diff(joining.start)[listens].astype(object)
    total = 0
    for degree in degrees if parts > 2 else ():
        everything = kept = 1
        for part in range(parts - 1):
            everything = everything * (degree - part) // (part + 1)
            kept = kept * (min(degree, neighbours) - part) // (part + 1)
        total += max(0, int(everything)) - max(0, int(kept))
    return total


@compiled_loop
def _enumerate(
    joining: Joining,
    listens: Flag,
    pool_of: Index,
    mixes: Flag,
    weights: Index,
    gives: Index,
    scratch: Index,
    neighbours: int,
    room: int,
    rows: Index,
) -> int:
    """Fill `rows` with patterns (where it has any room) and return how many there are, at most room + 1.

    `scratch` is room for the sites, links up, links down and neighbours of one set (4 each).
    A row is 4 pools, 4 weights, 4 links up, 4 links down, the number of parts and the hub's.
    """
    parts = weights.shape[1]
    types = pool_of.shape[1]
    sites, ups, downs, chosen = scratch[0], scratch[1], scratch[2], scratch[3]
    count = 0
    for hub in range(len(listens)):
        first, last = joining.start[hub], joining.start[hub + 1]
        degree = min(last - first, neighbours)
        if not listens[hub] or degree < parts - 1:
            continue
        for part in range(parts - 1):
            chosen[part] = part
        while True:
            # Two sites that both listen are one pattern: the hub is the first by name.
            other = joining.site[first + chosen[0]]
            if parts > 2 or hub < other or not listens[other]:
                sites[0], ups[0], downs[0] = hub, -1, -1
                for part in range(1, parts):
                    edge = first + chosen[part - 1]
                    site, up, down = joining.site[edge], joining.up[edge], joining.down[edge]
                    place = part
                    while place > 0 and sites[place - 1] > site:
                        sites[place], ups[place], downs[place] = sites[place - 1], ups[place - 1], downs[place - 1]
                        place -= 1
                    sites[place], ups[place], downs[place] = site, up, down
                for kind in range(types):
                    for second in range(types):
                        if second != kind and not (parts == 2 and mixes[kind, second]):
                            continue
                        whole = True
                        for part in range(parts):
                            if pool_of[sites[part], kind if part == 0 else second] < 0:
                                whole = False
                        if not whole:
                            continue
                        uneven = False
                        for part in range(1, parts):
                            if second == kind and gives[pool_of[sites[part], kind]] != gives[pool_of[sites[0], kind]]:
                                uneven = True
                        for weight in range(len(weights) + (1 if uneven else 0)):
                            if count < len(rows):
                                row = rows[count]
                                for part in range(parts):
                                    row[part] = pool_of[sites[part], kind if part == 0 else second]
                                    if weight < len(weights):
                                        row[4 + part] = weights[weight, part]
                                    else:
                                        row[4 + part] = gives[row[part]]
                                    row[8 + part] = ups[part]
                                    row[12 + part] = downs[part]
                                    if ups[part] < 0:
                                        row[17] = part
                                row[16] = parts
                            count += 1
                            if count > room:
                                return count
            # The next choice of neighbours, in order.
            part = parts - 2
            while part >= 0 and chosen[part] == degree - (parts - 1) + part:
                part -= 1
            if part < 0:
                break
            chosen[part] += 1
            for after in range(part + 1, parts - 1):
                chosen[after] = chosen[after - 1] + 1
    return count


def _by_family(rows: Index, pools: Pools, kind_type: Index, asks: Int, left_out: int) -> Joined:
    """Return the patterns in the order of their families, found order within one."""
    pool = rows[:, :4]
    present = pool >= 0
    kinds = np.where(present, pools.kind[pool], NONE).astype(np.int64)
    # Distinct kinds in rising order, the absent ones last.
    far = 1 << (_KIND_BITS + 1)
    spread = np.sort(np.where(present, kinds, far), axis=1)
    spread[:, 1:][spread[:, 1:] == spread[:, :-1]] = far
    spread = np.sort(spread, axis=1)
    distinct = np.where(spread == far, NONE, spread)
    types = np.where(present, kind_type[np.maximum(kinds, 0)], NONE) if len(rows) else kinds
    mixed = (rows[:, 16] == 2) & (types[:, 0] != types[:, 1])
    swapped = kinds[:, 0] != distinct[:, 0]
    unequal = np.where(rows[:, 4] > rows[:, 5], 1, 2)
    division = 1 + 2 * np.where(rows[:, 4] == rows[:, 5], 0, unequal) + swapped
    key = np.where(mixed, division, 0)
    for part in range(SPAN_SITES_MAX):
        key = (key << _KIND_BITS) | (distinct[:, part] + 1)
    # By the lowest kind first, so that families of one type lie together.
    _, first, family = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(family, kind="stable")
    unordered = rows
    rows, family = rows[order], family[order]
    count = len(first)
    start = np.searchsorted(family, np.arange(count + 1)).astype(np.int64)
    lowest = (
        np.where(present, asks[pool], np.iinfo(np.int64).max).min(axis=1)[order] if len(rows) else np.zeros(0, np.int64)
    )
    patterns = Patterns(
        pool=np.ascontiguousarray(rows[:, :4]),
        weight=np.ascontiguousarray(np.maximum(rows[:, 4:8], 0)),
        parts=np.ascontiguousarray(rows[:, 16]),
        hub=np.ascontiguousarray(rows[:, 17]),
        up=np.ascontiguousarray(rows[:, 8:12]),
        down=np.ascontiguousarray(rows[:, 12:16]),
        family_start=start,
    )
    families = Families(
        kinds=np.ascontiguousarray(distinct[first], dtype=np.int32),
        mixed=mixed[first],
        swapped=swapped[first],
        weight=np.ascontiguousarray(np.maximum(unordered[first, 4:6], 0)),
        parts_min=np.minimum.reduceat(rows[:, 16], start[:-1]).astype(np.int32) if count else np.zeros(0, np.int32),
        ask_low=np.minimum.reduceat(lowest, start[:-1]) if count else np.zeros(0, np.int64),
    )
    return Joined(patterns, families, left_out)
