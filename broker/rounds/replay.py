"""Replay: solve a stored snapshot again and compare, to the bit where the solver is the same."""

from __future__ import annotations

from dataclasses import dataclass

from broker.allocation.clearing import Clearing
from broker.allocation.engines import engine_of
from broker.allocation.snapshot import Snapshot
from broker.allocation.solve import clear
from broker.allocation.verify import verify
from broker.database.tables import Round
from broker.errors import NotFoundError
from broker.market import Market


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay found. `findings` of the independent verifier are empty for a sound round."""

    round_number: int
    identical: bool
    solver_recorded: str
    solver_now: str
    findings: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """Return the fields as plain JSON values."""
        return {
            "round_number": self.round_number,
            "identical": self.identical,
            "solver_recorded": self.solver_recorded,
            "solver_now": self.solver_now,
            "findings": list(self.findings),
        }


def replay(market: Market, round_number: int) -> Replay:
    """Solve the snapshot of a committed round again and verify what was committed.

    Raises NotFoundError where the round does not exist or its snapshot is past its retention.
    """
    row = market.database.read(lambda session: session.get(Round, round_number))
    if row is None:
        message = f"there is no round {round_number}"
        raise NotFoundError(message)
    snapshot = Snapshot.from_json(market.artifacts.get_bytes(row.snapshot_digest))
    recorded = Clearing.from_json(market.artifacts.get_bytes(row.clearing_digest))
    # By the engine that it was solved with: the market may have changed to another since.
    again = clear(snapshot, engine=engine_of(row.solver, otherwise=market.settings.lp_engine))
    return Replay(
        round_number=round_number,
        identical=again.digest() == row.clearing_digest,
        solver_recorded=row.solver,
        solver_now=again.solver,
        findings=tuple(str(finding) for finding in verify(snapshot, recorded)),
    )
