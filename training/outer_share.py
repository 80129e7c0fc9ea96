"""A rank's share of its site's outer state: what it contributes to a round, and how it applies one.

Each fragment has one owner rank, which alone keeps its outer parameters, velocity and carry. No
network here: `training.session` moves the bytes through the exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from training import dealing
from training.codecs import CODECS, Values, decode
from training.errors import CodecError
from training.exchange import Entry, SampleRange
from training.fragments import Fragment, layout_digest
from training.merge import sum_of_squares, weighted_mean
from training.outer import PLAIN, OuterRule, fragment_digest, outer_step, state_hash
from training.parameters import Parameters
from training.ranks import Ranks


@dataclass(slots=True)
class OwnedFragment:
    """The outer state of one fragment at its owner. Arrays are flat float32."""

    fragment: Fragment
    theta: Values
    velocity: Values
    carry: Values
    posted: bytes | None = field(default=None, repr=False)


class OuterShare:
    """The outer state of one site, as seen from one of its ranks."""

    def __init__(
        self, parameters: Parameters, ranks: Ranks, rule: OuterRule, *, total_samples: int, merges: bool = True
    ) -> None:
        """Start at round 0 from the model's present parameters, with nothing done.

        Without `merges` (strategy local) contributions count samples and carry no values.
        """
        self.parameters = parameters
        self.fragments = parameters.fragments
        self.round_number = 0
        self.done: tuple[SampleRange, ...] = ()
        self._layout = layout_digest(self.fragments)
        self._ranks = ranks
        self._rule = rule
        self._total_samples = total_samples
        self._merges = merges
        self.owned: dict[int, OwnedFragment] = {}
        for fragment in self.fragments:
            if fragment.owner(ranks.world) == ranks.rank:
                theta = parameters.read(fragment)
                self.owned[fragment.number] = OwnedFragment(fragment, theta, np.zeros_like(theta), np.zeros_like(theta))

    @property
    def layout(self) -> str:
        """The digest of the partition into fragments."""
        return self._layout

    def state_hash(self) -> str:
        """Return the hash of the whole outer state, on every rank. A collective."""
        digests = np.zeros((len(self.fragments), 32), dtype=np.uint8)
        for number, owned in self.owned.items():
            digests[number] = np.frombuffer(fragment_digest(owned.theta, owned.velocity), dtype=np.uint8)
        gathered = self._ranks.gather(digests)
        return state_hash(
            self._layout,
            [gathered[fragment.owner(self._ranks.world)][fragment.number].tobytes() for fragment in self.fragments],
            self.done,
        )

    def contribution(self, codec_name: str) -> dict[int, bytes]:
        """Encode what this rank's fragments have moved since the last round, and keep the new carries."""
        codec = CODECS[codec_name]
        for owned in self.owned.values():
            moved = owned.theta - self.parameters.read(owned.fragment)
            owned.posted, owned.carry = codec.encode(moved, owned.carry)
        return {number: owned.posted for number, owned in self.owned.items() if owned.posted is not None}

    def adopt(self) -> None:
        """Take the model's present parameters as the outer ones, as a `local` job does each round."""
        for owned in self.owned.values():
            owned.theta = self.parameters.read(owned.fragment)

    def shelve(self) -> None:
        """Take back into the carry what was posted for a round that this site will not apply."""
        for owned in self.owned.values():
            if owned.posted is not None:
                owned.carry = owned.carry + decode(owned.posted, owned.fragment.elements)
            owned.posted = None

    def has_content(self, entry: Entry) -> bool:
        """Return whether `entry` has all fragments of this model, and a weight to merge them with."""
        return self._merges and entry.weight > 0 and len(entry.fragments) == len(self.fragments)

    def verdict(self, entries: Sequence[Entry], payloads: dict[tuple[str, int], bytes]) -> tuple[Entry, ...]:
        """Return the entries that count, in site order, alike on every rank and site. A collective.

        `payloads` holds this rank's fragments of each entry that has any, by site and fragment.
        Left out are entries with samples done before, claimed by an earlier entry or beyond the
        job's; those that claim samples without a weight or without all fragments; and those with a
        fragment that does not decode.
        """
        entries = sorted(entries, key=lambda entry: entry.site_id)
        broken = self._ranks.any_of([not self._decodes(entry, payloads) for entry in entries])
        counted: list[Entry] = []
        claimed = list(self.done)
        for entry, is_broken in zip(entries, broken, strict=True):
            inside = all(each.stop <= self._total_samples for each in entry.samples)
            if is_broken or not inside or not dealing.disjoint([*claimed, *entry.samples]):
                continue
            claimed.extend(entry.samples)
            counted.append(entry)
        return tuple(counted)

    def _decodes(self, entry: Entry, payloads: dict[tuple[str, int], bytes]) -> bool:
        if not self._merges or (entry.weight == 0 and not entry.samples):
            return True
        if not self.has_content(entry):
            return False
        try:
            for number, owned in self.owned.items():
                decode(payloads[entry.site_id, number], owned.fragment.elements)
        except CodecError:
            return False
        return True

    def apply(
        self,
        round_number: int,
        counted: Sequence[Entry],
        payloads: dict[tuple[str, int], bytes],
        *,
        own_counts: bool,
        scatter: bool,
    ) -> None:
        """Merge the counted entries, step, and give the model the new outer parameters. A collective.

        Without `own_counts` what this site posted returns to its carry. Without `scatter` the
        model is left alone.
        """
        assert round_number == self.round_number + 1, f"round {round_number} after {self.round_number}"
        merged = [entry for entry in counted if self.has_content(entry)]
        rule = PLAIN if len(merged) == 1 else self._rule
        for number, owned in self.owned.items():
            elements = owned.fragment.elements
            if merged:
                mean = weighted_mean(
                    (entry.weight, decode(payloads[entry.site_id, number], elements)) for entry in merged
                )
                theta, velocity = outer_step(owned.theta, owned.velocity, mean, rule)
                owned.theta = theta
                owned.velocity = velocity if len(merged) > 1 else owned.velocity
            if owned.posted is not None and not own_counts:
                owned.carry = owned.carry + decode(owned.posted, elements)
            owned.posted = None
        self.done = dealing.union([*self.done, *(each for entry in counted for each in entry.samples)])
        self.round_number = round_number
        if scatter:
            self.scatter()

    def scatter(self) -> None:
        """Set every rank's model to the outer parameters of the fragments' owners. A collective."""
        for number, theta in self._each(lambda owned: owned.theta):
            self.parameters.write(self.fragments[number], theta)

    def gathered(self) -> dict[str, dict[int, Values]]:
        """Return all fragments' theta, velocity and carry on rank 0, empty elsewhere. A collective."""
        parts = {
            "theta": dict(self._each(lambda owned: owned.theta)),
            "velocity": dict(self._each(lambda owned: owned.velocity)),
            "carry": dict(self._each(lambda owned: owned.carry)),
        }
        return parts if self._ranks.rank == 0 else {}

    def _each(self, part: Callable[[OwnedFragment], Values]) -> Iterator[tuple[int, Values]]:
        """Yield each fragment's number and its owner's `part`, on every rank."""
        for fragment in self.fragments:
            owned = self.owned.get(fragment.number)
            values = np.empty(fragment.elements, dtype=np.float32) if owned is None else part(owned)
            yield fragment.number, self._ranks.broadcast(values, fragment.owner(self._ranks.world))

    def restore(self, round_number: int, done: tuple[SampleRange, ...], state: dict[str, dict[int, Values]]) -> None:
        """Continue from a state of `round_number`; fragments that `state` lacks a part of get zeros there."""
        self.round_number = round_number
        self.done = dealing.union(done)
        for number, owned in self.owned.items():
            owned.theta = state["theta"][number].copy()
            for name in ("velocity", "carry"):
                values = state.get(name, {}).get(number)
                setattr(owned, name, np.zeros_like(owned.theta) if values is None else values.copy())
        self.scatter()

    def carry_norm(self) -> float:
        """Return the Euclidean norm of the site's whole carry. A collective."""
        squares = np.zeros(len(self.fragments), dtype=np.float64)
        for number, owned in self.owned.items():
            squares[number] = sum_of_squares(owned.carry)
        return float(np.sqrt(sum(float(part.sum()) for part in self._ranks.gather(squares))))
