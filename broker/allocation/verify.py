"""Check a clearing against its snapshot, from raw data and by other code than made it.

An empty list means: the placements are possible and allowed, the money balances, nobody pays
above a bid or gets less than an ask, and the certificate's figures are what they claim to be.
Anyone who holds the two documents can run this; `hansa market verify` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from broker.allocation.clearing import Clearing, Placement
from broker.allocation.rules_old import Option, Pair, Rules
from broker.allocation.snapshot import JobState, Snapshot

LP_GAP_MAX = 1e-6


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be: a stable code, what it concerns, and a sentence."""

    code: str
    subject: str
    sentence: str


def verify(snapshot: Snapshot, clearing: Clearing) -> list[Finding]:
    """Return everything that is wrong with a clearing of a snapshot; nothing, where all is well."""
    check = _Check(snapshot, clearing)
    check.documents()
    check.jobs()
    if not check.findings:
        for placement in clearing.placements:
            check.placement(placement)
    if not check.findings:
        check.capacity()
        check.money()
        check.certificate()
    return check.findings


class _Check:
    """The findings so far, and what the checks share."""

    def __init__(self, snapshot: Snapshot, clearing: Clearing) -> None:
        self.snapshot = snapshot
        self.clearing = clearing
        self.rules = Rules(snapshot)
        self.findings: list[Finding] = []
        self.options = {job.job_id: self.rules.options(job) for job in snapshot.jobs}
        self.chosen: dict[str, Option] = {}
        self.link_prices: dict[Pair, int] = {
            (row.from_site, row.to_site): row.price_micros_per_share_hour for row in clearing.link_prices
        }

    def expect(self, holds: bool, code: str, subject: str, sentence: str) -> None:  # noqa: FBT001 - the claim itself
        """Note a finding unless the claim holds."""
        if not holds:
            self.findings.append(Finding(code, subject, sentence))

    def documents(self) -> None:
        """Check that the clearing is of this snapshot, and prices every pool at its ask or above."""
        clearing, rules = self.clearing, self.rules
        self.expect(
            clearing.snapshot_digest == self.snapshot.digest(), "digest", "clearing", "made from another snapshot"
        )
        self.expect(clearing.round_number == self.snapshot.round_number, "round", "clearing", "of another round")
        self.expect(
            set(clearing.prices) == set(rules.pools), "pools", "clearing", "prices other pools than are offered"
        )
        self.expect(set(self.link_prices) <= set(rules.links), "links", "clearing", "prices a link that does not exist")
        for pool_id, price in clearing.prices.items():
            ask = rules.pools[pool_id].ask_micros_per_gpu_hour if pool_id in rules.pools else 0
            self.expect(price >= ask, "below_ask", pool_id, f"priced at {price}, asked {ask}")

    def jobs(self) -> None:
        """Check that every job is placed once or listed once as unplaced, at the version of the snapshot."""
        named = [row.job_id for row in self.clearing.placements] + [row.job_id for row in self.clearing.unplaced]
        for job_id in sorted(set(named) | set(self.rules.jobs)):
            times = named.count(job_id)
            self.expect(
                times == (1 if job_id in self.rules.jobs else 0),
                "job_count",
                job_id,
                f"stands {times} times in the clearing",
            )
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
        self._eligible(job, row)
        option = next((option for option in self.options[row.job_id] if option.key == row.configuration.key), None)
        self.expect(
            option is not None, "not_a_candidate", row.job_id, f"{row.configuration.key} is none of its configurations"
        )
        if option is None:
            return
        self.chosen[row.job_id] = option
        sold = row.configuration
        self.expect(
            sold.samples_per_s == option.speed == row.samples_per_s, "speed", row.job_id, "not the predicted speed"
        )
        self.expect(
            sold.sync == option.sync and sold.hub_site == option.hub_site, "sync", row.job_id, "not the resolved plan"
        )
        self.expect(self.rules.sent(sold) == option.bytes_per_s, "traffic", row.job_id, "not the predicted traffic")
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

    def _eligible(self, job: JobState, row: Placement) -> None:
        if row.action == "keep":
            same = job.incumbent is not None and job.incumbent.configuration == row.configuration
            self.expect(
                same and job.job_id in self.rules.kept, "kept", job.job_id, "kept something that it did not have"
            )
            return
        parts = row.configuration.parts
        sites = [part.site_id for part in parts]
        types = {part.gpu_type for part in parts}
        self.expect(
            all(part.pool_id in self.rules.pools for part in parts), "pool", job.job_id, "names an unknown pool"
        )
        self.expect(len(types) == 1, "gpu_type", job.job_id, "mixes GPU types")
        own = job.incumbent is not None and job.incumbent.configuration.key == row.configuration.key
        gpus = sum(part.gpus for part in parts)
        asked = any(r.gpu_type in types and r.count_min <= gpus <= r.count_max for r in job.accelerators)
        self.expect(asked or own, "request", job.job_id, f"{gpus} {'/'.join(sorted(types))} were not asked for")
        self.expect(
            len(sites) <= job.sites_max or own, "span", job.job_id, f"spans {len(sites)} sites, may {job.sites_max}"
        )
        allowed = job.sites_allowed is None or set(sites) <= set(job.sites_allowed)
        self.expect(allowed, "residency", job.job_id, "leaves the sites that it may use")
        self.expect(row.configuration.key not in job.barred, "barred", job.job_id, "was declined by a site")
        self.expect(
            len(sites) == 1 or self.rules.hub_exists(sites), "hub", job.job_id, "has no hub that all sites reach"
        )

    def capacity(self) -> None:
        """Check that no pool and no link is sold twice."""
        gpus = dict.fromkeys(self.rules.pools, 0)
        shares = dict.fromkeys(self.rules.links, 0)
        for option in self.chosen.values():
            for pool_id, count in option.gpus.items():
                gpus[pool_id] += count
            for pair, count in option.shares.items():
                shares[pair] += count
        for pool_id, count in gpus.items():
            most = self.rules.pools[pool_id].capacity_gpus
            self.expect(count <= most, "oversold_pool", pool_id, f"{count} GPUs sold of {most}")
        for pair, most in self.rules.link_capacity().items():
            self.expect(
                shares[pair] <= most, "oversold_link", f"{pair[0]}>{pair[1]}", f"{shares[pair]} shares sold of {most}"
            )

    def money(self) -> None:
        """Check that buyers pay up to their value, sites get their ask, and equity covers uplift."""
        drawn = 0
        for row in self.clearing.placements:
            option, job = self.chosen[row.job_id], self.rules.jobs[row.job_id]
            self._rows(row, job, option)
            if row.action == "keep":
                continue
            charge, uplift = row.charge_micros_per_hour, row.uplift_micros_per_hour
            drawn += math.ceil(Fraction(uplift * row.term_s, 3600))
            self.expect(
                0 <= charge <= max(0, option.charge_max),
                "above_bid",
                row.job_id,
                f"pays {charge}, may pay {option.charge_max}",
            )
            self.expect(
                uplift == max(0, charge + uplift - max(0, option.charge_max)),
                "uplift",
                row.job_id,
                f"uplift of {uplift} is not what it lacks",
            )
            egress = sum(
                math.ceil(Fraction(size * row.term_s * self.rules.links[pair].egress_price_micros_per_gb, 10**9))
                for pair, size in option.bytes_per_s.items()
            )
            reserved = math.ceil(Fraction(charge * row.term_s, 3600)) + egress
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
            paid, ask = charge.payout_micros_per_gpu_hour, self.rules.pools[charge.pool_id].ask_micros_per_gpu_hour
            self.expect(paid <= price, "payout", row.job_id, f"{charge.pool_id} is paid more than the price")
            self.expect(
                row.action == "keep" or paid >= ask, "payout", row.job_id, f"{charge.pool_id} is paid less than its ask"
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

    def surplus(self, option: Option) -> int:
        """Return what an option leaves its job at the published prices."""
        gpus = sum(self.clearing.prices[pool_id] * count for pool_id, count in option.gpus.items())
        rent = sum(self.link_prices.get(pair, 0) * count for pair, count in option.shares.items())
        return option.value - option.egress - gpus - rent

    def certificate(self) -> None:
        """Compute the certificate's figures again; the bound by trying every configuration."""
        stated = self.clearing.certificate
        welfare = sum(self.rules.worth(option) for option in self.chosen.values())
        regret = sum(
            max([self.surplus(option) for option in options] + ([] if job_id in self.rules.kept else [0]))
            - (self.surplus(self.chosen[job_id]) if job_id in self.chosen else 0)
            for job_id, options in self.options.items()
        )
        rent, slack = self._rent_and_slack()
        best = regret + sum(self.surplus(option) for option in self.chosen.values())
        bound = best + rent
        for name, ours, theirs in (
            ("welfare", welfare, stated.welfare_micros_per_hour),
            ("bound", bound, stated.bound_micros_per_hour),
            ("regret", regret, stated.regret_sum_micros_per_hour),
            ("slack", slack, stated.slack_sum_micros_per_hour),
            ("gap", bound - welfare, stated.gap_micros_per_hour),
            (
                "uplift",
                sum(row.uplift_micros_per_hour for row in self.clearing.placements),
                stated.uplift_micros_per_hour,
            ),
        ):
            self.expect(ours == theirs, f"certificate_{name}", "certificate", f"{name} is {ours}, stated {theirs}")
        self.expect(
            bound - welfare == regret + slack, "identity", "certificate", "bound - welfare is not regret + slack"
        )
        off = abs(bound - stated.lp_objective_micros_per_hour)
        # Prices are whole micro-credits: each unit of priced capacity may move the bound by one.
        priced = sum(pool.capacity_gpus for pool in self.rules.pools.values()) + len(self.rules.jobs)
        priced += sum(most for pair, most in self.rules.link_capacity().items() if self.link_prices.get(pair))
        self.expect(off <= LP_GAP_MAX * abs(bound) + priced, "lp_gap", "certificate", f"bound and LP are {off} apart")
        self.expect(all(stated.checks.values()), "checks", "certificate", "the solver's own checks failed")

    def _rent_and_slack(self) -> tuple[int, int]:
        rent = slack = 0
        used: dict[str | Pair, int] = {}
        for option in self.chosen.values():
            for pool_id, count in option.gpus.items():
                used[pool_id] = used.get(pool_id, 0) + count
            for pair, count in option.shares.items():
                used[pair] = used.get(pair, 0) + count
        by_site: dict[str, int] = {}
        for pool_id, pool in self.rules.pools.items():
            margin = self.clearing.prices[pool_id] - pool.ask_micros_per_gpu_hour
            rent += margin * pool.capacity_gpus
            slack += margin * (pool.capacity_gpus - used.get(pool_id, 0))
            by_site[pool.site_id] = by_site.get(pool.site_id, 0) + margin * pool.capacity_gpus
        for pair, most in self.rules.link_capacity().items():
            price = self.link_prices.get(pair, 0)
            rent += price * most
            slack += price * (most - used.get(pair, 0))
            by_site[pair[0]] = by_site.get(pair[0], 0) + price * most
        stated = {row.site_id: row.rent_micros_per_hour for row in self.clearing.transfers}
        self.expect(
            stated == by_site, "transfers", "clearing", "the sites' transfers are not the rent of their capacity"
        )
        return rent, slack
