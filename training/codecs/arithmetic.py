"""Adaptive binary arithmetic coding of what `topk2` says: each chunk's two magnitudes, and each kept value's place and magnitude.

A range coder (as in LZMA: 32-bit range, carry by a cache byte) whose probabilities learn from what both ends have seen, in
integers alone, so that every machine reads the same. Numbers are written as *walks* down binary trees, highest bit first:

    for each chunk    low magnitude: exponent less that of the chunk before, mod 32 (5 bits), mantissa (4, not modelled);
                      high magnitude: how much smaller its exponent is than the low one's (5), mantissa (4)
    for each value    gap + 1 since the value before in the chunk: its length in bits (4), under the lengths of the two gaps
                      before; its bits below the highest (the first two modelled); low or high (1), under the value before's

Kept positions of real contributions cluster, since rows and columns of a matrix move together: that is what the
contexts learn. At the start the gaps are taken for geometric with mean 63, as if one in 64 were kept by chance. A stream has one form: the
encoder ends on the first multiple of 2**24, whose three zero bytes are left out, and the decoder checks it.

The two loops are plain Python over lists, and the same functions compiled by numba over arrays (`compiled`).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from training.codecs.compiled import kernels
from training.errors import CodecError

MANTISSA_BITS: Final = 4
EXPONENT_ZERO: Final = 31
"""The exponent that means zero; others are 2**-exponent."""

# The kinds of walks, in the order in which they come.
_LOW_EXPONENT, _LOW_MANTISSA, _HIGH_EXPONENT, _HIGH_MANTISSA, _LENGTH, _REST, _LEVEL = range(7)
_EXPONENT_BITS: Final = 5
_LENGTH_BITS: Final = 4
_LENGTHS: Final = 13
"""A chunk of 4,096 has gaps + 1 of at most 13 bits."""
_CONTEXTS: Final = 4
# Where each kind's probabilities lie; a tree of n leaves has its nodes at 1 to n - 1.
_HIGH_AT: Final = 32
_LENGTH_AT: Final = 64
_REST_AT: Final = _LENGTH_AT + _CONTEXTS * 16
_LEVEL_AT: Final = _REST_AT + _LENGTHS * 4
_STATES: Final = _LEVEL_AT + 4
_ONE: Final = 1 << 16
_RAREST: Final = 64
_MEMORY: Final = 250
"""How many decisions a probability remembers at most: found on contributions of real text, flat around it."""
_TOP: Final = 1 << 24
_WORD: Final = 0xFFFFFFFF
_TAIL: Final = 3
"""Zero bytes at the end of a stream, which are not sent."""
_BAD_GAP, _BAD_SCALE, _BAD_END = -1, -2, -3
_MESSAGES: Final = {
    _BAD_GAP: "a kept position lies outside its chunk",
    _BAD_SCALE: "a chunk's magnitudes are not two numbers in order",
    _BAD_END: "the stream of positions does not end where its values do",
}

Integers = npt.NDArray[np.int64]


def stream_bytes_max(chunks: int, count: int) -> int:
    """Return the most bytes that `count` values of `chunks` chunks take: a modelled bit costs at most 11, another 1."""
    return (
        16
        + (chunks * (2 * _EXPONENT_BITS * 11 + 2 * MANTISSA_BITS) + count * ((_LENGTH_BITS + 3) * 11 + _LENGTHS)) // 8
    )


def encode(gaps: Integers, high: Integers, scales: Integers, kept: int, *, compiled: bool) -> bytes:
    """Return the stream of the values' `gaps` (from the value before, or from the chunk's start) and levels.

    `scales` has a row (low exponent, low mantissa, high exponent, high mantissa) for each chunk, of `kept` values
    each; the last chunk may have fewer.
    """
    probabilities, memory = _start()
    size = stream_bytes_max(len(scales), gaps.size)
    if compiled and (loops := kernels()):
        out = np.empty(size, dtype=np.uint8)
        args = (np.array(probabilities), np.array(memory), out)
        written = loops["write_stream"](gaps, high, scales.reshape(-1), kept, *args)
        return out[:written].tobytes()
    plain = bytearray(size)
    lists = gaps.tolist(), high.tolist(), scales.reshape(-1).tolist()
    written = write_stream(*lists, kept, [*probabilities], [*memory], plain)
    return bytes(plain[:written])


def decode(
    stream: memoryview, widths: Integers, counts: Integers, *, compiled: bool
) -> tuple[Integers, Integers, Integers]:
    """Return gaps, levels and scales of chunks of these `widths`, which keep `counts` values. Raises CodecError."""
    total = int(counts.sum())
    probabilities, memory = _start()
    gaps, high, scales = (np.zeros(size, dtype=np.int64) for size in (total, total, 4 * widths.size))
    if compiled and (loops := kernels()):
        args = (np.array(probabilities), np.array(memory), gaps, high, scales)
        fault = loops["read_stream"](np.frombuffer(stream, dtype=np.uint8), widths, counts, *args)
    else:
        lists = [0] * total, [0] * total, [0] * (4 * widths.size)
        fault = read_stream(stream, widths.tolist(), counts.tolist(), [*probabilities], [*memory], *lists)
        gaps, high, scales = (np.array(each, dtype=np.int64) for each in lists)
    if fault:
        raise CodecError(f"{_MESSAGES[fault]}; the payload is damaged or forged")
    return gaps, high, scales.reshape(-1, 4)


@cache
def _start() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first probabilities (of a 0, in 65,536ths) and how many decisions each of them counts for."""
    weights, weight = [], 1 << 40
    for _ in range(4096):
        weights.append(weight)
        weight = weight * 63 // 64
    of_length = [sum(weights[(1 << length) - 1 : (2 << length) - 1]) for length in range(16)]
    probabilities, memory = [_ONE >> 1] * _STATES, [1] * _STATES
    for context in range(_CONTEXTS):
        _plant(probabilities, memory, _LENGTH_AT + 16 * context, 16, of_length)
    for length in range(1, _LENGTHS):
        rest = weights[(1 << length) - 1 : (2 << length) - 1]
        _plant(probabilities, memory, _REST_AT + 4 * length, 4 if length > 1 else 2, rest)
    for state in range(_LEVEL_AT, _STATES):
        probabilities[state], memory[state] = 3 * _ONE // 4, 20
    return tuple(probabilities), tuple(memory)


