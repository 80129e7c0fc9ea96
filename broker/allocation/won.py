"""What a chosen column means in words and money: configuration, value, uses, and who is paid for what.

`broker.allocation.writing` makes placements of it, `broker.allocation.explain` sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from broker.allocation import kernel
from broker.allocation.clearing import Action, DataCharge
from broker.allocation.compile import Compiled
from broker.allocation.configuration import Configuration
from broker.allocation.instance import BUNDLE, NONE, SINGLE, Int
from broker.allocation.tables import Tables


@dataclass(frozen=True, slots=True)
class Won:
    """A column of a job. Rates are micro-credits per hour.

    `value` is net of what a move destroys, before egress; `charge_max` the most that the buyer may
    be charged for GPUs and link rent. `pools` are (pool, GPUs), `links` (link, shares, bytes/s).
    """

    job: int
    configuration: Configuration
    action: Action
    value: int
    egress: int
    charge_max: int
    term_s: int
    first_slot: int
    pools: tuple[tuple[int, int], ...]
    links: tuple[tuple[int, int, int], ...]
    data: tuple[DataCharge, ...]

    def gross(self, market: Market, prices: Int) -> int:
        """Return what GPUs and link shares cost per hour at the prices of rows."""
        first = market.compiled.instance.links.first_row
        gpus = sum(int(prices[pool]) * count for pool, count in self.pools)
        return gpus + sum(int(prices[first + link]) * shares for link, shares, _ in self.links)

    def uplift(self, market: Market, prices: Int) -> int:
        """Return what the market would add per hour so that the buyer pays no more than it may."""
        return 0 if self.action == "keep" else max(0, self.gross(market, prices) - max(0, self.charge_max))


class Market:
    """A compiled snapshot, and its columns told in words."""

    def __init__(self, tables: Tables, compiled: Compiled) -> None:
        """Index what telling needs."""
        self.tables, self.compiled = tables, compiled
        self.instance, self.names = compiled.instance, compiled.names
        self.link_index = {pair: number for number, pair in enumerate(self.names.links)}
        self.pool_index = {pool_id: number for number, pool_id in enumerate(self.names.pools)}
        self.lease_of = {job: lease for lease, job in enumerate(tables["incumbents.job"].tolist())}
        self._pool_texts = tables.names("locked_prices.pool_id")
        self._type_texts = tables.names("accelerators.gpu_type")
        self._out = np.zeros(kernel.SPAN_OUT, np.int64)

    def row_names(self) -> list[tuple[str, ...]]:
        """Return what each row is: ("pool", id, slot), ("link", from, to), ("budget", tenant) or ("floor", tenant)."""
        found: list[tuple[str, ...]] = [
            ("pool", pool_id, str(slot)) for slot in range(self.instance.slots) for pool_id in self.names.pools
        ]
        found += [("link", *pair) for pair in self.names.links]
        named = dict(self.tenant_rows())
        rest = {row: ("budget", tenant) for tenant, (row, _) in named.items()}
        rest |= {row: ("floor", tenant) for tenant, (_, row) in named.items()}
        return [*found, *(rest[row] for row in range(len(found), self.instance.row_count))]

    def tenant_rows(self) -> list[tuple[str, tuple[int, int]]]:
        """Return each tenant's budget row and floor row, -1 where it has none, in the order of tenants."""
        tables = self.tables
        budgets = np.flatnonzero(tables["tenants.budget_micros_per_hour"] >= 0).tolist()
        penalty = tables.market("floor_penalty_micros_per_gpu_hour")
        floors = np.flatnonzero((tables["tenants.floor_gpus"] > 0) & (penalty > 0)).tolist()
        first = self.instance.links.first_row + len(self.names.links)
        budget_row = {tenant: first + number for number, tenant in enumerate(budgets)}
        floor_row = {tenant: first + len(budgets) + number for number, tenant in enumerate(floors)}
        return [
            (tenant_id, (budget_row.get(number, NONE), floor_row.get(number, NONE)))
            for number, tenant_id in enumerate(self.names.tenants)
        ]

    def locked_prices(self, job: int) -> dict[str, int]:
        """Return what a running job pays per GPU-hour by pool."""
        tables, lease = self.tables, self.lease_of[job]
        rows = np.flatnonzero(tables["locked_prices.incumbent"] == lease).tolist()
        return {self._pool_texts[row]: int(tables["locked_prices.price_micros_per_gpu_hour"][row]) for row in rows}

    def requests(self, job: int) -> list[tuple[str, int, int]]:
        """Return what a job asks for: GPU type, least and most GPUs."""
        tables = self.tables
        first, end = np.searchsorted(tables["accelerators.job"], [job, job + 1]).tolist()
        return [
            (
                self._type_texts[row],
                int(tables["accelerators.count_min"][row]),
                int(tables["accelerators.count_max"][row]),
            )
            for row in range(first, end)
        ]

    def told(self, job: int, form: int, item: int, place: int) -> Won:
        """Return a column in words and money."""
        configuration = self.names.configuration(job, form, item, place)
        first_slot, end_slot = self.names.slots(form, item)
        slots = end_slot - first_slot
        links = self._links(configuration)
        data = self._data(job, configuration)
        egress = self._egress(links, data)
        speed = configuration.samples_per_s
        action: Action = "move" if job in self.lease_of else "start"
        if form == BUNDLE:
            charge_max = int(self.instance.bundles.charge_max[item])
            action = "keep" if self.instance.jobs.must[job] else "renew"
            value = charge_max + egress
        else:
            out = self._out
            if form == SINGLE:
                kernel.single_column(self.instance, job, item, place, out)
            else:
                kernel.span_column(self.instance, job, item, place, out)
            assert int(out[kernel.EGRESS]) == egress * slots, "a column's egress is its traffic's and its data's"
            value, charge_max = int(out[kernel.VALUE]) // slots + egress, int(out[kernel.CHARGE_MAX])
        return Won(
            job=job,
            configuration=configuration,
            action=action,
            value=value,
            egress=egress,
            charge_max=charge_max,
            term_s=self._term_s(job, speed, action),
            first_slot=first_slot,
            pools=tuple((self.pool_index[part.pool_id], part.gpus) for part in configuration.parts),
            links=links,
            data=data if action != "keep" else (),
        )

    def _links(self, configuration: Configuration) -> tuple[tuple[int, int, int], ...]:
        rows = []
        for row in configuration.traffic:
            link = self.link_index.get((row.from_site, row.to_site))
            if link is not None:
                shares = kernel.link_shares(self.instance.links.bits_per_s[link], row.bytes_per_s)
                rows.append((link, int(shares), row.bytes_per_s))
        return tuple(sorted(rows))

    def _data(self, job: int, configuration: Configuration) -> tuple[DataCharge, ...]:
        home = int(self.instance.jobs.home[job])
        per_sample = float(self.instance.jobs.data_bytes_per_sample[job])
        if home < 0 or per_sample == 0.0:
            return ()
        rows = []
        gpus = configuration.gpus
        for part in configuration.parts:
            read = int(np.ceil(per_sample * configuration.samples_per_s * part.gpus / gpus))
            site = self.names.sites.index(part.site_id)
            price = int(self.instance.jobs.tier_price[job, kernel.tier_of(self.instance, job, site)])
            if price > 0:
                rows.append(
                    DataCharge(
                        from_site=self.names.sites[home],
                        to_site=part.site_id,
                        bytes_per_s=read,
                        price_micros_per_gb=price,
                    )
                )
        return tuple(rows)

    def _egress(self, links: Sequence[tuple[int, int, int]], data: Sequence[DataCharge]) -> int:
        prices = self.instance.links.egress_micros_per_gb
        rates = [(sent, int(prices[link])) for link, _, sent in links]
        rates += [(row.bytes_per_s, row.price_micros_per_gb) for row in data]
        return sum(int(kernel.ceil_rate(float(sent) * 3600.0 * float(price) / 1e9)) for sent, price in rates)

    def _term_s(self, job: int, speed: float, action: Action) -> int:
        if action == "keep":
            ends_ms = int(self.tables["incumbents.term_ends_ms"][self.lease_of[job]])
            return max(1, (ends_ms - int(self.tables.market("taken_at_ms"))) // 1000)
        return int(kernel.term_seconds(self.instance, job, speed))
