"""Market nodes: where the LP joins jobs that may use any pool of a region, a continent or the world.

    pool --> node(region, good, size) --> node(continent, good, size) --> node(world, good, size)
                     |                            |
                     v smaller size               v smaller size

A node's size is the largest count of GPUs that every pool feeding it can give to one job. A job that
wants n GPUs of a good takes them from the node of the least size >= n. Counts that the same pools of
a scope can serve share a node.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.instance import NONE, Index, Instance, Int
from broker.allocation.layout import Layout, inside_one


class Nodes(NamedTuple):
    """Nodes and what feeds them.

    `sizes` are the distinct counts of GPUs that singles ask for; node[cell, k] is the node that serves
    sizes[k] in a cell (scope x goods + good) of Layout, -1 if none. `names` are (level, scope, good,
    size). Flows go from offers of Goods to nodes, arcs from node to node.
    """

    sizes: Int
    node: Index
    names: tuple[tuple[int, int, int, int], ...]
    flow_offer: Index
    flow_node: Index
    arc_from: Index
    arc_to: Index

    @property
    def total(self) -> int:
        """Nodes in all."""
        return len(self.names)


def market_nodes(instance: Instance, layout: Layout) -> Nodes:
    """Return the nodes of every region, continent and the world, and who feeds them."""
    goods, sites = instance.goods, instance.sites
    good_count = len(goods.kind)
    sizes = np.unique(instance.singles.gpus)
    reach = np.searchsorted(sizes, goods.offer_limit, side="right") - 1
    cells = len(layout.start) - 1
    node = np.full((cells, len(sizes)), NONE, np.int32)
    names: list[tuple[int, int, int, int]] = []
    flows: list[NDArray[np.int64]] = []
    arcs: list[tuple[int, int]] = []
    offer_site = instance.pools.site[goods.offer_pool]
    # The scope below through which an offer already reaches this one: its region, or its continent.
    region, continent = sites.region[offer_site], sites.continent[offer_site]
    levels = [int(first) for first in layout.level_scope] + [int(layout.level_scope[3]) + 1]
    below_region = np.where((region >= 0) & inside_one(sites.region, sites.continent)[region], region, NONE)
    below = {1: np.full(len(offer_site), NONE), 2: below_region, 3: continent}
    offset = {1: 0, 2: levels[1], 3: levels[2]}
    for level in (1, 2, 3):
        for scope in range(levels[level], levels[level + 1]):
            for good in range(good_count):
                cell = scope * good_count + good
                offers = layout.offer[layout.start[cell] : layout.start[cell + 1]]
                offers = offers[reach[offers] >= 0]
                if not len(offers):
                    continue
                served = np.unique(reach[offers])
                first = len(names)
                node[cell] = _next_at_least(served, len(sizes), first)
                names.extend((level, scope - levels[level], good, int(sizes[size])) for size in served)
                arcs.extend((first + place + 1, first + place) for place in range(len(served) - 1))
                through = below[level][offers]
                direct = offers[through < 0]
                flows.append(np.stack([direct, node[cell, reach[direct]]]).astype(np.int64))
                for inner in np.unique(through[through >= 0]):
                    inner_cell = (offset[level] + int(inner)) * good_count + good
                    inner_served = np.unique(reach[offers[through == inner]])
                    arcs.extend((int(node[inner_cell, size]), int(node[cell, size])) for size in inner_served)
    flow = np.concatenate(flows, axis=1) if flows else np.zeros((2, 0), np.int64)
    arc = np.array(arcs, np.int32).reshape(-1, 2)
    return Nodes(
        sizes=sizes,
        node=node,
        names=tuple(names),
        flow_offer=flow[0].astype(np.int32),
        flow_node=flow[1].astype(np.int32),
        arc_from=arc[:, 0],
        arc_to=arc[:, 1],
    )


def _next_at_least(served: Int, count: int, first: int) -> Index:
    """Return for sizes 0 .. count - 1 the node of the least served size at or above it, -1 if none."""
    place = np.searchsorted(served, np.arange(count))
    return np.where(place < len(served), first + place, NONE).astype(np.int32)
