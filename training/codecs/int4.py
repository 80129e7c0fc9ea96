"""Four bits an element with one scale per block of 256, rounded stochastically so that no mean drifts.

The random bits are counter-based: a hash of the element's place under the caller's key, so that the same round
encodes to the same bytes again and a replay needs no generator's state. Decoding draws nothing.

A block of 256 codes lies in 128 bytes: element i in the low half of byte i, element i + 128 in its high half.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from training.codecs import blocks
from training.codecs.blocks import SCALE_MIN, Codes
from training.codecs.compiled import ELEMENTS_MIN, kernels
from training.codecs.framing import NO_HINT, Hint, Values, output

BLOCK: Final = 256
_HALF: Final = BLOCK // 2
_LEVELS: Final = np.float32(7)
_CENTRE: Final = 8
# Codes are found in fixed point with eight fractional bits, to which eight random bits are added.
_FRACTION: Final = np.float32(256)
_OFFSET: Final = np.float32(_CENTRE * 256 + 0.5)


class Int4:
    """Block-scaled int4, stochastic. Error per element: below (block's largest magnitude / 7), its mean about zero."""

    name: Final = "int4"
    magic: Final = b"HI41"
    block: Final = BLOCK
    bits: Final = 4

    def encode(
        self, values: Values, carry: Values | None, hint: Hint = NO_HINT, out: Values | None = None
    ) -> tuple[bytes, Values]:
        """Return the payload of `values + carry` and what rounding left of it; the hint's key seeds the rounding."""
        if values.size >= ELEMENTS_MIN and (loops := kernels()):
            low, high = mixed_key(hint.key)
            return blocks.encode_in_one_pass(
                self, values, carry, out, lambda *arrays: loops["encode_int4"](*arrays, BLOCK, low, high)
            )
        return blocks.encode(self, values, carry, key=hint.key, out=out)

    def decode(self, payload: bytes, elements: int, out: Values | None = None) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        if elements >= ELEMENTS_MIN and (loops := kernels()):
            scales, codes = blocks.opened(self, payload, elements)
            values = output(out, elements)
            loops["decode_int4"](codes, scales, values, BLOCK)
            return values
        return blocks.decode(self, payload, elements, out)

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        return blocks.size_bytes_max(self, elements)

    def scales(self, total: Values, peaks: Values) -> Values:
        """Return a seventh of each block's largest magnitude."""
        steps = peaks / _LEVELS
        steps[steps < SCALE_MIN * _FRACTION] = 0  # whose inverse, in fixed point, must be finite too
        return steps

    def pack(self, total: Values, scales: Values, work: Values, *, key: int, first: int) -> Codes:
        """Return the codes, rounded up with the probability that the fraction says."""
        blocks.scaled(total, blocks.inverse(scales, _FRACTION), work)
        work += _OFFSET
        fixed = work.astype(np.uint16)
        fixed += random_bytes(fixed.size, key, first * BLOCK).reshape(fixed.shape)
        fixed >>= np.uint16(8)
        codes = fixed.astype(np.uint8)
        # A quotient of 7 may come out a unit too large; the level above it does not exist.
        np.minimum(codes, np.uint8(2 * _CENTRE - 1), out=codes)
        packed = codes[:, _HALF:] << np.uint8(4)
        packed |= codes[:, :_HALF]
        _meaning(codes, scales, work)
        return packed

    def unpack(self, codes: Codes, scales: Values, work: Values) -> None:
        """Write the levels times their scale."""
        levels = np.empty((len(codes), BLOCK), dtype=np.uint8)
        np.bitwise_and(codes, np.uint8(15), out=levels[:, :_HALF])
        np.right_shift(codes, np.uint8(4), out=levels[:, _HALF:])
        _meaning(levels, scales, work)


def _meaning(codes: Codes, scales: Values, work: Values) -> None:
    np.copyto(work, (codes - np.uint8(_CENTRE)).view(np.int8))
    blocks.scaled(work, scales, work)


def random_bytes(count: int, key: int, first: int) -> npt.NDArray[np.uint8]:
    """Return `count` bytes of the stream of `key` from byte `first` on; `first` and `count` are multiples of 4.

    Four bytes come from one 32-bit mix (lowbias32, Wellons 2018) of counter and key, applied to the key first
    so that neighbouring keys share nothing.
    """
    words = np.arange(first // 4, (first + count) // 4, dtype=np.uint64).astype(np.uint32)
    low, high = mixed_key(key)
    words += np.uint32(low)
    words ^= np.uint32(high)
    return _mixed(words).astype("<u4", copy=False).view(np.uint8)


def mixed_key(key: int) -> tuple[int, int]:
    """Return the two halves of a key, mixed, so that neighbouring keys share nothing."""
    halves = _mixed(np.array([key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF], dtype=np.uint32))
    return int(halves[0]), int(halves[1])


def _mixed(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    words = words ^ (words >> np.uint32(16))
    words *= np.uint32(0x7FEB352D)
    words ^= words >> np.uint32(15)
    words *= np.uint32(0x846CA68B)
    words ^= words >> np.uint32(16)
    return words
