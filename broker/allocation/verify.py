"""Check a clearing against its snapshot, from raw data and by other code than made it.

An empty list means: the placements are possible and allowed, the money balances, nobody pays
above a bid or gets less than an ask, and the certificate's figures are what they claim to be.
Anyone who holds the two documents can run this; `hansa market verify` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from broker.allocation.clearing import UNPROVED, Clearing, Placement
from broker.allocation.configuration import Configuration
from broker.allocation.demand import Demand
from broker.allocation.rules import SHARES, Option, Pair, Row, Rules, ladder
from broker.allocation.snapshot import JobState, Snapshot
from broker.allocation.table_rows import from_snapshot
from training.spec import GpuRequest
from training.throughput import SitePart

LP_GAP_MAX: Final = 1e-6
# A job is unsupported where it forgoes more than this share of its best surplus.
UNSUPPORTED_SHARE: Final = 100
Watch = Callable[[Iterable[JobState]], Iterable[JobState]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be: a stable code, what it concerns, and a sentence."""

    code: str
    subject: str
    sentence: str


def verify(snapshot: Snapshot, clearing: Clearing, watch: Watch = iter) -> list[Finding]:
    """Return everything that is wrong with a clearing of a snapshot; nothing, where all is well.

    `watch` wraps the long loop over all jobs, for a progress bar.
    """
    check = _Check(snapshot, clearing)
    check.documents()
    check.jobs()
    if not check.findings:
        for placement in clearing.placements:
            check.placement(placement)
        check.planned()
    if not check.findings:
        check.capacity()
        check.money()
        check.certificate(watch)
    return check.findings


