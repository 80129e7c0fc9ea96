"""What the demo knows of its jobs: read from the public API, a little more with each look.

Reading is level-triggered like everything else: a look that fails because the API was busy is made up by the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from broker.cli.client import BrokerClient
from broker.cli.errors import UnreachableError
from broker.cli.following import FINAL_STATES, Measurements
from broker.demo import world
from broker.demo.board import Board, JobRow, PoolRow

if TYPE_CHECKING:
    from broker.demo.journey import SubmittedJob

HELD_OUT: Final = "held_out_loss"
LIVE_LEASES: Final = frozenset({"proposed", "confirmed", "active"})


@dataclass(slots=True)
class SeenJob:
    """Everything that was seen of one job."""

    submitted: SubmittedJob
    measured: Measurements = field(default_factory=Measurements)
    detail: dict[str, Any] = field(default_factory=dict)
    invoice: dict[str, Any] = field(default_factory=dict)

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self.detail.get("state") in FINAL_STATES

    @property
    def is_settled(self) -> bool:
        """Whether its books are closed too."""
        return bool(self.invoice.get("final"))


class Observation:
    """The demo's market as it was last seen."""

    def __init__(
        self, admin: BrokerClient, tenants: Mapping[str, BrokerClient], submitted: tuple[SubmittedJob, ...]
    ) -> None:
        """Watch `submitted` with the clients of their tenants."""
        self._admin = admin
        self._tenants = tenants
        self.jobs = tuple(SeenJob(job) for job in submitted)
        self.board = Board()

    def look(self) -> None:
        """Read what there is now; where the API is too busy to answer, keep what was seen before."""
        try:
            for job in self.jobs:
                if not job.is_settled:
                    self._look_at(job)
            self.board = self._drawn()
        except UnreachableError:
            return

    @property
    def settled(self) -> bool:
        """Whether all jobs have ended and all holds are closed."""
        return all(job.is_final and job.is_settled for job in self.jobs)

    @property
    def headline(self) -> str:
        """What goes on, in one line."""
        states = [job.detail.get("state", "queued") for job in self.jobs]
        if all(state in FINAL_STATES for state in states):
            return "all jobs have ended; the ledger settles what was delivered"
        if "running" not in states:
            return "the round clears, sites confirm their leases, attempts start"
        running = [job.submitted.plan.name for job in self.jobs if job.detail.get("state") == "running"]
        waiting = [job.submitted.plan.name for job in self.jobs if job.detail.get("state") in ("queued", "proposed")]
        return f"training: {', '.join(running)}" + (f"; waiting: {', '.join(waiting)}" if waiting else "")

    def _look_at(self, job: SeenJob) -> None:
        client = self._tenants[job.submitted.plan.tenant_id]
        job.detail = client.job(job.submitted.job_id)
        job.measured.read(client, job.submitted.job_id)
        if job.is_final:
            job.invoice = client.invoice(job.submitted.job_id)

    def _drawn(self) -> Board:
        prices = self._admin.prices()
        rounds = self._admin.rounds(1)
        newest = rounds[0] if rounds else None
        return Board(
            round_number=prices["round_number"],
            solve_ms=None if newest is None else newest["solve_s"] * 1000,
            gap_micros_per_hour=None if newest is None else newest["gap_micros_per_hour"],
            pools=tuple(self._pool_row(row) for row in prices["items"]) if newest else (),
            jobs=tuple(_job_row(job) for job in self.jobs if job.detail),
        )

    def _pool_row(self, row: dict[str, Any]) -> PoolRow:
        leased = sum(
            lease["gpus"]
            for job in self.jobs
            for lease in (job.detail.get("placement") or {"leases": []})["leases"]
            if lease["site_id"] == row["site_id"] and lease["state"] in LIVE_LEASES
        )
        capacity = next(site.slots for site in world.SITES if site.site_id == row["site_id"])
        return PoolRow(
            row["pool_id"], capacity, leased, row["ask_micros_per_gpu_hour"], row["price_micros_per_gpu_hour"]
        )


def _job_row(job: SeenJob) -> JobRow:
    detail = job.detail
    placement = detail["placement"]
    spanning = placement is not None and len(placement["pools"]) > 1
    return JobRow(
        name=job.submitted.plan.name,
        state=detail["state"],
        where="" if placement is None else where(placement),
        why=detail["reason"] if placement is None or detail["state"] == "queued" else placement["why"],
        samples_done=detail["samples_done"],
        samples=detail["samples"],
        loss_first=job.measured.first.get(HELD_OUT),
        loss_last=job.measured.last.get(HELD_OUT),
        sealed_round=job.measured.round_last if spanning else None,
        samples_per_s_predicted=None if placement is None else placement["samples_per_s_predicted"],
        samples_per_s_measured=job.measured.samples_per_s,
        charged_micros=detail["cost_micros"],
    )


def where(placement: dict[str, Any]) -> str:
    """Return the sites of a placement with their slots."""
    return " + ".join(f"{row['site_id']} {row['gpus']}" for row in placement["pools"])
