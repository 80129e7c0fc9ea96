"""Codecs: how a fragment's values become bytes on the way between sites.

Decoding is deterministic and uses no randomness, so every site reads the same numbers. Sizes are
checked against the caller's element count before anything is allocated. What encoding drops is the
*carry*, which the caller keeps per fragment and hands to the next `encode`.
"""

from __future__ import annotations

from typing import Final, Protocol

from training.codecs.bf16 import Bf16
from training.codecs.fp4 import Fp4
from training.codecs.fp32 import Fp32
from training.codecs.framing import ELEMENTS_MAX, MAGNITUDE_MAX, NO_HINT, Hint, Values
from training.codecs.int4 import Int4
from training.codecs.int8 import Int8
from training.codecs.lowrank import LowRank
from training.codecs.sign import Sign
from training.codecs.topk2 import Topk2
from training.errors import CodecError

__all__ = ["CODECS", "ELEMENTS_MAX", "MAGNITUDE_MAX", "NO_HINT", "Codec", "Hint", "Values", "decode"]


class Codec(Protocol):
    """One way to write float32 values as bytes."""

    @property
    def name(self) -> str:
        """The codec's name in a SyncPlan."""
        ...

    @property
    def magic(self) -> bytes:
        """The four bytes that its payloads begin with."""
        ...

    def encode(
        self, values: Values, carry: Values | None, hint: Hint = NO_HINT, out: Values | None = None
    ) -> tuple[bytes, Values]:
        """Return the payload of flat `values` with their carry, and the new carry of the same shape.

        The new carry is written to `out` where one is given; it may be `carry` itself.

        Raises CodecError where a value is NaN, infinite or beyond MAGNITUDE_MAX.
        """
        ...

    def decode(self, payload: bytes, elements: int, out: Values | None = None) -> Values:
        """Return the `elements` values of a payload, in `out` where one is given. Raises CodecError on any other bytes."""
        ...

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        ...


_ALL: Final[tuple[Codec, ...]] = (Fp32(), Bf16(), Int8(), Int4(), Fp4(), Sign(), LowRank(), Topk2())
CODECS: Final[dict[str, Codec]] = {codec.name: codec for codec in _ALL}
_BY_MAGIC: Final = {codec.magic: codec for codec in CODECS.values()}


def decode(payload: bytes, elements: int) -> Values:
    """Return the values of a payload of whichever codec it names. Raises CodecError on any other bytes."""
    codec = _BY_MAGIC.get(payload[:4])
    if codec is None:
        message = f"{payload[:4]!r} is the mark of no codec; its author runs another version"
        raise CodecError(message)
    size_max = codec.size_bytes_max(elements)
    if len(payload) > size_max:
        message = f"{len(payload)} bytes for {elements} values, at most {size_max} can be: its author pads or lies"
        raise CodecError(message)
    return codec.decode(payload, elements)
