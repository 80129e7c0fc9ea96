"""The questions that the runtime asks a strategy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from training.codecs import Values
from training.outer_fragment import OwnedFragment, Received


class Strategy(Protocol):
    """One way to keep sites together. See training/README.md, Strategies, for the table of all."""

    @property
    def gradients(self) -> bool:
        """Whether gradients travel, before the optimizer's step, instead of what the parameters have moved."""
        ...

    @property
    def keeps_carry(self) -> bool:
        """Whether the fragment's carry is its error feedback; False where the strategy has its own."""
        ...

    @property
    def mixes(self) -> bool:
        """Whether what the model takes after a round depends on what it holds then."""
        ...

    @property
    def overlap_steps(self) -> int:
        """The inner steps taken between posting a round and applying it; 0 waits for the seal."""
        ...

    @property
    def deals_apart(self) -> bool:
        """Whether a site's next samples are dealt before its last ones are sealed, so that each keeps to cells of its own."""
        ...

    @property
    def waits(self) -> bool:
        """Whether a round is sealed with all sites in it; otherwise whoever is late finds it sealed."""
        ...

    @property
    def offers(self) -> int:
        """The rounds in a row to which one contribution is offered, if earlier ones are sealed without it."""
        ...

    @property
    def last_rounds(self) -> int:
        """The rounds after the last sample, in which what has not had its turn travels."""
        ...

    @property
    def extras(self) -> tuple[str, ...]:
        """The names of the arrays in each fragment's `extra`, alike on every rank."""
        ...

    def travelling(self, round_number: int, fragments: int) -> Sequence[int]:
        """Return the numbers of the fragments that travel in a round, ascending."""
        ...

    def begin(self, owned: OwnedFragment, *, joined: bool) -> None:
        """Prepare a fragment whose theta (and, after a restore, all else) has just been set."""
        ...

    def expect(self, extras: Collection[str]) -> None:
        """Take note of the extras that a restored state has."""
        ...

    def moved(self, owned: OwnedFragment, present: Values) -> Values:
        """Return what this site has to say about a fragment, of the model's present values or gradients."""
        ...

    def observe(self, site_ids: Sequence[str]) -> None:
        """Hear, on every rank, whose entries are merged in this round, before `merge` is asked for each fragment."""
        ...

    def merge(self, owned: OwnedFragment, received: Sequence[Received], round_number: int) -> None:
        """Change the outer state by a sealed round's entries; there is at least one."""
        ...

    def adopted(self, owned: OwnedFragment, present: Values | None) -> Values:
        """Return what the model takes after a round, where it holds `present`: told only where the strategy `mixes`."""
        ...

    def digest(self, owned: OwnedFragment) -> bytes:
        """Return the digest of that part of a fragment's state on which all sites agree."""
        ...

    def final(self, owned: OwnedFragment) -> Values:
        """Return the fragment of the model that the job delivers."""
        ...
