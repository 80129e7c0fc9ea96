"""What the demo says at the end: per job, per site, the books; and whether all of it is as it must be.

Every figure is read from the API after the last hold was closed. What plain data-parallel training would have sent
is computed, not measured: each step every site would exchange its fp32 gradients with the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from broker.cli.client import BrokerClient
from broker.cli.output import bytes_text, credits_text
from broker.demo import world
from broker.demo.observation import HELD_OUT, Observation, SeenJob, where
from pricing.money import MILLISECONDS_PER_HOUR

BYTES_PER_FP32: Final = 4
SITE_ACCOUNT: Final = "site/"


@dataclass(frozen=True, slots=True)
class JobResult:
    """One row of the final table."""

    name: str
    tenant_id: str
    state: str
    where: str
    price_micros_per_slot_hour: int
    loss_first: float | None
    loss_last: float | None
    samples_per_s_measured: float | None
    samples_per_s_predicted: float | None
    bytes_between_sites: int
    bytes_plain: int
    charge_micros: int
    amends_micros: int


@dataclass(frozen=True, slots=True)
class Report:
    """The demo's result."""

    jobs: tuple[JobResult, ...]
    payouts_micros: dict[str, int]
    ledger_sum_micros: int
    transfers: int
    sound: bool
    findings: tuple[str, ...]
    replayed_round: int
    replay_identical: bool

    def failures(self) -> list[str]:
        """Return what is not as a good run must end; nothing, where all is well."""
        found = [f"{job.name} has {job.state}" for job in self.jobs if job.state != "finished"]
        found += [
            f"{job.name} has learned nothing" for job in self.jobs if job.state == "finished" and not _learned(job)
        ]
        if not any(job.bytes_between_sites for job in self.jobs):
            found.append("no job has sent a byte between sites")
        if self.ledger_sum_micros:
            found.append(f"the ledger's sum is {self.ledger_sum_micros} micro-credits")
        charged = sum(job.charge_micros for job in self.jobs)
        paid = sum(self.payouts_micros.values())
        if not charged or not paid:
            found.append(f"{charged} micro-credits were charged and {paid} paid out")
        found += self.findings
        if not self.replay_identical:
            found.append(f"round {self.replayed_round} does not replay to the same bits")
        return found


def make_report(admin: BrokerClient, observation: Observation) -> Report:
    """Read the final figures."""
    ledger = admin.admin_get("/ledger", limit=200)
    audit = admin.admin_get("/audit")
    first_round = min(job.detail["placement"]["round_number"] for job in observation.jobs if job.detail["placement"])
    replay = admin.admin_get(f"/rounds/{first_round}/replay")
    balances: dict[str, int] = ledger["balances_micros"]
    return Report(
        jobs=tuple(_result(job) for job in observation.jobs),
        payouts_micros={site.site_id: balances.get(f"{SITE_ACCOUNT}{site.site_id}", 0) for site in world.SITES},
        ledger_sum_micros=ledger["sum_micros"],
        transfers=len(ledger["transfers"]),
        sound=audit["sound"],
        findings=tuple(f"invariant {row['invariant']}: {row['subject']}: {row['detail']}" for row in audit["findings"]),
        replayed_round=first_round,
        replay_identical=replay["identical"] and not replay["findings"],
    )