class _Check:
    """The findings so far, and what the checks share."""

    def __init__(self, snapshot: Snapshot, clearing: Clearing) -> None:
        self.snapshot = snapshot
        self.clearing = clearing
        self.rules = Rules(snapshot)
        self.findings: list[Finding] = []
        self.chosen: dict[str, Option] = {}
        self.link_prices: dict[Pair, int] = {
            (row.from_site, row.to_site): row.price_micros_per_share_hour for row in clearing.link_prices
        }
        self.supplies = self.rules.supplies()
        self.prices = self._prices()
        self.used = dict.fromkeys(self.supplies, 0)

    def _prices(self) -> dict[Row, int]:
        """Return the published price of every row."""
        clearing = self.clearing
        prices: dict[Row, int] = {}
        for slot, by_pool in enumerate((clearing.prices, *clearing.later_prices)):
            prices.update({("pool", pool_id, str(slot)): price for pool_id, price in by_pool.items()})
        prices.update({("link", *pair): price for pair, price in self.link_prices.items()})
        for row in clearing.tenant_prices:
            prices["budget", row.tenant_id] = row.budget_price_micros_per_share_hour
            prices["floor", row.tenant_id] = row.floor_price_micros_per_gpu_hour
        return {row: price for row, price in prices.items() if price or row[0] == "pool"}

    def expect(self, holds: bool, code: str, subject: str, sentence: str) -> None:  # noqa: FBT001 - the claim itself
        """Note a finding unless the claim holds."""
        if not holds:
            self.findings.append(Finding(code, subject, sentence))

    def documents(self) -> None:
        """Check that the clearing is of this snapshot, and prices every pool at its ask or above."""
        clearing, rules = self.clearing, self.rules
        digest = from_snapshot(self.snapshot).digest()
        self.expect(clearing.snapshot_digest == digest, "digest", "clearing", "made from another snapshot")
        self.expect(clearing.round_number == self.snapshot.round_number, "round", "clearing", "of another round")
        slots = 1 + len(clearing.later_prices)
        self.expect(slots == self.snapshot.slots, "slots", "clearing", f"prices {slots} slots of {self.snapshot.slots}")
        for by_pool in (clearing.prices, *clearing.later_prices):
            self.expect(set(by_pool) == set(rules.pools), "pools", "clearing", "prices other pools than are offered")
        self.expect(set(self.link_prices) <= set(rules.links), "links", "clearing", "prices a link that does not exist")
        tenants = {row for row in self.prices if row[0] in {"budget", "floor"}}
        self.expect(
            tenants <= set(self.supplies), "tenants", "clearing", "prices a tenant's budget or floor that has none"
        )
        for pool_id, price in clearing.prices.items():
            ask = rules.pools[pool_id].ask_micros_per_gpu_hour if pool_id in rules.pools else 0
            self.expect(price >= ask, "below_ask", pool_id, f"priced at {price}, asked {ask}")

    def jobs(self) -> None:
        """Check that every job is placed once or listed once as unplaced, at the version of the snapshot."""
        named = [row.job_id for row in self.clearing.placements] + [row.job_id for row in self.clearing.unplaced]
        times = dict.fromkeys(self.rules.jobs, 0)
        for job_id in named:
            times[job_id] = times.get(job_id, 0) + 1
        for job_id, count in sorted(times.items()):
            wanted = 1 if job_id in self.rules.jobs else 0
            self.expect(count == wanted, "job_count", job_id, f"stands {count} times in the clearing")
        placed = {row.job_id for row in self.clearing.placements}
        for job_id in sorted(self.rules.kept - placed):
            self.expect(False, "evicted", job_id, "inside its term, yet without a place")
        for row in self.clearing.placements:
            job = self.rules.jobs.get(row.job_id)
            self.expect(
                job is None or job.version == row.job_version, "version", row.job_id, "of another version of the job"
            )

    def placement(self, row: Placement) -> None:
        """Check that the configuration is one that the job may have, predicted as the model predicts it."""
        job = self.rules.jobs[row.job_id]
        before = len(self.findings)
        option = self._option(job, row)
        if option is None:
            if len(self.findings) == before:
                self.expect(
                    False, "not_a_candidate", row.job_id, f"{row.configuration.key} is none of its configurations"
                )
            return
        self.chosen[row.job_id] = option
        sold = row.configuration
        self.expect(
            sold.samples_per_s == option.speed == row.samples_per_s, "speed", row.job_id, "not the predicted speed"
        )
        sent = {pair: size for pair, size in self.rules.sent(sold).items() if pair in self.rules.links}
        self.expect(sent == option.bytes_per_s, "traffic", row.job_id, "not the predicted traffic")
        self.expect(row.action == option.action, "action", row.job_id, f"is called {row.action}, is {option.action}")
        self.expect(
            row.term_s == option.term_s, "term", row.job_id, f"term of {row.term_s} s instead of {option.term_s}"
        )
        self.expect(
            row.value_micros_per_hour == option.value,
            "value",
            row.job_id,
            f"valued {row.value_micros_per_hour}, is {option.value}",
        )

    def _option(self, job: JobState, row: Placement) -> Option | None:
        """Return what a placement's configuration is to its job by the rules, None where it may not have it."""
        sold = row.configuration
        own = self.rules.own(job)
        if own is not None and job.incumbent is not None and job.incumbent.configuration.key == sold.key:
            if own.action == "keep":
                self.expect(
                    sold == job.incumbent.configuration, "kept", job.job_id, "kept something that it did not have"
                )
            return own
        if not self._eligible(job, sold):
            return None
        parts = [self.rules.part(job, self.rules.pools[part.pool_id], part.gpus) for part in sold.parts]
        resolved = self._plan(job, sold, parts)
        if resolved is None:
            return None
        return self.rules.option(
            job, parts, sold.sync, sold.hub_site, action="start" if job.incumbent is None else "move"
        )

    def _plan(self, job: JobState, sold: Configuration, parts: list[SitePart]) -> bool | None:
        """Check that the sync plan is what the job's own plan becomes on these sites through this hub."""
        plan = self.rules.resolved(job, parts, sold.hub_site)
        self.expect(plan == sold.sync, "sync", job.job_id, "not the resolved plan")
        return True if plan == sold.sync else None

    def _eligible(self, job: JobState, sold: Configuration, slot: int = 0) -> bool:
        before = len(self.findings)
        rules, parts = self.rules, sold.parts
        known = all(part.pool_id in rules.pools for part in parts)
        self.expect(known, "pool", job.job_id, "names an unknown pool")
        if not known:
            return False
        types = [part.gpu_type for part in parts]
        sites = [part.site_id for part in parts]
        mixed = len(set(types)) > 1
        self.expect(not mixed or job.mixed_types, "gpu_type", job.job_id, "mixes GPU types")
        asked = self._asked(job, types, [part.gpus for part in parts])
        self.expect(asked, "request", job.job_id, f"{sold.gpus} {'/'.join(sorted(set(types)))} were not asked for")
        self.expect(len(sites) <= job.sites_max, "span", job.job_id, f"spans {len(sites)} sites, may {job.sites_max}")
        self.expect(
            all(rules.may_be_at(job, site) for site in sites),
            "residency",
            job.job_id,
            "leaves the sites that it may use",
        )
        self.expect(
            all(part.gpus <= rules.most(rules.pools[part.pool_id], slot) for part in parts),
            "quota", job.job_id, "takes more of a pool than one job may",
        )  # fmt: skip
        self.expect(sold.key not in job.barred, "barred", job.job_id, "was declined by a site")
        hubs = rules.hubs(sites)
        hub = sold.hub_site is None if len(sites) == 1 else sold.hub_site in hubs
        self.expect(hub, "hub", job.job_id, "has no hub that all sites reach")
        return len(self.findings) == before

    def _asked(self, job: JobState, types: list[str], gpus: list[int]) -> bool:
        requests = {request.gpu_type: request for request in job.accelerators}
        if not set(types) <= set(requests):
            return False
        chosen = [requests[gpu_type] for gpu_type in sorted(set(types))]
        if len(chosen) > 1 and any(n > requests[kind].count_max for kind, n in zip(types, gpus, strict=True)):
            return False
        low, high = min(row.count_min for row in chosen), max(row.count_max for row in chosen)
        return sum(gpus) in ladder(GpuRequest(gpu_type=types[0], count_min=low, count_max=high))

    def planned(self) -> None:
        """Read the jobs that start later: they take room in later slots, and promise nothing."""
        for row in self.clearing.unplaced:
            job = self.rules.jobs[row.job_id]
            if row.planned is None:
                continue
            parts = [self.rules.part(job, self.rules.pools[part.pool_id], part.gpus) for part in row.planned.parts]
            start = self._slot_of(row.starts_at_ms)
            self._eligible(job, row.planned, start)
            option = None
            if start and len(parts) == 1 and job.incumbent is None:
                option = self.rules.option(job, parts, row.planned.sync, None, action="start", start=start)
            self.expect(option is not None, "planned", row.job_id, "is planned for something that it may not have")
            if option is not None:
                self.chosen[row.job_id] = option

    def _slot_of(self, starts_at_ms: int | None) -> int:
        starts = [self.rules.slot_ms(slot)[0] for slot in range(self.snapshot.slots)]
        return starts.index(starts_at_ms) if starts_at_ms in starts else 0

    def capacity(self) -> None:
        """Check that nothing scarce is sold twice, and no GPU below what its site asks for it."""
        staying = dict.fromkeys(self.supplies, 0)
        for option in self.chosen.values():
            for row, use in option.rows.items():
                self.used[row] += use
                # Jobs inside their term stay at their locked price even where this round's buys fewer GPUs.
                staying[row] += use if option.action == "keep" else 0
        for row, (base, steps) in self.supplies.items():
            price = self.prices.get(row, 0)
            most = base + sum(units for units, cost in steps if row[0] == "floor" or cost <= price)
            self.expect(
                self.used[row] <= max(most, staying[row]),
                f"oversold_{row[0]}",
                ">".join(row[1:]),
                f"{self.used[row]} sold of {most}",
            )

    def money(self) -> None:
        """Check that buyers pay up to their value, sites get their ask, and equity covers uplift."""
        drawn = 0
        for row in self.clearing.placements:
            option, job = self.chosen[row.job_id], self.rules.jobs[row.job_id]
            self._rows(row, job, option)
            if row.action == "keep":
                self.expect(row.premium_micros_per_hour == 0, "premium", row.job_id, "a kept lease goes on as sold")
                continue
            charge, uplift = row.charge_micros_per_hour, row.uplift_micros_per_hour
            gross = charge + uplift - row.premium_micros_per_hour
            drawn += math.ceil(Fraction(uplift * row.term_s, 3600))
            self.expect(
                0 <= charge <= max(0, option.charge_max),
                "above_bid",
                row.job_id,
                f"pays {charge}, may pay {option.charge_max}",
            )
            self.expect(
                uplift == max(0, gross - max(0, option.charge_max)),
                "uplift",
                row.job_id,
                f"uplift of {uplift} is not what it lacks",
            )
            as_bid = self.snapshot.payment_rule == "pay_as_bid"
            premium = max(0, option.charge_max - gross) if as_bid else 0
            self.expect(
                row.premium_micros_per_hour == premium,
                "premium",
                row.job_id,
                f"premium of {row.premium_micros_per_hour}, the payment rule makes it {premium}",
            )
            reserved = math.ceil(Fraction(charge * row.term_s, 3600)) + self._carried(row, job, option)
            self.expect(
                row.reservation_micros == reserved,
                "reservation",
                row.job_id,
                f"reserves {row.reservation_micros}, costs {reserved}",
            )
            self.expect(
                reserved <= job.hold_left_micros,
                "hold",
                row.job_id,
                f"reserves {reserved} of {job.hold_left_micros} held",
            )
        equity = self.snapshot.market_equity_micros
        self.expect(drawn <= equity, "equity", "clearing", f"promises {drawn} of uplift, equity is {equity}")

    def _carried(self, row: Placement, job: JobState, option: Option) -> int:
        """Return what a placement's traffic and reading may cost over its term, and check its rows of data."""
        rates = [(size, self.rules.links[pair].egress_price_micros_per_gb) for pair, size in option.bytes_per_s.items()]
        read = {site: (size, self.rules.data_price(job, site)) for site, size in option.data.items()}
        read = {site: row for site, row in read.items() if row[1]}
        stated = {data.to_site: (data.bytes_per_s, data.price_micros_per_gb) for data in row.data}
        self.expect(stated == read, "data", row.job_id, "the rows of data are not what it reads")
        rates += list(read.values())
        return sum(math.ceil(Fraction(size * row.term_s * price, 10**9)) for size, price in rates)

    def _rows(self, row: Placement, job: JobState, option: Option) -> None:
        self.expect(
            {charge.pool_id: charge.gpus for charge in row.pools} == option.gpus and len(row.pools) == len(option.gpus),
            "rows", row.job_id, "the price rows are not its GPUs",
        )  # fmt: skip
        for charge in row.pools:
            locked = job.incumbent.locked_prices.get(charge.pool_id, 0) if job.incumbent else 0
            price = locked if row.action == "keep" else self.clearing.prices[charge.pool_id]
            self.expect(
                charge.price_micros_per_gpu_hour == price, "price", row.job_id, f"{charge.pool_id} is not at its price"
            )
            paid = charge.payout_micros_per_gpu_hour
            used: Row = ("pool", charge.pool_id, "0")
            self.expect(paid <= price, "payout", row.job_id, f"{charge.pool_id} is paid more than the price")
            dearest = self._dearest(used)
            self.expect(
                row.action == "keep" or paid >= dearest,
                "payout",
                row.job_id,
                f"{charge.pool_id} is paid less than its ask",
            )
            fee = Fraction(price * self.snapshot.fee_basis_points, 10_000)
            self.expect(
                price - paid <= math.ceil(fee), "fee", row.job_id, f"{charge.pool_id} keeps back more than the fee"
            )
        rents = {(link.from_site, link.to_site): link.rent_micros_per_hour for link in row.links}
        due = {
            pair: 0 if row.action == "keep" else self.link_prices.get(pair, 0) * n for pair, n in option.shares.items()
        }
        self.expect(rents == due, "rent", row.job_id, "the link rows are not its traffic at the link prices")

    def _dearest(self, row: Row) -> int:
        """Return the ask of the dearest GPU that is sold of a pool."""
        price, ask, left = self.prices.get(row, 0), 0, self.used[row]
        for units, cost in self.supplies[row][1]:
            # A lease that stays takes the dearest GPUs, at its own price.
            if left > 0 and cost <= price:
                ask = cost
            left -= units
        return ask

    def certificate(self, watch: Watch) -> None:
        """Compute the certificate's figures again; the bound by looking at everything that every job may have."""
        stated = self.clearing.certificate
        demand = Demand(self.rules, self.prices)
        best = regret = unsupported = 0
        for job in watch(self.snapshot.jobs):
            most = demand.best(job)
            option = self.chosen.get(job.job_id)
            got = demand.surplus(option.worth, option.rows) if option is not None else 0
            best += most
            regret += most - got
            unsupported += (most - got) * UNSUPPORTED_SHARE > max(most, 1)
        rent = sum(self._rent(row) for row in self.supplies)
        cost = sum(self._cost(row) for row in self.supplies)
        welfare = sum(option.worth for option in self.chosen.values()) - cost
        slack = rent - sum(self.prices.get(row, 0) * used for row, used in self.used.items()) + cost
        bound = best + rent
        short = sum(self._cost(row) for row in self.supplies if row[0] == "floor")
        uplift = sum(row.uplift_micros_per_hour for row in self.clearing.placements)
        turnover = sum(row.charge_micros_per_hour for row in self.clearing.placements if row.action != "keep")
        for name, ours, theirs in (
            ("welfare", welfare, stated.welfare_micros_per_hour),
            ("bound", bound, stated.bound_micros_per_hour),
            ("regret", regret, stated.regret_sum_micros_per_hour),
            ("slack", slack, stated.slack_sum_micros_per_hour),
            ("gap", bound - welfare, stated.gap_micros_per_hour),
            ("uplift", uplift, stated.uplift_micros_per_hour),
            ("turnover", turnover, stated.turnover_micros_per_hour),
            ("unsupported", unsupported, stated.jobs_unsupported),
            ("floors", short, stated.floors_shortfall_micros_per_hour),
        ):
            self.expect(ours == theirs, f"certificate_{name}", "certificate", f"{name} is {ours}, stated {theirs}")
        self.expect(
            bound - welfare == regret + slack, "identity", "certificate", "bound - welfare is not regret + slack"
        )
        off = abs(bound - stated.lp_objective_micros_per_hour)
        # Prices are whole micro-credits: each unit that is sold or wanted may move the bound by one.
        priced = sum(
            2 * (abs(base) + sum(units for units, _ in steps))
            if row[0] == "pool"
            else SHARES * (len(self.rules.jobs) + 1)
            for row, (base, steps) in self.supplies.items()
            if self.prices.get(row)
        )
        stopped = self.clearing.status in UNPROVED
        allowed = LP_GAP_MAX * abs(bound) + priced + len(self.rules.jobs)
        self.expect(stopped or off <= allowed, "lp_gap", "certificate", f"bound and LP are {off} apart")
        self.expect(all(stated.checks.values()), "checks", "certificate", "the solver's own checks failed")
        self._transfers()

    def _rent(self, row: Row) -> int:
        base, steps = self.supplies[row]
        price = self.prices.get(row, 0)
        return base * price + sum(max(0, price - cost) * units for units, cost in steps)

    def _cost(self, row: Row) -> int:
        base, steps = self.supplies[row]
        left, total = self.used[row] - base, 0
        for units, cost in steps:
            taken = min(max(0, left), units)
            total += taken * cost
            left -= taken
        return total

    def _transfers(self) -> None:
        by_site: dict[str, int] = {}
        for row in self.supplies:
            if row[0] == "pool" and row[2] == "0":
                site = self.rules.pools[row[1]].site_id
            elif row[0] == "link":
                site = row[1]
            else:
                continue
            by_site[site] = by_site.get(site, 0) + self._rent(row)
        stated = {row.site_id: row.rent_micros_per_hour for row in self.clearing.transfers}
        self.expect(
            {site: rent for site, rent in stated.items() if rent} == {site: rent for site, rent in by_site.items() if rent},
            "transfers", "clearing", "the sites' transfers are not the rent of their capacity",
        )  # fmt: skip
