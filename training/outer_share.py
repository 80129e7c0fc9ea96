"""A rank's share of its site's outer state: what it contributes to a round, and how it applies one.

Each fragment has one owner rank, which alone keeps its outer parameters, velocity and carry. What is contributed and
how it is merged is the strategy's (`training.strategies`). No network here: `training.synchronizer` moves the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from training import dealing
from training.codecs import CODECS, Hint, Values, decode
from training.errors import CodecError
from training.exchange import Entry, SampleRange
from training.fragments import Fragment, layout_digest
from training.merge import sum_of_squares
from training.outer import state_hash
from training.outer_fragment import OwnedFragment, Received
from training.ranks import Ranks
from training.round_statistics import RoundStatistics, measured
from training.strategies import Strategy

Payloads = Mapping[tuple[str, int], bytes]


class FragmentValues(Protocol):
    """What the outer state asks of a model: its values by fragment. `training.parameters` has them of a torch module."""

    @property
    def fragments(self) -> tuple[Fragment, ...]:
        """The partition of all trainable elements."""
        ...

    def read(self, fragment: Fragment, at: int = 0) -> Values:
        """Return a copy of a fragment's values at rank `at`."""
        ...

    def read_gradients(self, fragment: Fragment, at: int = 0) -> Values:
        """Return a copy of a fragment's gradients at rank `at`."""
        ...

    def write(self, fragment: Fragment, values: Values) -> None:
        """Set a fragment's values."""
        ...

    def write_gradients(self, fragment: Fragment, values: Values) -> None:
        """Set a fragment's gradients."""
        ...

    def shapes(self, fragment: Fragment) -> tuple[tuple[int, int], ...]:
        """Return rows and columns of each piece."""
        ...


Model = TypeVar("Model", bound=FragmentValues)