def print_report(console: Console, report: Report) -> None:
    """Print the final table."""
    table = Table(title="What was trained, and what it cost", title_justify="left", box=None, pad_edge=False)
    for name in ("job", "tenant", "state", "placed on"):
        table.add_column(name, no_wrap=True)
    for name in ("paid /slot-h", "held-out loss", "samples/s", "between sites", "plain DDP fp32", "charge"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in report.jobs:
        table.add_row(
            job.name,
            job.tenant_id,
            job.state,
            job.where or "-",
            credits_text(job.price_micros_per_slot_hour, 3),
            _loss_text(job),
            _speed_text(job),
            bytes_text(job.bytes_between_sites) if job.bytes_plain else "one site",
            bytes_text(job.bytes_plain) if job.bytes_plain else "-",
            _charge_text(job),
        )
    console.print(Text())
    console.print(table)
    console.print(Text())
    for site in world.SITES:
        console.print(Text(f"site {site.site_id} was paid {credits_text(report.payouts_micros[site.site_id])} credits"))
    charged = sum(job.charge_micros for job in report.jobs)
    amends = sum(job.amends_micros for job in report.jobs)
    console.print(
        Text(
            f"charged {credits_text(charged)}{f', refunded {credits_text(amends)}' if amends else ''}, "
            f"paid out {credits_text(sum(report.payouts_micros.values()))} credits; "
            f"the ledger's sum is {report.ledger_sum_micros}"
        )
    )
    console.print(
        Text(
            f"audit: {'clean' if report.sound else f'{len(report.findings)} findings'}; round {report.replayed_round} "
            f"{'replays to the same bits' if report.replay_identical else 'DOES NOT REPLAY'}"
        )
    )
    console.print(Text("CPU slots stood in for GPUs; links, asks and bids are made up, everything else is real."))


def plain_ddp_bytes(spec: dict[str, Any], sites: int, slots: int, samples_done: int) -> int:
    """Return what synchronous data parallelism in fp32 would have sent between `sites`.

    Each step is an all-reduce of the gradients: with sites as its members, 2 (n - 1) times their size in all.
    """
    workload = spec["market"]["workload"]
    steps = samples_done // (workload["batch_per_gpu"] * slots)
    gradient_bytes = BYTES_PER_FP32 * workload["parameters"]
    return int(steps * 2 * (sites - 1) * gradient_bytes)


def _result(job: SeenJob) -> JobResult:
    placement = job.detail["placement"]
    pools = placement["pools"] if placement else []
    slots = sum(row["gpus"] for row in pools)
    lines = job.invoice["lines"]
    slot_milliseconds = sum(line["gpu_milliseconds"] for line in lines)
    # What was paid, and not the last price: a term that ends is renewed at that round's price.
    paid_micros = sum(line["gpu_micros"] for line in lines)
    return JobResult(
        name=job.submitted.plan.name,
        tenant_id=job.submitted.plan.tenant_id,
        state=job.detail["state"],
        where=where(placement) if placement else "",
        price_micros_per_slot_hour=paid_micros * MILLISECONDS_PER_HOUR // max(1, slot_milliseconds),
        loss_first=job.measured.first.get(HELD_OUT),
        loss_last=job.measured.last.get(HELD_OUT),
        samples_per_s_measured=job.measured.samples_per_s,
        samples_per_s_predicted=placement["samples_per_s_predicted"] if placement else None,
        bytes_between_sites=sum(lease["egress_bytes"] for lease in placement["leases"]) if placement else 0,
        bytes_plain=plain_ddp_bytes(job.submitted.spec, len(pools), slots, job.detail["samples_done"]) if slots else 0,
        charge_micros=job.invoice["posted_micros"],
        amends_micros=sum(row["amount_micros"] for row in job.invoice["amends"]),
    )


def _learned(job: JobResult) -> bool:
    return job.loss_first is not None and job.loss_last is not None and job.loss_last < job.loss_first


def _loss_text(job: JobResult) -> str:
    if job.loss_first is None or job.loss_last is None:
        return "-"
    return f"{job.loss_first:.3f} → {job.loss_last:.3f}"


def _charge_text(job: JobResult) -> str:
    if not job.amends_micros:
        return credits_text(job.charge_micros)
    return f"{credits_text(job.charge_micros)} (refunded {credits_text(job.amends_micros)})"


def _speed_text(job: JobResult) -> str:
    if job.samples_per_s_measured is None or job.samples_per_s_predicted is None:
        return "-"
    return f"{job.samples_per_s_measured:.0f} ({job.samples_per_s_predicted:.0f} predicted)"
