"""Golomb-Rice coding of the gaps between kept positions, in numpy without a loop per value.

A gap g is split into quotient g >> 5, in unary, and remainder g & 31, in five bits. With one of
64 elements kept the gaps are about geometric with mean 64, for which parameter 5 costs 7.5 bits
(the entropy is 7.43). Quotients and remainders lie in separate streams: unary codes end in a one,
so the distances between ones *are* the quotients, and both streams decode as whole arrays.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from training.errors import CodecError

PARAMETER: Final = 5
_REMAINDER_MASK: Final = (1 << PARAMETER) - 1

Gaps = npt.NDArray[np.int64]


def unary_bits_max(count: int, span: int) -> int:
    """Return the most bits that the quotients of `count` gaps need when the gaps sum to at most `span`."""
    return count + (span >> PARAMETER)


def encode_gaps(gaps: Gaps) -> tuple[bytes, bytes]:
    """Return the remainder stream and the unary stream of `gaps` (each at least 0)."""
    remainders = gaps & _REMAINDER_MASK
    ends = np.cumsum((gaps >> PARAMETER) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if ends.size else 0, dtype=np.uint8)
    unary[ends] = 1
    return pack(remainders, PARAMETER), np.packbits(unary).tobytes()


def decode_gaps(remainders: memoryview, unary: memoryview, count: int) -> Gaps:
    """Return the `count` gaps. Raises CodecError unless the streams hold exactly that many."""
    bits = np.unpackbits(np.frombuffer(unary, dtype=np.uint8))
    ends = np.flatnonzero(bits.view(np.bool_))
    if ends.size != count:
        message = f"the unary stream ends {ends.size} gaps where {count} are due; the payload is damaged or forged"
        raise CodecError(message)
    if bits.size != 8 * -(-(int(ends[-1]) + 1 if count else 0) // 8):
        message = "the unary stream goes on after its last gap; the payload is damaged or forged"
        raise CodecError(message)
    quotients = np.diff(ends, prepend=-1) - 1
    return (quotients << PARAMETER) | unpack(remainders, PARAMETER, count)


def packed_bytes(count: int, width: int) -> int:
    """Return the bytes of `count` numbers of `width` bits."""
    return -(-count * width // 8)


def pack(numbers: npt.NDArray[np.int64], width: int) -> bytes:
    """Return `numbers`, each below 2**width with width at most 8, as `width` bits each."""
    bits = np.unpackbits(numbers.astype(np.uint8)[:, None], axis=1)[:, 8 - width :]
    return np.packbits(bits.reshape(-1)).tobytes()


def unpack(stream: memoryview, width: int, count: int) -> npt.NDArray[np.int64]:
    """Return `count` numbers of `width` bits. Raises CodecError where the padding is not zero."""
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))
    if bits[count * width :].any():
        message = "a stream's padding is not zero; the payload is damaged or forged"
        raise CodecError(message)
    grid = np.zeros((count, 8), dtype=np.uint8)
    grid[:, 8 - width :] = bits[: count * width].reshape(count, width)
    return np.packbits(grid, axis=1).reshape(-1).astype(np.int64)
