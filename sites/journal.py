"""What a site must not forget: epochs, confirmations, attempts and unacknowledged usage.

One SQLite file (WAL, synchronous=FULL), written by the one agent of the folder. Whatever the
agent tells the broker or starts is written here first, so an agent killed at any instruction finds
it again: a confirmed lease keeps its key, a started attempt is adopted instead of started twice, a
usage row is sent with the same number until it is acknowledged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sites.errors import JournalError
from sites.protocol import (
    OUTPUT_NAME_LENGTH_MAX,
    AttemptOrder,
    AttemptPhase,
    Confirmation,
    ExitCause,
    LeaseOrder,
    Usage,
    Veto,
)
from training.attempt import NewestCheckpoint
from training.roundlog.view import ViewReport

SCHEMA_VERSION: Final = 1
USAGE_ROWS_MAX: Final = 10_000

_SCHEMA: Final = """
CREATE TABLE fence (job_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL);
CREATE TABLE reply (lease_id TEXT, epoch INTEGER, job_id TEXT NOT NULL, kind TEXT NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (lease_id, epoch));
CREATE TABLE attempt (lease_id TEXT, epoch INTEGER, document TEXT NOT NULL, PRIMARY KEY (lease_id, epoch));
CREATE TABLE usage (lease_id TEXT, epoch INTEGER, sequence INTEGER, document TEXT NOT NULL,
    PRIMARY KEY (lease_id, epoch, sequence));
"""

AttemptKey = tuple[str, int]


class Delivered(BaseModel):
    """What an attempt has delivered in all, as far as it is in usage rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu_milliseconds: int = 0
    samples: int = 0
    egress_bytes: dict[str, int] = Field(default_factory=dict)


class AttemptRecord(BaseModel):
    """One attempt as the site remembers it.

    `order` is None for a lease that never ran here. `stop` is why the agent asked for its end.
    `released` says that the broker no longer wants the lease, so the gateway may end too.
    `deadline_s` is the liveness on the monotonic clock of `era`. `gateway_run` numbers the
    gateway's restarts, `ranks_run` those of the ranks, and `gpu_milliseconds_before` is what former runs of
    them delivered. `stream_bytes` is what the broker holds of each stream.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lease_id: str
    epoch: int
    job_id: str
    tenant_id: str
    gpu_type: str
    gpu_ids: tuple[str, ...]
    order: AttemptOrder | None
    phase: AttemptPhase = AttemptPhase.PREPARING
    cause: ExitCause | None = None
    exit_code: int | None = None
    detail: str = ""
    stop: ExitCause | None = None
    released: bool = False
    deadline_s: float = 0.0
    began_ms: int = 0
    era: str = ""
    gateway_run: int = 1
    ranks_run: int = 1
    gpu_milliseconds_before: int = 0
    promise: ViewReport | None = None
    checkpoint: NewestCheckpoint | None = None
    outputs: dict[str, str] = Field(default_factory=dict)
    stream_bytes: dict[str, int] = Field(default_factory=dict)
    delivered: Delivered = Delivered()
    usage_sequence: int = 0

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Read what an older agent kept: a field that nobody needs, and output names beyond today's bound."""
        outputs = document.get("outputs", {})
        known = {name: value for name, value in document.items() if name != "view_number"}
        return {**known, "outputs": {name: outputs[name] for name in outputs if len(name) <= OUTPUT_NAME_LENGTH_MAX}}

    @property
    def key(self) -> AttemptKey:
        """The lease and the epoch, which name the attempt."""
        return self.lease_id, self.epoch

    @property
    def is_over(self) -> bool:
        """Whether its ranks are dead for good."""
        return self.phase is AttemptPhase.EXITED


def record_of(order: LeaseOrder) -> AttemptRecord:
    """Return the record of an attempt that is about to begin."""
    return AttemptRecord(
        lease_id=order.lease_id,
        epoch=order.epoch,
        job_id=order.job_id,
        tenant_id=order.tenant_id,
        gpu_type=order.gpu_type,
        gpu_ids=order.gpu_ids,
        order=order.attempt,
    )


