"""What the demo shows at one moment, as plain values: `journey` fills it from the API, `display` draws it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolRow:
    """A pool in the last round. `leased` counts the slots that placements hold."""

    pool_id: str
    capacity: int
    leased: int
    ask_micros: int
    price_micros: int | None


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as it stands now."""

    name: str
    state: str
    where: str
    why: str
    samples_done: int
    samples: int
    loss_first: float | None = None
    loss_last: float | None = None
    sealed_round: int | None = None
    samples_per_s_predicted: float | None = None
    samples_per_s_measured: float | None = None
    charged_micros: int = 0


@dataclass(frozen=True, slots=True)
class Board:
    """Everything between the stage line above and the final report below."""

    round_number: int | None = None
    solve_ms: float | None = None
    gap_micros_per_hour: int | None = None
    pools: tuple[PoolRow, ...] = ()
    jobs: tuple[JobRow, ...] = ()
