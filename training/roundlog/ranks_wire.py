"""What ranks and their gateway say to each other over ranks.sock, and the limits on it.

GET  /position?wait_s=                            Position, 204 before the first view
PUT  /rounds/R/fragments/F                        bytes -> 204
POST /rounds/R/commit                             CommitRequest -> 204
GET  /rounds/R/sealed?wait_s=                     SealedRound, 204 while it is open
GET  /rounds/R/sites/S/fragments/F                bytes
POST /rounds/R/applied                            AppliedRequest -> 204
PUT  /rounds/R/snapshot                           safetensors -> 204
GET  /snapshot?wait_s=                            safetensors, round in Hansa-Round; 204 before there is one
POST /report                                      measurements -> 204
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter

from training.exchange import Position, SampleRange, SealedRound
from training.roundlog.view import Hash

FRAGMENTS_MAX: Final = 1024
RANGES_MAX: Final = 1024
MEASUREMENTS_MAX: Final = 200
ROUND_HEADER: Final = "Hansa-Round"
# One long poll; shorter than any proxy's or client's idle limit.
POLL_WAIT_S_MAX: Final = 20.0

position_json: Final = TypeAdapter(Position)
sealed_round_json: Final = TypeAdapter(SealedRound)


class CommitRequest(BaseModel):
    """The site's contribution to a round is complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: int = Field(ge=0)
    samples: tuple[SampleRange, ...] = Field(max_length=RANGES_MAX)
    fragments: int = Field(ge=1, le=FRAGMENTS_MAX)
    outer_hash: Hash


class AppliedRequest(BaseModel):
    """The site has applied a round and holds the outer state with this hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outer_hash: Hash


class Measurements(BaseModel):
    """One row of measurements."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    values: dict[str, FiniteFloat | None] = Field(max_length=MEASUREMENTS_MAX)
