"""What a market of real processes has written down: its rows, and the chains that gateways keep as files.

Read from the database itself, because the API is one of the processes that are killed.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.engine import Database
from broker.database.tables import (
    Event,
    Job,
    JobArtifact,
    Lease,
    Placement,
    Site,
    ViewChange,
)
from sites.protocol import AttemptReport, GatewayReport
from training.roundlog.signing import SignedDocument
from training.roundlog.view import View

T = TypeVar("T")


@dataclass
class Chain:
    """The sealed rounds of a job as its sites kept them, read from their gateways' folders while these stood."""

    rounds: dict[int, dict[str, bytes]] = field(default_factory=dict)

    epoch_min: int = 1

    def look(self, home: Path, job_id: str) -> None:
        """Read what is there now and was not seen before."""
        for path in home.glob("sites/*/attempts/*/gateway/state/manifests/*.json"):
            _, site_id, _, attempt, *_ = path.relative_to(home).parts
            number, epoch = int(path.stem), int(attempt.rpartition("-")[2])
            if epoch < self.epoch_min:
                continue
            with contextlib.suppress(OSError):
                if site_id in self.rounds.get(number, {}):
                    continue
                content = content_of(SignedDocument.model_validate_json(path.read_bytes()))
                if json.loads(content)["job_id"] == job_id:
                    self.rounds.setdefault(number, {})[site_id] = content

    def resume_after(self, number: int, epoch: int) -> None:
        """Forget the rounds after `number`, lost with every site that held them; `epoch` seals them anew."""
        self.epoch_min = epoch
        self.rounds = {each: sites for each, sites in self.rounds.items() if each <= number}


class MarketRows:
    """The rows of one market, by what tests ask for."""

    def __init__(self, home: Path, url: str) -> None:
        """Read the database at `url`, which need not be there yet; the market's logs are below `home`."""
        self.home = home
        self.database = Database(url)

    def read(self, work: Callable[[Session], T]) -> T:
        """Read the market's rows."""
        return self.database.read(work)

    def job(self, job_id: str) -> Job:
        """Return a job's row."""
        return self.read(lambda session: session.get_one(Job, job_id))

    def leases(self, job_id: str) -> list[Lease]:
        """Return all leases that a job ever had."""
        return self.read(
            lambda session: list(
                session.scalars(select(Lease).where(Lease.job_id == job_id).order_by(Lease.epoch, Lease.site_id))
            )
        )

    def views(self, job_id: str) -> list[ViewChange]:
        """Return all views of a job by number."""
        return self.read(
            lambda session: list(
                session.scalars(select(ViewChange).where(ViewChange.job_id == job_id).order_by(ViewChange.number))
            )
        )

    def issued(self, job_id: str) -> list[View]:
        """Return the issued views of a job by number."""
        return [
            View.model_validate_json(content_of(SignedDocument.model_validate_json(change.document)))
            for change in self.views(job_id)
            if change.state == "issued"
        ]

    def heard_ms(self, site_id: str) -> int:
        """Return when the market last heard a site."""
        return self.read(lambda session: session.get_one(Site, site_id).heard_ms) or 0

    def placements(self, job_id: str) -> list[Placement]:
        """Return all placements that a job ever had."""
        return self.read(
            lambda session: list(
                session.scalars(select(Placement).where(Placement.job_id == job_id).order_by(Placement.epoch))
            )
        )

    def gateways(self, job_id: str) -> dict[str, GatewayReport]:
        """Return what the gateways of the job's newest placement last said, by site."""
        leases = self.leases(job_id)
        reports = {
            lease.site_id: AttemptReport.model_validate_json(lease.attempt).gateway
            for lease in leases
            if lease.attempt and lease.placement_id == leases[-1].placement_id and lease.state != "ended"
        }
        return {site_id: report for site_id, report in reports.items() if report is not None}

    def rounds_sealed(self, job_id: str) -> int:
        """Return the highest round that a site reported sealed."""
        return max((report.sealed_round for report in self.gateways(job_id).values()), default=0)

    def story(self, job_id: str) -> str:
        """Return the events of a job, for a person who looks at a failure."""
        rows = self.read(
            lambda session: list(session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.event_id)))
        )
        lines = [
            " ".join(str(getattr(row, name)) for name in ("created_ms", "kind", "before", "after", "detail"))
            for row in rows
        ]
        return "\n".join([f"{job_id} is {self.job(job_id).state}; logs in {self.home}", *lines])

    def checkpoints(self, job_id: str) -> list[JobArtifact]:
        """Return the checkpoints of the newest round."""
        rows = self.read(
            lambda session: list(
                session.scalars(
                    select(JobArtifact).where(JobArtifact.job_id == job_id, JobArtifact.kind == "checkpoint")
                )
            )
        )
        highest = max((row.round_number for row in rows), default=0)
        return [row for row in rows if row.round_number == highest]


def content_of(document: SignedDocument) -> bytes:
    """Return what was signed; whoever kept it has checked the signature."""
    return base64.b64decode(document.payload)
