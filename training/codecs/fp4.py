"""Four bits of floating point, E3M0: a sign and three exponent bits below the block's largest magnitude.

The wire format of Streaming DiLoCo (arXiv 2501.18512). Code 0 is zero, code k is the block's largest magnitude
times 2**(k - 7). Small values keep their relative size where int4 would round them away.

A block of 256 codes lies in 128 bytes: element i in the low half of byte i, element i + 128 in its high half.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from training.codecs import blocks
from training.codecs.blocks import SCALE_MIN, Codes
from training.codecs.framing import NO_HINT, Hint, Values

BLOCK: Final = 256
_HALF: Final = BLOCK // 2
_SIGN: Final = np.uint8(8)
_TOP: Final = 7
_FOUR_THIRDS: Final = np.float32(4 / 3)
_BIAS: Final = 127
_MEANINGS: Final = np.concatenate(
    [sign * np.array([0, *(2.0 ** (k - _TOP) for k in range(1, _TOP + 1))]) for sign in (1, -1)]
).astype(np.float32)


class Fp4:
    """E3M0. Error per element: at most a third of it, or where that is less, 3/256 of its block's largest magnitude.

    Whatever is below that becomes zero: the least power's own binade begins there (see `pack`).
    """

    name: Final = "fp4"
    magic: Final = b"HF41"
    block: Final = BLOCK
    bits: Final = 4

    def encode(
        self, values: Values, carry: Values | None, hint: Hint = NO_HINT, out: Values | None = None
    ) -> tuple[bytes, Values]:
        """Return the payload of `values + carry` and what rounding left of it."""
        return blocks.encode(self, values, carry, key=hint.key, out=out)

    def decode(self, payload: bytes, elements: int, out: Values | None = None) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        return blocks.decode(self, payload, elements, out)

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        return blocks.size_bytes_max(self, elements)

    def scales(self, total: Values, peaks: Values) -> Values:
        """Return each block's largest magnitude; its 64th must still be a normal number."""
        return np.where(peaks < SCALE_MIN * np.float32(1 << _TOP), np.float32(0), peaks)

    def pack(self, total: Values, scales: Values, work: Values, *, key: int, first: int) -> Codes:
        """Return the nearest codes: a ratio from 3/4 of a power of two up to 3/2 of it is that power.

        Times 4/3 that is the power's own binade, which stands in the exponent bits.
        """
        blocks.scaled(total, blocks.inverse(scales, _FOUR_THIRDS), work)
        bits = work.view(np.uint32)
        exponents = ((bits >> np.uint32(23)) & np.uint32(0xFF)).astype(np.int16)
        exponents -= np.int16(_BIAS - _TOP)
        np.clip(exponents, 0, _TOP, out=exponents)
        codes = exponents.astype(np.uint8)
        codes |= (bits >> np.uint32(28)).astype(np.uint8) & _SIGN
        packed = codes[:, _HALF:] << np.uint8(4)
        packed |= codes[:, :_HALF]
        _meaning(codes, scales, work)
        return packed

    def unpack(self, codes: Codes, scales: Values, work: Values) -> None:
        """Write the powers of two times their scale."""
        levels = np.empty((len(codes), BLOCK), dtype=np.uint8)
        np.bitwise_and(codes, np.uint8(15), out=levels[:, :_HALF])
        np.right_shift(codes, np.uint8(4), out=levels[:, _HALF:])
        _meaning(levels, scales, work)


def _meaning(codes: Codes, scales: Values, work: Values) -> None:
    np.take(_MEANINGS, codes, out=work, mode="clip")
    blocks.scaled(work, scales, work)
