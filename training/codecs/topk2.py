"""Chunked top-k with two-bit values, entropy-coded positions and decayed error feedback.

The method is SparseLoCo's (arXiv 2508.15706): of each chunk of 4,096 elements the 64 largest are
sent, the rest waits in the carry, which decays by beta each round and takes the part that outer
momentum has elsewhere. Added here: two magnitudes per chunk at the least-squares split of the kept values, and an
adaptive arithmetic coder for positions, magnitudes and which of the two a value has (training.codecs.arithmetic).

Body: int16 exponent · signs (one bit each) · the arithmetic stream. A magnitude is (16 + mantissa) / 32 times
2**(exponent - its own exponent), mantissa of four bits: a thirty-second off at most, and the carry has the difference.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from training.codecs import arithmetic
from training.codecs.arithmetic import EXPONENT_ZERO, MANTISSA_BITS
from training.codecs.compiled import ELEMENTS_MIN, kernels
from training.codecs.framing import HEADER, MAGNITUDE_MAX, NO_HINT, Hint, Values, body, header, output, unsound
from training.errors import CodecError

CHUNK: Final = 4096
KEPT_PER_CHUNK: Final = 64
# SparseLoCo's default, the decay of its error feedback.
BETA: Final = np.float32(0.95)
# 256 KiB of float32 at a time: what is done to a tile, is done in the cache.
_TILE: Final = 16 * CHUNK
_GROUP: Final = 8
_EXPONENT: Final = struct.Struct("<h")
_EXPONENT_MAX: Final = 101
_EXPONENT_MIN: Final = -149

_Grid = npt.NDArray[np.float32]
_Indices = npt.NDArray[np.int64]


class Topk2:
    """One element in 64, two bits each: about 1/218 of fp32. Useless without its carry."""

    name: Final = "topk2"
    magic: Final = b"HTK2"

    def encode(
        self, values: Values, carry: Values | None, hint: Hint = NO_HINT, out: Values | None = None
    ) -> tuple[bytes, Values]:
        """Return the payload of the largest of `values + beta * carry`, and all the rest of it."""
        left = output(out, values.size)
        if values.size >= ELEMENTS_MIN and (loops := kernels()):
            exponent, picks = _picked_in_one_pass(values, carry, left, loops["select"])
        else:
            exponent, picks = _picked(_with_decayed(values, carry, left))
        places = _joined([pick.places.reshape(-1) for pick in picks])
        levels, highs, scales = [], [], []
        for pick in picks:
            scale, level, high = _two_levels(np.abs(pick.values), exponent)
            scales.append(scale)
            levels.append(level)
            highs.append(high.reshape(-1))
        high = _joined(highs)
        negative = _joined_values(picks) < 0
        chunk_of = _chunk_of(high.size, -(-left.size // CHUNK))
        inside = places - chunk_of * CHUNK
        first = np.diff(chunk_of, prepend=-1) > 0
        gaps = inside - np.where(first, -1, np.roll(inside, 1)) - 1
        payload = b"".join(
            (
                header(self.magic, left.size),
                _EXPONENT.pack(exponent),
                np.packbits(negative).tobytes(),
                arithmetic.encode(
                    gaps,
                    high,
                    np.concatenate([np.zeros((0, 4), np.int64), *scales]),
                    KEPT_PER_CHUNK,
                    compiled=values.size >= ELEMENTS_MIN,
                ),
            )
        )
        # The very magnitudes that a decoder reads, by the same product.
        magnitudes = np.ldexp(np.concatenate([np.zeros((0, 2), np.float32), *levels]), exponent).astype(np.float32)
        sent = magnitudes[chunk_of, high]
        left[places] -= np.where(negative, -sent, sent)
        return payload, left

    def decode(self, payload: bytes, elements: int, out: Values | None = None) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        view = body(payload, self.magic, elements)
        chunks, count = _counts(elements)
        streams = _EXPONENT.size + -(-count // 8)
        if not streams <= len(view) <= streams + arithmetic.stream_bytes_max(chunks, count):
            message = (
                f"a body of {len(view)} bytes is not that of {elements} elements; the payload is damaged or forged"
            )
            raise CodecError(message)
        (exponent,) = _EXPONENT.unpack_from(view)
        signs = np.unpackbits(np.frombuffer(view[_EXPONENT.size : streams], dtype=np.uint8))
        if not _EXPONENT_MIN <= exponent <= _EXPONENT_MAX or signs[count:].any():
            raise CodecError("the exponent or the signs' padding is out of range; the payload is damaged or forged")
        widths = np.full(chunks, CHUNK, dtype=np.int64)
        widths[elements // CHUNK :] = elements % CHUNK
        kept = -(-widths * KEPT_PER_CHUNK // CHUNK)
        gaps, high, scales = arithmetic.decode(view[streams:], widths, kept, compiled=elements >= ELEMENTS_MIN)
        chunk_of = _chunk_of(count, chunks)
        # Gaps start anew in each chunk: take off what the chunks before have added up to.
        steps = np.cumsum(gaps + 1)
        before = np.concatenate([[0], steps[np.cumsum(kept)[:-1] - 1]]) if chunks else steps
        places = steps - before[chunk_of] - 1 + chunk_of * CHUNK
        magnitudes = np.ldexp(_levels_of(scales), exponent).astype(np.float32)[chunk_of, high]
        values = output(out, elements)
        values[:] = 0
        values[places] = np.where(signs[:count], -magnitudes, magnitudes)
        return values

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        chunks, count = _counts(elements)
        return HEADER.size + _EXPONENT.size + -(-count // 8) + arithmetic.stream_bytes_max(chunks, count)


def _kept(width: int) -> int:
    """Return how many of a chunk of `width` elements are kept: one in 64, at least one."""
    return -(-width * KEPT_PER_CHUNK // CHUNK)


def _counts(elements: int) -> tuple[int, int]:
    whole, rest = divmod(elements, CHUNK)
    return whole + (rest > 0), whole * KEPT_PER_CHUNK + _kept(rest)


def _chunk_of(count: int, chunks: int) -> _Indices:
    """Return the chunk that each of `count` kept values is from."""
    return np.minimum(np.arange(count) // KEPT_PER_CHUNK, max(0, chunks - 1))


def _with_decayed(values: Values, carry: Values | None, total: Values) -> Values:
    """Write `values + beta * carry` to `total`, tile by tile so that the product stays in the cache."""
    assert values.ndim == 1, "codecs take flat arrays"
    assert values.dtype == np.float32, f"codecs take float32, not {values.dtype}"
    if carry is None:
        total[:] = values
        return total
    assert carry.shape == values.shape, "a carry belongs to one fragment"
    scratch = np.empty(min(_TILE, values.size), dtype=np.float32)
    for start in range(0, values.size, _TILE):
        stop = min(start + _TILE, values.size)
        decayed = np.multiply(carry[start:stop], BETA, out=scratch[: stop - start])
        np.add(values[start:stop], decayed, out=total[start:stop])
    return total


@dataclass(frozen=True, slots=True)
class _Pick:
    """The kept values of some chunks of one width: a row for each chunk, places ascending in the whole array."""

    places: _Indices
    values: _Grid


def _picked(total: Values) -> tuple[int, list[_Pick]]:
    """Return the exponent of the largest magnitude, and what is kept of each chunk."""
    picks, largest = [], np.float32(0)
    scratch = np.empty(min(_TILE, -(-total.size // CHUNK) * CHUNK), dtype=np.float32)
    whole = total.size - total.size % CHUNK
    spans = [(start, min(start + _TILE, whole), CHUNK) for start in range(0, whole, _TILE)]
    if whole < total.size:
        spans.append((whole, total.size, total.size - whole))
    for start, stop, width in spans:
        magnitudes = np.abs(total[start:stop], out=scratch[: stop - start]).reshape(-1, width)
        kept, peak = _largest(magnitudes, _kept(width))
        if not peak <= MAGNITUDE_MAX:
            raise unsound("the contribution with its carry")
        largest = max(largest, peak)
        places = kept + (start + width * np.arange(len(kept)))[:, None]
        picks.append(_Pick(places, total[places]))
    exponent = int(np.clip(np.frexp(largest)[1], _EXPONENT_MIN, _EXPONENT_MAX)) if largest else 0
    return exponent, picks


def _picked_in_one_pass(
    values: Values, carry: Values | None, total: Values, loop: Callable[..., int]
) -> tuple[int, list[_Pick]]:
    """Do what `_with_decayed` and `_picked` do, by one compiled `loop` over all whole chunks."""
    assert values.ndim == 1, "codecs take flat arrays"
    assert values.dtype == np.float32, f"codecs take float32, not {values.dtype}"
    assert carry is None or carry.shape == values.shape, "a carry belongs to one fragment"
    whole = values.size - values.size % CHUNK
    places = np.empty((whole // CHUNK, KEPT_PER_CHUNK), dtype=np.int64)
    old = np.zeros_like(values) if carry is None else carry
    bits = loop(np.ascontiguousarray(values[:whole]), old[:whole], BETA, total[:whole], places, CHUNK)
    # The bits of NaN and infinity are larger than those of any number.
    if bits > int(MAGNITUDE_MAX.view(np.int32)):
        raise unsound("the contribution with its carry")
    largest = np.array([bits], dtype=np.int32).view(np.float32)[0]
    rest = _with_decayed(values[whole:], None if carry is None else carry[whole:], total[whole:])
    exponent, picks = _picked(rest)
    picks = [_Pick(pick.places + whole, pick.values) for pick in picks]
    if largest:
        own = int(np.clip(np.frexp(largest)[1], _EXPONENT_MIN, _EXPONENT_MAX))
        exponent = max(own, exponent) if picks and bool(rest.any()) else own
    return exponent, [_Pick(places, total[places]), *picks]


def _largest(magnitudes: _Grid, count: int) -> tuple[_Indices, np.float32]:
    """Return the columns of each row's `count` largest, ascending, and the largest of all; of equals the first win.

    The maxima of a row's groups of eight are elements of it, so the `count`-th largest of them is no more than the
    `count`-th largest of all: whatever is smaller is out. The few candidates left are then cut exactly. numpy's
    partition may order equals differently on unlike processors, so only values are taken from it.
    """
    rows, width = magnitudes.shape
    groups = width // _GROUP
    bounds = magnitudes
    if width % _GROUP == 0 and groups > count:
        bounds = magnitudes.reshape(rows, _GROUP, groups).max(axis=1)
    top = np.partition(bounds, bounds.shape[1] - count, axis=1)[:, bounds.shape[1] - count :]
    peak = top.max(initial=np.float32(0))
    candidates = np.flatnonzero(magnitudes >= top[:, :1])
    row_of = candidates // width
    found = magnitudes.reshape(-1)[candidates]
    per_row = np.bincount(row_of, minlength=rows)
    if not bool((per_row >= count).all()):  # a NaN is larger than nothing, also not than itself
        raise unsound("the contribution with its carry")
    if candidates.size > rows * count:
        column = np.arange(candidates.size) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        table = np.full((rows, int(per_row.max())), -1, dtype=np.float32)
        table[row_of, column] = found
        threshold = np.partition(table, table.shape[1] - count, axis=1)[:, table.shape[1] - count]
        above = found > threshold[row_of]
        equal = found == threshold[row_of]
        room = count - np.bincount(row_of[above], minlength=rows)
        before = np.cumsum(equal) - equal  # equals before this one, over all rows
        first = np.concatenate([[0], np.cumsum(np.bincount(row_of[equal], minlength=rows))[:-1]])
        chosen = above | (equal & (before - first[row_of] < room[row_of]))
        candidates = candidates[chosen]
    return candidates.reshape(rows, count) % width, peak


def _two_levels(magnitudes: _Grid, exponent: int) -> tuple[_Indices, _Grid, _Indices]:
    """Return each row's two magnitudes, as scales and in units of 2**exponent, and which one each value takes.

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
    scales = _scales(np.stack([low, np.maximum(low, high)], axis=1))
    levels = _levels_of(scales)
    middle = (levels[:, 0].astype(np.float64) + levels[:, 1]) / 2
    return scales, levels, (scaled > middle[:, None]).astype(np.int64)


