"""What the runtime asks of the round log: the seam between the ranks of a site and its gateway.

A sync round, as the ranks of one site see it:

1. each rank owns some fragments; it posts its fragment's compressed bytes with `post_fragment`;
2. when all fragments are posted, rank 0 calls `commit`: the gateway builds the contribution
   (header, fragments in order), signs it with the attempt key and sends it to the hub;
3. every rank calls `await_sealed`, and for its own fragments `fetch_fragment` of each entry;
4. the ranks merge and apply; rank 0 calls `applied` with the hash of the outer state.

`training.roundlog.client.GatewayClient` implements this over the gateway's Unix socket. Every
call blocks; none retries for longer than the job's patience.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

# Who stops after the round that says so: its author alone, or all sites once most of them say it.
Leaving = Literal["site", "gang"]


@dataclass(frozen=True, slots=True, order=True)
class SampleRange:
    """Samples `start` to `stop` - 1 of the job's numbering."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        """Check the order of the ends."""
        assert 0 <= self.start < self.stop, f"not a range: {self.start}..{self.stop}"


@dataclass(frozen=True, slots=True)
class MemberSeat:
    """A site in the current view, and how many GPUs it trains with."""

    site_id: str
    epoch: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One site's contribution in a sealed round. `weight` is in samples, capped by the lease.

    `leaving` is set where its author was asked to stop: after this very round, which all sites know alike.
    """

    site_id: str
    weight: int
    samples: tuple[SampleRange, ...]
    fragments: tuple[int, ...]
    leaving: Leaving | None = None


@dataclass(frozen=True, slots=True)
class SealedRound:
    """A round that the hub has sealed, as verified by this site's gateway.

    `entries` stand in site order, the order of the merge. `members` are those of the view in
    force when the answer was given: the next round's samples are dealt to them.
    """

    number: int
    view_number: int
    manifest_hash: str
    entries: tuple[Entry, ...]
    members: tuple[MemberSeat, ...]


@dataclass(frozen=True, slots=True)
class Position:
    """Where this site stands in the log when its ranks start.

    `base_round` is the last round already in the outer state that the ranks must start from: 0
    at the very beginning, the checkpoint's round after a resume. `done` is every sample range
    sealed so far. With `needs_snapshot` the state must come from `fetch_snapshot` first.
    """

    base_round: int
    base_hash: str
    members: tuple[MemberSeat, ...]
    done: tuple[SampleRange, ...]
    needs_snapshot: bool


def leaves_after(sealed: SealedRound, site_id: str) -> bool:
    """Say whether `site_id` stops after a round: it said so itself, or most sites said that all stop.

    Most, so that no single site can end the others' work.
    """
    stopping = sum(entry.leaving == "gang" for entry in sealed.entries)
    own = any(entry.site_id == site_id and entry.leaving == "site" for entry in sealed.entries)
    return own or 2 * stopping > len(sealed.entries)


class Exchange(Protocol):
    """The round log as one site's ranks use it."""

    def position(self) -> Position:
        """Wait for the first view and return where to start."""
        ...

    def post_fragment(self, round_number: int, fragment: int, payload: bytes) -> None:
        """Hand over one compressed fragment of this site's contribution to `round_number`."""
        ...

    def commit(
        self,
        round_number: int,
        *,
        weight: int,
        samples: tuple[SampleRange, ...],
        fragments: int,
        outer_hash: str,
    ) -> None:
        """Complete the contribution of `fragments` fragments; `outer_hash` is of the state before it.

        Repeating a commit with the same content changes nothing.
        """
        ...

    def await_sealed(self, round_number: int) -> SealedRound:
        """Wait until `round_number` is sealed. Raises training.errors.ExchangeError after patience."""
        ...

    def sealed_already(self, round_number: int) -> SealedRound | None:
        """Return `round_number` where it is sealed by now, None where it is not; does not wait."""
        ...

    def fetch_fragment(self, round_number: int, site_id: str, fragment: int) -> bytes:
        """Return a fragment of a sealed contribution, verified against its signed digest."""
        ...

    def applied(self, round_number: int, outer_hash: str) -> None:
        """Report that the site has applied `round_number` and holds the state with this hash."""
        ...

    def offer_snapshot(self, round_number: int, path: str) -> None:
        """Let peers that join fetch the outer state after `round_number` from this safetensors file."""
        ...

    def fetch_snapshot(self, path: str) -> int:
        """Write a peer's newest outer state to `path` and return the round that it stands after."""
        ...

    def report(self, measurements: dict[str, float]) -> None:
        """Append one row of measurements (step, loss, samples_per_s, …) to the site's metrics."""
        ...
