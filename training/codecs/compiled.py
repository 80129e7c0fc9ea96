"""int8, int4 and the choice of the largest in one pass over memory, where numba is installed; the same bits as the plain code.

The plain codecs (`blocks`) pass over a tile some ten times, which is the best that numpy can do. Compiled, a block is
read once, held in the first cache and written once. Nothing depends on it: without numba, with HANSA_COMPILE=0 or for small
arrays the plain code runs, and a test holds the two together byte by byte. Nothing is fused or reordered (fastmath is off):
each operation rounds as it does in numpy.

The loops are written for the vectoriser: over slices that start at 0, maxima as integers (the bits of non-negative floats are
in their order), rounding to nearest by adding and subtracting 1.5 * 2**23.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Final

import numpy as np

# Compiling takes seconds, once on a machine: only contributions of some size are worth it.
ELEMENTS_MIN: Final = 1 << 18

_ROUNDER: Final = np.float32(12_582_912)
_MAGNITUDE_BITS: Final = np.int32(0x7FFFFFFF)
_TINY: Final = np.finfo(np.float32).tiny

Kernel = Callable[..., Any]


@cache
def kernels() -> dict[str, Kernel]:
    """Return the compiled loops by name, none where they are not wanted or cannot be had."""
    if os.environ.get("HANSA_COMPILE") == "0" or find_spec("numba") is None:
        return {}
    from training.codecs import arithmetic  # noqa: PLC0415 - which asks for its loops here

    loops: dict[str, Kernel] = {
        "encode_int8": _encode_int8,
        "decode_int8": _decode_int8,
        "encode_int4": _encode_int4,
        "decode_int4": _decode_int4,
        "select": _select,
        "write_stream": arithmetic.write_stream,
        "read_stream": arithmetic.read_stream,
    }
    return {name: _compiled(loop) for name, loop in loops.items()}


def _compiled(loop: Kernel) -> Kernel:
    import numba  # noqa: PLC0415 - half a second and 100 MB, which most processes are spared

    njit: Any = numba.njit
    try:
        compiled: Kernel = njit(cache=True, fastmath=False, error_model="numpy")(loop)
    except RuntimeError:  # nowhere to keep the result: compile it in each process
        compiled = njit(fastmath=False, error_model="numpy")(loop)
    return compiled


def _encode_int8(  # noqa: PLR0917 - arrays and a length, as a loop takes them
    values: Any,  # noqa: ANN401 - arrays as numba takes them
    carry: Any,  # noqa: ANN401
    left: Any,  # noqa: ANN401
    scales: Any,  # noqa: ANN401
    codes: Any,  # noqa: ANN401
    block: int,
) -> int:
    """Fill `left`, `scales` and `codes` (int8); return the bits of the largest magnitude."""
    total = np.empty(block, np.float32)
    bits = total.view(np.int32)
    peak = np.empty(1, np.int32)
    largest = np.int32(0)
    elements = values.size
    for number in range((elements + block - 1) // block):
        start = number * block
        stop = min(elements, start + block)
        length = stop - start
        v, c, rest, q = values[start:stop], carry[start:stop], left[start:stop], codes[start:stop]
        for i in range(length):
            total[i] = v[i] + c[i]
        top = np.int32(0)
        for i in range(length):
            magnitude = bits[i] & _MAGNITUDE_BITS
            top = max(top, magnitude)
        largest = max(largest, top)
        peak[0] = top
        scale = peak.view(np.float32)[0] / np.float32(127)
        if scale < _TINY:
            scale = np.float32(0)
        divisor = scale if scale > 0 else np.float32(np.inf)
        for i in range(length):
            step = (total[i] / divisor + _ROUNDER) - _ROUNDER
            q[i] = np.int8(np.int32(step))
            rest[i] = total[i] - step * scale
        scales[number] = scale
    return int(largest)


def _decode_int8(codes: Any, scales: Any, out: Any, block: int) -> None:  # noqa: ANN401 - arrays as numba takes them
    """Write the meaning of int8 `codes` to `out`."""
    elements = out.size
    for number in range((elements + block - 1) // block):
        start = number * block
        stop = min(elements, start + block)
        scale = scales[number]
        values, q = out[start:stop], codes[start:stop]
        for i in range(stop - start):
            values[i] = np.float32(q[i]) * scale


def _encode_int4(  # noqa: PLR0917 - one loop, written out for the vectoriser
    values: Any,  # noqa: ANN401 - arrays as numba takes them
    carry: Any,  # noqa: ANN401
    left: Any,  # noqa: ANN401
    scales: Any,  # noqa: ANN401
    packed: Any,  # noqa: ANN401
    block: int,
    low: int,
    high: int,
) -> int:
    """Fill `left`, `scales` and `packed` (half a block's bytes for each block); return the bits of the largest magnitude.

    `low` and `high` are the mixed halves of the key (`int4.random_bytes`).
    """
    total = np.zeros(block, np.float32)
    bits = total.view(np.int32)
    words = np.empty(block // 4, np.uint32)
    drawn = words.view(np.uint8)
    code = np.empty(block, np.uint8)
    peak = np.empty(1, np.int32)
    largest = np.int32(0)
    elements, half = values.size, block // 2
    for number in range((elements + block - 1) // block):
        start = number * block
        stop = min(elements, start + block)
        length = stop - start
        v, c, rest = values[start:stop], carry[start:stop], left[start:stop]
        for i in range(length):
            total[i] = v[i] + c[i]
        for i in range(length, block):
            total[i] = np.float32(0)
        top = np.int32(0)
        for i in range(block):
            magnitude = bits[i] & _MAGNITUDE_BITS
            top = max(top, magnitude)
        largest = max(largest, top)
        peak[0] = top
        scale = peak.view(np.float32)[0] / np.float32(7)
        if scale < _TINY * np.float32(256):
            scale = np.float32(0)
        factor = np.float32(256) / (scale if scale > 0 else np.float32(np.inf))
        first = np.uint32(start // 4)
        for i in range(block // 4):
            word = np.uint32((np.uint32(first + np.uint32(i)) + np.uint32(low)) ^ np.uint32(high))
            word = np.uint32(np.uint32(word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D))
            word = np.uint32(np.uint32(word ^ (word >> np.uint32(15))) * np.uint32(0x846CA68B))
            words[i] = np.uint32(word ^ (word >> np.uint32(16)))
        for i in range(block):
            fixed = (np.int32(total[i] * factor + np.float32(2048.5)) + np.int32(drawn[i])) >> np.int32(8)
            code[i] = np.uint8(min(fixed, np.int32(15)))
        for i in range(length):
            rest[i] = total[i] - np.float32(np.int32(code[i]) - np.int32(8)) * scale
        target = packed[number * half : (number + 1) * half]
        for i in range(half):
            target[i] = np.uint8(code[i] | np.uint8(code[i + half] << np.uint8(4)))
        scales[number] = scale
    return int(largest)


def _decode_int4(packed: Any, scales: Any, out: Any, block: int) -> None:  # noqa: ANN401 - arrays as numba takes them
    """Write the meaning of packed codes to `out`."""
    elements, half = out.size, block // 2
    values = np.empty(block, np.float32)
    for number in range((elements + block - 1) // block):
        start = number * block
        stop = min(elements, start + block)
        scale = scales[number]
        codes = packed[number * half : (number + 1) * half]
        target = out[start:stop]
        for i in range(half):
            values[i] = np.float32(np.int32(codes[i] & np.uint8(15)) - np.int32(8)) * scale
        for i in range(half):
            values[i + half] = np.float32(np.int32(codes[i] >> np.uint8(4)) - np.int32(8)) * scale
        for i in range(stop - start):
            target[i] = values[i]


def _select(  # noqa: C901, PLR0912, PLR0915, PLR0917 - one loop, written out for the vectoriser
    values: Any,  # noqa: ANN401 - arrays as numba takes them
    carry: Any,  # noqa: ANN401
    decay: Any,  # noqa: ANN401
    total: Any,  # noqa: ANN401
    places: Any,  # noqa: ANN401
    chunk: int,
) -> int:
    """Write values + decay * carry to `total`, and to each row of `places` where a chunk's largest magnitudes are.

    Places ascend; of equals the first win. The `kept`-th largest of the maxima of eight is no more than that of all, so
    what is below it is out; both thresholds are found by bisection of the bits. Returns the bits of the largest.
    """
    kept = places.shape[1]
    groups = chunk // 8
    bits_of = np.empty(chunk, np.float32)
    bits = bits_of.view(np.int32)
    maxima = np.empty(groups, np.int32)
    where = np.empty(chunk + 1, np.int32)
    candidates = np.empty(chunk + 1, np.int32)
    largest = np.int32(0)
    for number in range(places.shape[0]):
        start = number * chunk
        v, c, t = values[start : start + chunk], carry[start : start + chunk], total[start : start + chunk]
        for i in range(chunk):
            decayed = decay * c[i]
            t[i] = v[i] + decayed
            bits_of[i] = t[i]
        for i in range(chunk):
            bits[i] &= _MAGNITUDE_BITS
        for i in range(groups):
            maxima[i] = bits[i]
        for part in range(1, 8):
            slab = bits[part * groups : (part + 1) * groups]
            for i in range(groups):
                maxima[i] = max(maxima[i], slab[i])
        top = np.int32(0)
        for i in range(groups):
            top = max(top, maxima[i])
        largest = max(largest, top)
        low, high = np.int64(0), np.int64(top)
        while low < high:
            middle = np.int32((low + high + 1) // 2)
            count = np.int32(0)
            for i in range(groups):
                count += np.int32(maxima[i] >= middle)
            if count >= kept:
                low = np.int64(middle)
            else:
                high = np.int64(middle) - 1
        bound = np.int32(low)
        found = np.int64(0)
        for i in range(chunk):
            where[found] = i
            candidates[found] = bits[i]
            found += np.int64(bits[i] >= bound)
        low, high = np.int64(bound), np.int64(top)
        while low < high:
            middle = np.int32((low + high + 1) // 2)
            count = np.int32(0)
            for i in range(found):
                count += np.int32(candidates[i] >= middle)
            if count >= kept:
                low = np.int64(middle)
            else:
                high = np.int64(middle) - 1
        threshold = np.int32(low)
        room = np.int64(kept)
        for i in range(found):
            room -= np.int64(candidates[i] > threshold)
        row = 0
        for i in range(found):
            equal = candidates[i] == threshold
            if candidates[i] > threshold or (equal and room > 0):
                places[number, row] = start + where[i]
                row += 1
                room -= np.int64(equal)
    return int(largest)