def _scales(levels: npt.NDArray[np.float64]) -> _Indices:
    """Return exponent and mantissa of each level (0 to 1), rounded to the nearest: (low's two, high's two) a row."""
    fraction, power = np.frexp(levels)
    steps = np.rint(np.ldexp(fraction, MANTISSA_BITS + 1)).astype(np.int64)
    exponents = -power.astype(np.int64)
    full = steps == 2 << MANTISSA_BITS
    exponents, steps = exponents - full, np.where(full, 1 << MANTISSA_BITS, steps)
    # The largest magnitude may round up to one, which has no scale.
    steps = np.where(exponents < 0, (2 << MANTISSA_BITS) - 1, steps)
    exponents = np.maximum(exponents, 0)
    is_zero = (levels == 0) | (exponents >= EXPONENT_ZERO)
    mantissas = np.where(is_zero, 0, steps - (1 << MANTISSA_BITS))
    exponents = np.where(is_zero, EXPONENT_ZERO, exponents)
    return np.stack([exponents, mantissas], axis=2).reshape(-1, 4)


def _levels_of(scales: _Indices) -> _Grid:
    """Return the two magnitudes of each row of `scales`."""
    pairs = scales.reshape(-1, 2, 2)
    steps = np.where(pairs[..., 0] == EXPONENT_ZERO, 0, pairs[..., 1] + (1 << MANTISSA_BITS)).astype(np.float32)
    levels: _Grid = np.ldexp(steps, -pairs[..., 0] - MANTISSA_BITS - 1).astype(np.float32)
    return levels


def _joined(parts: list[_Indices]) -> _Indices:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _joined_values(picks: list[_Pick]) -> Values:
    return np.concatenate([np.zeros(0, np.float32), *(pick.values.reshape(-1) for pick in picks)])