class Journal:
    """The journal of one site."""

    def __init__(self, path: Path) -> None:
        """Open the journal at `path`, or begin one. Raises JournalError for a newer one."""
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            raise JournalError(
                f"{path} is no journal ({error}); move it away after looking at what still runs"
            ) from None
        if version == 0:
            self._database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        elif version > SCHEMA_VERSION:
            raise JournalError(f"{path} was written by a newer hansa; bring this host's installation up to date")
        path.chmod(0o600)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def fence(self, job_id: str, epoch: int) -> None:
        """Remember that `epoch` of a job was seen: no older one starts here again."""
        self._database.execute(
            "INSERT INTO fence VALUES (?, ?) ON CONFLICT (job_id) DO UPDATE SET epoch = max(epoch, excluded.epoch)",
            (job_id, epoch),
        )

    def epochs(self) -> dict[str, int]:
        """Return the highest epoch seen of each job."""
        return dict(self._database.execute("SELECT job_id, epoch FROM fence"))

    def reply(self, job_id: str, reply: Confirmation | Veto) -> None:
        """Remember the answer to a proposal; it is repeated until the proposal is gone."""
        kind = "confirmation" if isinstance(reply, Confirmation) else "veto"
        row = (reply.lease_id, reply.epoch, job_id, kind, reply.model_dump_json())
        self._database.execute("INSERT OR REPLACE INTO reply VALUES (?, ?, ?, ?, ?)", row)

    def confirmations(self) -> dict[AttemptKey, Confirmation]:
        """Return the confirmations of leases that are not over."""
        rows = self._replies("confirmation")
        return {(lease, epoch): Confirmation.model_validate_json(document) for lease, epoch, document in rows}

    def vetoes(self) -> dict[AttemptKey, Veto]:
        """Return the vetoes of proposals that are not over."""
        return {(lease, epoch): Veto.model_validate_json(document) for lease, epoch, document in self._replies("veto")}

    def forget_reply(self, key: AttemptKey) -> None:
        """Forget the answer to a proposal that is gone."""
        self._database.execute("DELETE FROM reply WHERE lease_id = ? AND epoch = ?", key)

    def save(self, record: AttemptRecord) -> None:
        """Remember an attempt as it stands."""
        row = (*record.key, record.model_dump_json())
        self._database.execute("INSERT OR REPLACE INTO attempt VALUES (?, ?, ?)", row)

    def attempts(self) -> list[AttemptRecord]:
        """Return all attempts that are not forgotten."""
        rows = self._database.execute("SELECT document FROM attempt ORDER BY lease_id, epoch")
        return [AttemptRecord.model_validate_json(document) for (document,) in rows]

    def forget(self, key: AttemptKey) -> None:
        """Forget an attempt; its unacknowledged usage stays."""
        self._database.execute("DELETE FROM attempt WHERE lease_id = ? AND epoch = ?", key)

    def cut(self, record: AttemptRecord, usage: Usage) -> None:
        """Remember a usage row together with the attempt that it was cut from, or neither."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO usage VALUES (?, ?, ?, ?)",
                (usage.lease_id, usage.epoch, usage.sequence, usage.model_dump_json()),
            )
            self.save(record)

    def usage(self) -> list[Usage]:
        """Return the rows that were not acknowledged, in the order of their numbers."""
        rows = self._database.execute(
            "SELECT document FROM usage ORDER BY lease_id, epoch, sequence LIMIT ?", (USAGE_ROWS_MAX,)
        )
        return [Usage.model_validate_json(document) for (document,) in rows]

    def acknowledge(self, lease_id: str, sequence: int) -> None:
        """Forget the rows of a lease up to `sequence`."""
        self._database.execute("DELETE FROM usage WHERE lease_id = ? AND sequence <= ?", (lease_id, sequence))

    def drop_usage(self, lease_id: str) -> int | None:
        """Forget all rows of a lease whose usage the broker will never take; return the lowest number dropped."""
        with self._transaction():
            (lowest,) = self._database.execute(
                "SELECT min(sequence) FROM usage WHERE lease_id = ?", (lease_id,)
            ).fetchone()
            self._database.execute("DELETE FROM usage WHERE lease_id = ?", (lease_id,))
        return None if lowest is None else int(lowest)

    def _replies(self, kind: str) -> list[tuple[str, int, str]]:
        return self._database.execute(
            "SELECT lease_id, epoch, document FROM reply WHERE kind = ? ORDER BY lease_id, epoch", (kind,)
        ).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")
