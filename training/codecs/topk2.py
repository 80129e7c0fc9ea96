"""Chunked top-k with two-bit values, entropy-coded positions and decayed error feedback.

The method is SparseLoCo's (arXiv 2508.15706): of each chunk of 4,096 elements the 64 largest are
sent, the rest waits in the carry, which decays by beta each round and takes the part that outer
momentum has elsewhere. Added here: positions as Golomb-Rice gaps (training.codecs.golomb), and two
magnitudes per chunk at the least-squares split of the kept values.

Body: int16 exponent · fp16 magnitudes (two per chunk) · codes (2 bits: sign, which magnitude) ·
remainders (5 bits) · unary quotients. All lengths but the last follow from the element count.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from training.codecs.framing import HEADER, Values, body, header, with_carry
from training.codecs.golomb import PARAMETER, decode_gaps, encode_gaps, pack, packed_bytes, unary_bits_max, unpack
from training.errors import CodecError

CHUNK: Final = 4096
KEPT_PER_CHUNK: Final = 64
# SparseLoCo's default, the decay of its error feedback.
BETA: Final = np.float32(0.95)
_EXPONENT: Final = struct.Struct("<h")
_EXPONENT_MAX: Final = 101
_EXPONENT_MIN: Final = -149

_Grid = npt.NDArray[np.float32]
_Indices = npt.NDArray[np.int64]


class Topk2:
    """One element in 64, two bits each: about 1/204 of fp32. Useless without its carry."""

    name: Final = "topk2"
    magic: Final = b"HTK1"

    def encode(self, values: Values, carry: Values | None) -> tuple[bytes, Values]:
        """Return the payload of the largest of `values + beta * carry`, and all the rest of it."""
        total = with_carry(values, carry, BETA)
        largest = float(np.max(np.abs(total), initial=np.float32(0)))
        exponent = int(np.clip(np.frexp(largest)[1], _EXPONENT_MIN, _EXPONENT_MAX)) if largest else 0
        positions, levels, codes = [], [], []
        for start, grid in _chunks(total):
            kept = _largest(np.abs(grid), _kept(grid.shape[1]))
            picked = np.take_along_axis(grid, kept, axis=1)
            level, high = _two_levels(np.abs(picked), exponent)
            positions.append((kept + start + np.arange(len(grid))[:, None] * grid.shape[1]).reshape(-1))
            levels.append(level)
            codes.append((((picked < 0).astype(np.int64) << 1) | high).reshape(-1))
        places = _joined(positions)
        remainders, unary = encode_gaps(np.diff(places, prepend=-1) - 1)
        payload = b"".join(
            (
                header(self.magic, total.size),
                _EXPONENT.pack(exponent),
                b"".join(level.astype("<f2").tobytes() for level in levels),
                pack(_joined(codes), 2),
                remainders,
                unary,
            )
        )
        return payload, total - self.decode(payload, total.size)

    def decode(self, payload: bytes, elements: int) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        view = body(payload, self.magic, elements)
        chunks, count = _counts(elements)
        ends = np.cumsum([_EXPONENT.size, 4 * chunks, packed_bytes(count, 2), packed_bytes(count, PARAMETER)])
        unary_bytes = len(view) - int(ends[-1])
        if not 0 <= unary_bytes <= -(-unary_bits_max(count, elements) // 8):
            message = (
                f"a body of {len(view)} bytes is not that of {elements} elements; the payload is damaged or forged"
            )
            raise CodecError(message)
        levels = _read_levels(view[: ends[1]], chunks)
        codes = unpack(view[ends[1] : ends[2]], 2, count)
        places = np.cumsum(decode_gaps(view[ends[2] : ends[3]], view[ends[3] :], count) + 1) - 1
        chunk_of = np.minimum(np.arange(count) // KEPT_PER_CHUNK, max(0, chunks - 1))
        # Places ascend, so the last one tells whether all lie inside a short last chunk.
        if not bool(np.all(places // CHUNK == chunk_of)) or (count and int(places[-1]) >= elements):
            message = "a kept position lies outside its chunk; the payload is damaged or forged"
            raise CodecError(message)
        magnitudes = levels[chunk_of, codes & 1]
        values = np.zeros(elements, dtype=np.float32)
        values[places] = np.where(codes & 2, -magnitudes, magnitudes)
        return values

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        chunks, count = _counts(elements)
        streams = packed_bytes(count, 2) + packed_bytes(count, PARAMETER) + -(-unary_bits_max(count, elements) // 8)
        return HEADER.size + _EXPONENT.size + 4 * chunks + streams


def _kept(width: int) -> int:
    """Return how many of a chunk of `width` elements are kept: one in 64, at least one."""
    return -(-width * KEPT_PER_CHUNK // CHUNK)


def _counts(elements: int) -> tuple[int, int]:
    whole, rest = divmod(elements, CHUNK)
    return whole + (rest > 0), whole * KEPT_PER_CHUNK + _kept(rest)


def _chunks(values: Values) -> list[tuple[int, _Grid]]:
    """Return the whole chunks as one grid, and the last partial one as another, with their offsets."""
    cut = values.size - values.size % CHUNK
    parts = [(0, values[:cut].reshape(-1, CHUNK)), (cut, values[cut:].reshape(1, -1))]
    return [(start, grid) for start, grid in parts if grid.size]


def _largest(magnitudes: _Grid, count: int) -> _Indices:
    """Return the columns of each row's `count` largest, ascending; of equals the first ones win.

    numpy's partition may order equals differently on unlike CPUs, so only the threshold's *value*
    is taken from it.
    """
    width = magnitudes.shape[1]
    threshold = np.partition(magnitudes, width - count, axis=1)[:, width - count, None]
    above = magnitudes > threshold
    equal = magnitudes == threshold
    room = count - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return np.nonzero(chosen)[1].reshape(-1, count)


def _two_levels(magnitudes: _Grid, exponent: int) -> tuple[_Grid, _Indices]:
    """Return each row's two fp16-exact magnitudes (in units of 2**exponent) and which one each value takes.

    Of all splits of a sorted row into low and high, the one with the least squared error is that
    which maximises (sum of low)^2 / n_low + (sum of high)^2 / n_high.
    """
    scaled = np.ldexp(magnitudes.astype(np.float64), -exponent)
    rows, count = scaled.shape
    sums = np.cumsum(np.sort(scaled, axis=1), axis=1)
    total = sums[:, -1:]
    lows = np.arange(1, count)
    gain = sums[:, :-1] ** 2 / lows + (total - sums[:, :-1]) ** 2 / (count - lows)
    split = np.argmax(gain, axis=1) + 1 if count > 1 else np.ones(rows, dtype=np.int64)
    low_sum = sums[np.arange(rows), split - 1]
    low = low_sum / split
    high = np.where(split < count, (total[:, 0] - low_sum) / np.maximum(count - split, 1), low)
    levels = np.stack([low, np.maximum(low, high)], axis=1).astype(np.float16).astype(np.float32)
    middle = (levels[:, 0].astype(np.float64) + levels[:, 1]) / 2
    return levels, (scaled > middle[:, None]).astype(np.int64)


def _read_levels(view: memoryview, chunks: int) -> _Grid:
    (exponent,) = _EXPONENT.unpack_from(view)
    halves = np.frombuffer(view[_EXPONENT.size :], dtype="<f2").astype(np.float32).reshape(chunks, 2)
    # Scaled magnitudes are at most 1; the comparison is false for NaN too.
    in_range = bool(np.all((halves >= 0) & (halves <= 1))) and _EXPONENT_MIN <= exponent <= _EXPONENT_MAX
    if not in_range or not bool(np.all(halves[:, 0] <= halves[:, 1])):
        message = "a chunk's magnitudes are not two numbers in order; the payload is damaged or forged"
        raise CodecError(message)
    levels: _Grid = np.ldexp(halves, exponent).astype(np.float32)
    return levels


def _joined(parts: list[_Indices]) -> _Indices:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