def _plant(probabilities: list[int], memory: list[int], at: int, leaves: int, weights: list[int]) -> None:
    """Set a tree's probabilities to what the leaves' `weights` say."""
    for node in range(1, leaves):
        span = len(weights) >> (node.bit_length() - 1)
        first = (node - (1 << (node.bit_length() - 1))) * span
        zero, both = sum(weights[first : first + span // 2]), sum(weights[first : first + span])
        chance = _ONE * zero // both if both else _ONE >> 1
        probabilities[at + node], memory[at + node] = min(max(chance, _RAREST), _ONE - _RAREST), 20


def write_stream(gaps: Any, high: Any, scales: Any, kept: int, probabilities: Any, memory: Any, out: Any) -> int:
    """Write everything to `out` and return the length."""
    low, span, cache, pending, length = 0, _WORD, 0, 0, 0
    started = False
    before, longer, shorter, level = EXPONENT_ZERO, 6, 6, 0
    chunk = place = in_chunk = 0
    kind = _LOW_EXPONENT
    values = len(gaps)
    while place < values:
        # What to write next: a number of `depth` bits, those above `modelled` nodes by the tree at `at`.
        if kind == _LOW_EXPONENT:
            number, depth, at, modelled = (scales[4 * chunk] - before) & 31, _EXPONENT_BITS, 0, 32
        elif kind == _LOW_MANTISSA:
            number, depth, at, modelled = scales[4 * chunk + 1], MANTISSA_BITS, 0, 0
        elif kind == _HIGH_EXPONENT:
            number, depth, at, modelled = scales[4 * chunk] - scales[4 * chunk + 2], _EXPONENT_BITS, _HIGH_AT, 32
        elif kind == _HIGH_MANTISSA:
            number, depth, at, modelled = scales[4 * chunk + 3], MANTISSA_BITS, 0, 0
        elif kind == _LENGTH:
            number = 0
            while (gaps[place] + 1) >> (number + 1):
                number += 1
            both = longer + shorter
            context = 0 if both <= 7 else 1 if both <= 9 else 2 if both <= 11 else 3
            longer, shorter = shorter, number
            depth, at, modelled = _LENGTH_BITS, _LENGTH_AT + 16 * context, 16
        elif kind == _REST:
            number, depth, at, modelled = gaps[place] + 1 - (1 << shorter), shorter, _REST_AT + 4 * shorter, 4
        else:
            number, depth, at, modelled = high[place], 1, _LEVEL_AT + 2 * level, 2
            level = number
        node = 1
        for shift in range(depth - 1, -1, -1):
            bit = (number >> shift) & 1
            if node < modelled:
                chance, count = probabilities[at + node], memory[at + node]
                bound = (span >> 12) * (chance >> 4)
                if bit:
                    low += bound
                    span -= bound
                    chance -= chance // (count + 2)
                else:
                    span = bound
                    chance += (_ONE - chance) // (count + 2)
                probabilities[at + node] = min(max(chance, _RAREST), _ONE - _RAREST)
                memory[at + node] = min(count + 1, _MEMORY)
            else:
                span >>= 1
                if bit:
                    low += span
            node = min(2 * node + bit, 1 << 20)
            while span < _TOP:
                span <<= 8
                if low < 0xFF000000 or low > _WORD:
                    carry = low >> 32
                    if started:
                        out[length] = (cache + carry) & 0xFF
                        length += 1
                    for _ in range(pending):
                        out[length] = (0xFF + carry) & 0xFF
                        length += 1
                    started, pending, cache = True, 0, (low >> 24) & 0xFF
                else:
                    pending += 1
                low = (low << 8) & _WORD
        if kind == _LOW_EXPONENT:
            before = scales[4 * chunk]
            kind = _HIGH_EXPONENT if before == EXPONENT_ZERO else _LOW_MANTISSA
        elif kind == _HIGH_EXPONENT:
            kind = _LENGTH if scales[4 * chunk + 2] == EXPONENT_ZERO else _HIGH_MANTISSA
        elif kind < _LEVEL:
            kind += 1
        else:
            place += 1
            in_chunk += 1
            kind = _LENGTH
            if in_chunk == kept:
                in_chunk, chunk, kind = 0, chunk + 1, _LOW_EXPONENT
    # The first multiple of 2**24 from here on, of which the highest byte alone is not zero.
    low = (low + _TOP - 1) >> 24
    if started:
        out[length] = (cache + (low >> 8)) & 0xFF
        length += 1
    for _ in range(pending):
        out[length] = (0xFF + (low >> 8)) & 0xFF
        length += 1
    out[length] = low & 0xFF
    return length + 1


def read_stream(
    stream: Any, widths: Any, counts: Any, probabilities: Any, memory: Any, gaps: Any, high: Any, scales: Any
) -> int:
    """Fill `gaps`, `high` and `scales` from `stream`; return 0, or what is wrong with it."""
    size = len(stream)
    position, code, span = 0, 0, _WORD
    while position < 4:
        code = (code << 8) | (int(stream[position]) if position < size else 0)
        position += 1
    before, longer, shorter, level = EXPONENT_ZERO, 6, 6, 0
    chunk = place = in_chunk = reached = 0
    kind = _LOW_EXPONENT
    values = len(gaps)
    while place < values:
        if kind == _LOW_EXPONENT:
            depth, at, modelled = _EXPONENT_BITS, 0, 32
        elif kind == _HIGH_EXPONENT:
            depth, at, modelled = _EXPONENT_BITS, _HIGH_AT, 32
        elif kind in {_LOW_MANTISSA, _HIGH_MANTISSA}:
            depth, at, modelled = MANTISSA_BITS, 0, 0
        elif kind == _LENGTH:
            both = longer + shorter
            context = 0 if both <= 7 else 1 if both <= 9 else 2 if both <= 11 else 3
            depth, at, modelled = _LENGTH_BITS, _LENGTH_AT + 16 * context, 16
        elif kind == _REST:
            depth, at, modelled = shorter, _REST_AT + 4 * shorter, 4
        else:
            depth, at, modelled = 1, _LEVEL_AT + 2 * level, 2
        node, number = 1, 0
        for _ in range(depth):
            if node < modelled:
                chance, count = probabilities[at + node], memory[at + node]
                bound = (span >> 12) * (chance >> 4)
                if code >= bound:
                    bit = 1
                    code -= bound
                    span -= bound
                    chance -= chance // (count + 2)
                else:
                    bit = 0
                    span = bound
                    chance += (_ONE - chance) // (count + 2)
                probabilities[at + node] = min(max(chance, _RAREST), _ONE - _RAREST)
                memory[at + node] = min(count + 1, _MEMORY)
            else:
                span >>= 1
                bit = 1 if code >= span else 0
                if bit:
                    code -= span
            node = min(2 * node + bit, 1 << 20)
            number = 2 * number + bit
            while span < _TOP:
                span <<= 8
                code = (code << 8) | (int(stream[position]) if position < size else 0)
                position += 1
        if position > size + _TAIL:
            return _BAD_END
        if kind == _LOW_EXPONENT:
            before = (before + number) & 31
            scales[4 * chunk] = before
            kind = _HIGH_EXPONENT if before == EXPONENT_ZERO else _LOW_MANTISSA
        elif kind == _LOW_MANTISSA:
            scales[4 * chunk + 1] = number
            kind = _HIGH_EXPONENT
        elif kind == _HIGH_EXPONENT:
            if number > before:
                return _BAD_SCALE
            scales[4 * chunk + 2] = before - number
            kind = _LENGTH if before - number == EXPONENT_ZERO else _HIGH_MANTISSA
        elif kind == _HIGH_MANTISSA:
            if scales[4 * chunk + 2] == before and number < scales[4 * chunk + 1]:
                return _BAD_SCALE
            scales[4 * chunk + 3] = number
            kind = _LENGTH
        elif kind == _LENGTH:
            if number >= _LENGTHS:
                return _BAD_GAP
            longer, shorter = shorter, number
            kind = _REST
        elif kind == _REST:
            gaps[place] = (1 << shorter) + number - 1
            reached += gaps[place] + 1
            if reached > widths[chunk]:
                return _BAD_GAP
            kind = _LEVEL
        else:
            high[place] = level = number
            place += 1
            in_chunk += 1
            kind = _LENGTH
            if in_chunk == counts[chunk]:
                in_chunk, reached, chunk, kind = 0, 0, chunk + 1, _LOW_EXPONENT
    # One stream for one content: it ends on the first multiple of 2**24, and nothing follows.
    return 0 if code < _TOP and position == size + _TAIL else _BAD_END
