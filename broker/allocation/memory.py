"""What searches at earlier prices have shown about jobs' spans, so that a later search can leave jobs out.

A search keeps a span's columns close to the job's best and leaves out the others by bounds: none of them is worth
more than the highest of those bounds. At other prices a column is worth more by at most its GPUs times the largest
fall of a price among its family's pools, and what its links have become cheaper. Where even so none left out can reach
what the job has from its singles and from the columns kept, the span needs no search: exactly, not nearly.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from broker.allocation.instance import SHARES, SPAN_SITES_MAX, Flag, Index, Instance, Real

# Parts joined to a hub, each by a link up and one down.
_LINKS_MAX: Final = 2 * (SPAN_SITES_MAX - 1)
# Sums of floats: far more than they can be off, far less than any width.
_MARGIN: Final = 1e-9
_UNBOUNDED: Final = 1e300


class Memory:
    """Columns kept from searches on one instance: `job`, `item` and `place`, ordered by job."""

    def __init__(self, instance: Instance) -> None:
        """Know nothing yet: every span needs a search."""
        self._instance = instance
        self.job = np.zeros(0, np.int32)
        self.item = np.zeros(0, np.int32)
        self.place = np.zeros(0, np.int32)
        count = len(instance.spans.gpus)
        # No column of a span that is not kept was worth more than `_rest` at the prices `_seen` in `_prices`.
        self._rest = np.full(count, np.inf)
        self._seen = np.zeros(count, np.int64)
        self._prices: list[Real] = []
        self._owner = np.repeat(np.arange(instance.job_count), np.diff(instance.spans.start))
        patterns = instance.patterns
        kinds = int(instance.pools.kind.max(initial=-1)) + 1
        self._has_kind = np.zeros((len(patterns.family_start) - 1, kinds), bool)
        family = np.repeat(np.arange(len(self._has_kind)), np.diff(patterns.family_start))
        for part in range(patterns.pool.shape[1]):
            inside = patterns.pool[:, part] >= 0
            self._has_kind[family[inside], instance.pools.kind[patterns.pool[inside, part]]] = True

    def doubtful(self, y: Real, top: Real) -> Flag:
        """Return the spans of which a column not kept may be worth as much as its job's `top` [jobs] at y."""
        jobs, spans = self._instance.jobs, self._instance.spans
        if not self._prices:
            return np.ones(len(spans.gpus), bool)
        pools, links = (np.stack(part) for part in zip(*(self._falls(old, y) for old in self._prices), strict=True))
        gain = spans.gpus * pools[self._seen, spans.family] + _LINKS_MAX * SHARES * links[self._seen]
        gain += np.maximum(0.0, -self._fall_of(jobs.floor_row, y)) * spans.gpus
        # What a span uses of a budget is not bounded here.
        gain[self._fall_of(jobs.budget_row, y) > 0] = _UNBOUNDED
        worth, needed = self._rest + gain, top[self._owner]
        # Infinite where nothing is known, or nothing is left out: no margin is needed there.
        finite = np.isfinite(worth) & np.isfinite(needed)
        margin = np.where(finite, _MARGIN * (np.abs(worth) + np.abs(needed)), 0.0)
        doubt: Flag = ~(worth + margin < needed)
        return doubt

    def learn(self, y: Real, searched: Flag, rest: Real, *, job: Index, item: Index, place: Index) -> None:
        """Take in a search of spans: the columns it kept, and that none else is worth more than its span's `rest`."""
        self._prices.append(y.astype(np.float64))
        self._seen[searched] = len(self._prices) - 1
        self._rest[searched] = rest[searched]
        old = ~searched[self.item]
        held = [
            np.concatenate([before[old], now])
            for before, now in ((self.job, job), (self.item, item), (self.place, place))
        ]
        ranked = np.argsort(held[0], kind="stable")
        self.job, self.item, self.place = (part[ranked] for part in held)

    def _fall_of(self, row: Index, y: Real) -> Real:
        """Return per span how far the price of its job's own `row` has fallen, 0 where it has none."""
        fall, row = np.zeros(len(self._owner)), row[self._owner]
        held = np.flatnonzero(row >= 0)
        if len(held):
            fall[held] = np.stack(self._prices)[self._seen[held], row[held]] - y[row[held]]
        return fall

    def _falls(self, before: Real, y: Real) -> tuple[Real, Real]:
        """Return by how much a GPU of each family, and a share of any link, costs less at y than before at most."""
        instance = self._instance
        pool_count = instance.pool_count
        fall = np.maximum(0.0, before - y)
        of_pool = fall[: pool_count * instance.slots].reshape(instance.slots, pool_count).sum(axis=0)
        of_kind = np.zeros(self._has_kind.shape[1])
        np.maximum.at(of_kind, instance.pools.kind, of_pool)
        first = instance.links.first_row
        of_link = fall[first : first + len(instance.links.bits_per_s)].max(initial=0.0)
        return np.where(self._has_kind, of_kind, 0.0).max(axis=1, initial=0.0), np.asarray(of_link)
