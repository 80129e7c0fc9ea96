"""Fragments: the parts in which parameters travel between sites.

A fragment is a list of whole parameters; one larger than the target is cut by element range of
its unsharded, row-major tensor. The cut depends on names and sizes alone, never on ranks, so
every site encodes the same blocks. `training.outer_share` moves values between fragments and model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from training.codecs import ELEMENTS_MAX

# Small enough that a 0.1 M parameter model has two, large enough that a payload's header and a
# request's overhead (some hundred bytes) stay below a thousandth even after topk2.
TARGET_MIN: Final = 1 << 16
# 16 MiB of float32: one fragment in flight and its float64 accumulator fit any host.
TARGET_MAX: Final = 1 << 22
_FRAGMENTS_WANTED: Final = 8
# The round log takes 1,024 fragments a contribution; half of it leaves room for uneven cuts.
FRAGMENTS_MAX: Final = 512


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` - 1 of the flattened parameter `name`."""

    name: str
    start: int
    stop: int
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some pieces that are encoded, merged and scattered together."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        """The number of values in the fragment."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def owner(self, world: int) -> int:
        """Return the rank, of `world` in the site, that encodes and merges this fragment."""
        return self.number % world


def partition(
    sizes: Sequence[tuple[str, int]], target: int | None = None, embeddings: Collection[str] = ()
) -> tuple[Fragment, ...]:
    """Cut parameters, given as (name, elements) in model order, into fragments of about `target` elements.

    The default target is an eighth of the model, between TARGET_MIN and TARGET_MAX. Every element
    is in exactly one fragment, which is asserted.
    """
    total = sum(elements for _, elements in sizes)
    if target is None:
        target = max(min(TARGET_MAX, max(TARGET_MIN, -(-total // _FRAGMENTS_WANTED))), -(-total // FRAGMENTS_MAX))
    assert 0 < target <= ELEMENTS_MAX, target
    groups: list[list[Piece]] = []
    room = 0
    for piece in _pieces(sizes, target, embeddings):
        length = piece.stop - piece.start
        if length > room or not groups:
            groups.append([])
            room = target
        groups[-1].append(piece)
        room -= length
    fragments = tuple(Fragment(number, tuple(pieces)) for number, pieces in enumerate(groups))
    assert_complete(fragments, sizes)
    return fragments


def _pieces(sizes: Iterable[tuple[str, int]], target: int, embeddings: Collection[str]) -> Iterable[Piece]:
    for name, elements in sizes:
        for start in range(0, elements, target):
            yield Piece(name, start, min(start + target, elements), embedding=name in embeddings)


def assert_complete(fragments: Sequence[Fragment], sizes: Sequence[tuple[str, int]]) -> None:
    """Assert that each element of each parameter is in exactly one fragment (invariant 13)."""
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name, _ in sizes}
    assert len(ranges) == len(sizes), "two parameters share a name"
    for fragment in fragments:
        for piece in fragment.pieces:
            ranges[piece.name].append((piece.start, piece.stop))
    for name, elements in sizes:
        reached = 0
        for start, stop in sorted(ranges[name]):
            assert start == reached, f"{name} has a gap or an overlap at element {reached}"
            assert stop > start, f"{name} has an empty piece"
            reached = stop
        assert reached == elements, f"{name} is covered up to {reached} of {elements} elements"


def layout_digest(fragments: Sequence[Fragment]) -> str:
    """Return the SHA-256 of the partition: sites whose digests differ train different models."""
    layout = [[[piece.name, piece.start, piece.stop] for piece in fragment.pieces] for fragment in fragments]
    return hashlib.sha256(json.dumps(layout, separators=(",", ":")).encode()).hexdigest()