class OuterShare(Generic[Model]):
    """The outer state of one site, as seen from one of its ranks."""

    def __init__(
        self,
        parameters: Model,
        ranks: Ranks,
        strategy: Strategy,
        *,
        total_samples: int,
        merges: bool = True,
        key: str = "",
    ) -> None:
        """Start at round 0 from the model's present parameters, with nothing done.

        Without `merges` (strategy local) contributions count samples and carry no values. `key` seeds what codecs
        draw: it names the job's seed and the site.
        """
        self.parameters = parameters
        self.fragments = parameters.fragments
        self.strategy = strategy
        self.round_number = 0
        self.done: tuple[SampleRange, ...] = ()
        # The round in which the last sample was sealed; 0 before.
        self.complete_round = 0
        self.statistics: RoundStatistics | None = None
        self._layout = layout_digest(self.fragments)
        self._ranks = ranks
        self._total_samples = total_samples
        self._merges = merges
        self._key = key
        self.owned: dict[int, OwnedFragment] = {}
        for fragment in self.fragments:
            theta = parameters.read(fragment, fragment.owner(ranks.world))
            if fragment.owner(ranks.world) == ranks.rank:
                owned = OwnedFragment(fragment, theta, np.zeros_like(theta), np.zeros_like(theta))
                strategy.begin(owned, joined=False)
                self.owned[fragment.number] = owned

    @property
    def layout(self) -> str:
        """The digest of the partition into fragments."""
        return self._layout

    def state_hash(self) -> str:
        """Return the hash of the outer state on which sites agree, on every rank. A collective."""
        digests = np.zeros((len(self.fragments), 32), dtype=np.uint8)
        for number, owned in self.owned.items():
            digests[number] = np.frombuffer(self.strategy.digest(owned), dtype=np.uint8)
        gathered = self._ranks.gather(digests)
        return state_hash(
            self._layout,
            [gathered[fragment.owner(self._ranks.world)][fragment.number].tobytes() for fragment in self.fragments],
            self.done,
        )

    def travelling(self, round_number: int) -> Sequence[int]:
        """Return the fragments that travel in a round; a contribution names them by their place in this list."""
        return self.strategy.travelling(round_number, len(self.fragments))

    def owned_places(self, round_number: int) -> list[tuple[int, OwnedFragment]]:
        """Return the fragments of a round that this rank owns, each with its place in the contribution."""
        travelling = enumerate(self.travelling(round_number))
        return [(place, self.owned[number]) for place, number in travelling if number in self.owned]

    def contribution(self, codec_name: str, round_number: int) -> dict[int, bytes]:
        """Encode this rank's fragments of a round, by place, and keep the new carries. A collective."""
        codec = CODECS[codec_name]
        payloads: dict[int, bytes] = {}
        # All are read before any is encoded: ranks gather together, then each encodes its own.
        present = self._present(self.travelling(round_number))
        for place, owned in self.owned_places(round_number):
            moved = self.strategy.moved(owned, present.pop(owned.fragment.number))
            hint = Hint(self._rounding_key(round_number, owned), self.parameters.shapes(owned.fragment))
            if self.strategy.keeps_carry:
                payload, _ = codec.encode(moved, owned.carry, hint, owned.carry)
            else:
                payload, _ = codec.encode(moved, None, hint)
            payloads[place] = owned.posted = payload
        return payloads

    def offered_again(self, round_number: int) -> dict[int, bytes]:
        """Return what was posted for an earlier round that went without it, for this one."""
        return {place: owned.posted for place, owned in self.owned_places(round_number) if owned.posted is not None}

    def _present(self, numbers: Sequence[int], *, gradients: bool | None = None) -> dict[int, Values]:
        """Return what the model holds of those of the fragments that this rank owns. A collective.

        Gradients, where the strategy exchanges them and `gradients` does not say otherwise.
        """
        wanted = self.strategy.gradients if gradients is None else gradients
        reads = self.parameters.read_gradients if wanted else self.parameters.read
        found: dict[int, Values] = {}
        for number in numbers:
            fragment = self.fragments[number]
            values = reads(fragment, fragment.owner(self._ranks.world))
            if number in self.owned:
                found[number] = values
        return found

    def _rounding_key(self, round_number: int, owned: OwnedFragment) -> int:
        name = f"hansa rounding {self._key} {round_number} {owned.fragment.number}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

    def adopt(self) -> None:
        """Take the model's present parameters as the outer ones. A collective.

        So does a `local` job each round, and any after an optimizer's step on exchanged gradients.
        """
        for number, values in self._present(range(len(self.fragments)), gradients=False).items():
            self.owned[number].theta = values

    def shelve(self) -> None:
        """Take back into the carry what was posted for a round that this site will not apply."""
        for owned in self.owned.values():
            if owned.posted is not None and self.strategy.keeps_carry:
                owned.carry = owned.carry + decode(owned.posted, owned.fragment.elements)
            owned.posted = None

    def has_content(self, entry: Entry, round_number: int) -> bool:
        """Return whether `entry` has all fragments of its round, and a weight to merge them with."""
        return self._merges and entry.weight > 0 and len(entry.fragments) == len(self.travelling(round_number))

    def verdict(self, entries: Sequence[Entry], payloads: Payloads, round_number: int) -> tuple[Entry, ...]:
        """Return the entries that count, in site order, alike on every rank and site. A collective.

        `payloads` holds this rank's fragments of each entry that has any, by site and place.
        Left out are entries with samples done before, claimed by an earlier entry or beyond the
        job's; those that claim samples without a weight or without all fragments; and those with a
        fragment that does not decode.
        """
        entries = sorted(entries, key=lambda entry: entry.site_id)
        broken = self._ranks.any_of([not self._decodes(entry, payloads, round_number) for entry in entries])
        counted: list[Entry] = []
        claimed = list(self.done)
        for entry, is_broken in zip(entries, broken, strict=True):
            inside = all(each.stop <= self._total_samples for each in entry.samples)
            if is_broken or not inside or not dealing.disjoint([*claimed, *entry.samples]):
                continue
            claimed.extend(entry.samples)
            counted.append(entry)
        return tuple(counted)

    def _decodes(self, entry: Entry, payloads: Payloads, round_number: int) -> bool:
        if not self._merges or (entry.weight == 0 and not entry.samples):
            return True
        if not self.has_content(entry, round_number):
            return False
        try:
            for place, owned in self.owned_places(round_number):
                decode(payloads[entry.site_id, place], owned.fragment.elements)
        except CodecError:
            return False
        return True

    def apply(
        self,
        round_number: int,
        counted: Sequence[Entry],
        payloads: Payloads,
        *,
        own_counts: bool,
        scatter: bool,
        offer_again: bool = False,
    ) -> None:
        """Merge the counted entries and give the model what the strategy makes of it. A collective.

        Without `own_counts` what this site posted returns to its carry, or waits where it will be offered again.
        Without `scatter` the model is left alone.
        """
        assert round_number == self.round_number + 1, f"round {round_number} after {self.round_number}"
        merged = [entry for entry in counted if self.has_content(entry, round_number)]
        if merged:
            self.strategy.observe([entry.site_id for entry in merged])
        rows = []
        for place, owned in self.owned_places(round_number):
            elements = owned.fragment.elements
            if merged:
                received = [
                    Received(entry.site_id, entry.weight, decode(payloads[entry.site_id, place], elements))
                    for entry in merged
                ]
                self.strategy.merge(owned, received, round_number)
                rows.append(measured(received))
        self.statistics = RoundStatistics.gathered(self._ranks, merged, rows)
        if own_counts:
            for owned in self.owned.values():
                owned.posted = None
        elif not offer_again:
            self.shelve()
        self.done = dealing.union([*self.done, *(each for entry in counted for each in entry.samples)])
        self.round_number = round_number
        if not self.complete_round and dealing.count(self.done) >= self._total_samples:
            self.complete_round = round_number
        if scatter:
            self._hand_over(self.travelling(round_number))

    def _hand_over(self, numbers: Sequence[int]) -> None:
        """Give every rank's model what its owners adopt of these fragments. A collective."""
        writes = self.parameters.write_gradients if self.strategy.gradients else self.parameters.write
        present = self._present(numbers) if self.strategy.mixes else {}
        for number in numbers:
            fragment, owned = self.fragments[number], self.owned.get(number)
            values = (
                np.empty(fragment.elements, dtype=np.float32)
                if owned is None
                else np.ascontiguousarray(self.strategy.adopted(owned, present.pop(number, None)))
            )
            writes(fragment, self._ranks.broadcast(values, fragment.owner(self._ranks.world)))

    def scatter(self) -> None:
        """Set every rank's model to the outer parameters of the fragments' owners. A collective."""
        for number, theta in self._each(lambda owned: owned.theta):
            self.parameters.write(self.fragments[number], theta)

    def scatter_inner(self, inner: Mapping[int, Values]) -> None:
        """Set the model to inner parameters that a checkpoint kept beside the outer ones, the same at every rank."""
        for number, values in inner.items():
            self.parameters.write(self.fragments[number], values)

    def gathered(self) -> dict[str, dict[int, Values]]:
        """Return all fragments' theta, velocity, carry and extras on rank 0, empty elsewhere. A collective."""
        parts = {
            "theta": dict(self._each(lambda owned: owned.theta)),
            "velocity": dict(self._each(lambda owned: owned.velocity)),
            "carry": dict(self._each(lambda owned: owned.carry)),
        }
        for name in self.strategy.extras:
            parts[name] = dict(self._each(lambda owned, name=name: owned.extra[name]))  # type: ignore[misc]
        return parts if self._ranks.rank == 0 else {}

    def inner(self) -> dict[int, Values]:
        """Return all fragments of the model as it stands on rank 0, empty elsewhere. A collective."""
        found = {fragment.number: self.parameters.read(fragment) for fragment in self.fragments}
        return found if self._ranks.rank == 0 else {}

    def final(self) -> Iterator[tuple[int, Values]]:
        """Yield number and values of all fragments of the model that the job delivers, on every rank. A collective."""
        return self._each(self.strategy.final)

    def _each(self, part: Callable[[OwnedFragment], Values]) -> Iterator[tuple[int, Values]]:
        """Yield each fragment's number and its owner's `part`, on every rank."""
        for fragment in self.fragments:
            owned = self.owned.get(fragment.number)
            values = np.empty(fragment.elements, dtype=np.float32) if owned is None else part(owned)
            yield fragment.number, self._ranks.broadcast(values, fragment.owner(self._ranks.world))

    def restore(
        self,
        round_number: int,
        done: tuple[SampleRange, ...],
        state: Mapping[str, Mapping[int, Values]],
        *,
        joined: bool = False,
    ) -> None:
        """Continue from a state of `round_number`; fragments that `state` lacks a part of get zeros there.

        `joined` says that the state is another site's.
        """
        self.round_number = round_number
        self.done = dealing.union(done)
        extras = [name for name in state if name not in {"theta", "velocity", "carry"}]
        self.strategy.expect(extras)
        for number, owned in self.owned.items():
            owned.theta = state["theta"][number].copy()
            owned.extra = {name: state[name][number].copy() for name in extras}
            for name in ("velocity", "carry"):
                values = state.get(name, {}).get(number)
                setattr(owned, name, np.zeros_like(owned.theta) if values is None else values.copy())
            self.strategy.begin(owned, joined=joined)
        self.scatter()

    def carry_norm(self) -> float:
        """Return the Euclidean norm of the site's whole carry. A collective."""
        squares = np.zeros(len(self.fragments), dtype=np.float64)
        for number, owned in self.owned.items():
            squares[number] = sum_of_squares(owned.carry)
        return float(np.sqrt(sum(float(part.sum()) for part in self._ranks.gather(squares))))
