"""Low rank: of each matrix a few outer products, found by power iteration; the rest waits in the carry.

PowerSGD (arXiv 1905.13727), on pseudo-gradients. Its all-reduce of P and then of Q would cost two round trips
between sites; here each site sends P and Q of its own matrix, and the merge averages what they decode to. Two power
iterations from a fixed start take the place of a Q kept from the round before, which a joiner would not have.

Body: number of matrices (u16) · for each rows, columns (u32), rank (u8) · for each P (rows x rank), then Q
(columns x rank), column by column as bfloat16. Rank 0 means the matrix itself, as bfloat16: vectors, and whatever two thin factors would
not make half as small. The decoder multiplies element by element in float32, in rank order: a library's matrix product
adds in an order of its own.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from training.codecs.bf16 import rounded, widened
from training.codecs.framing import HEADER, NO_HINT, Hint, Values, body, checked, header, output, with_carry
from training.codecs.int4 import random_bytes
from training.errors import CodecError

RANK: Final = 4
MATRICES_MAX: Final = 4096
_ITERATIONS: Final = 2
_COUNT: Final = struct.Struct("<H")
_MATRIX: Final = struct.Struct("<IIB")
# The columns of P have length one; bfloat16 adds less than a 256th.
_P_MAX: Final = np.float32(2)
_Q_MAX: Final = np.float32(2.0**115)

Shapes = tuple[tuple[int, int], ...]


class LowRank:
    """Rank-4 factors of each matrix. The squared error is what its other singular values hold; no bound per element."""

    name: Final = "lowrank"
    magic: Final = b"HLR1"

    def encode(
        self, values: Values, carry: Values | None, hint: Hint = NO_HINT, out: Values | None = None
    ) -> tuple[bytes, Values]:
        """Return the payload of `values + carry`, whose matrices are the hint's shapes, and what it leaves out."""
        total = with_carry(values, carry)
        shapes = hint.shapes if 0 < len(hint.shapes) <= MATRICES_MAX else near_square(total.size)
        assert sum(rows * columns for rows, columns in shapes) == total.size, "the shapes are those of the values"
        table, parts, start = [], [], 0
        for rows, columns in shapes:
            matrix = total[start : start + rows * columns].reshape(rows, columns)
            start += matrix.size
            rank = _rank(rows, columns)
            table.append(_MATRIX.pack(rows, columns, rank))
            parts += [_halves(factor) for factor in _factors(matrix, rank)] if rank else [_halves(matrix)]
        payload = b"".join((header(self.magic, total.size), _COUNT.pack(len(shapes)), *table, *parts))
        decoded = self.decode(payload, total.size)
        return payload, np.subtract(total, decoded, out=output(out, total.size))

    def decode(self, payload: bytes, elements: int, out: Values | None = None) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        view = body(payload, self.magic, elements)
        shapes = _shapes(view, elements)
        values = output(out, elements)
        at, start = _COUNT.size + len(shapes) * _MATRIX.size, 0
        for rows, columns, rank in shapes:
            matrix = values[start : start + rows * columns].reshape(rows, columns)
            start += rows * columns
            taken = (rows + columns) * rank if rank else rows * columns
            numbers = widened(np.frombuffer(view[at : at + 2 * taken], dtype="<u2").astype(np.uint16))
            at += 2 * taken
            if rank:
                _multiply(
                    numbers[: rows * rank].reshape(rank, rows), numbers[rows * rank :].reshape(rank, columns), matrix
                )
            else:
                matrix[:] = numbers.reshape(rows, columns)
        return checked(values, "the payload")

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        return HEADER.size + _COUNT.size + _MATRIX.size * min(MATRICES_MAX, elements) + 2 * elements


def near_square(elements: int) -> Shapes:
    """Return the shapes for values of which no matrix is known: one as square as can be, and the rest as a row."""
    side = math.isqrt(elements)
    if side == 0:
        return ()
    columns = elements // side
    rest = elements - side * columns
    return ((side, columns), (1, rest)) if rest else ((side, columns),)


def _rank(rows: int, columns: int) -> int:
    """Return 4 where two factors of that rank take at most half of the matrix, else 0."""
    return RANK if 2 * RANK * (rows + columns) <= rows * columns else 0


def _shapes(view: memoryview, elements: int) -> list[tuple[int, int, int]]:
    """Return rows, columns and rank of each matrix. Raises CodecError unless they make `elements` and fill `view`."""
    message = f"the payload's matrices are not {elements} elements in {len(view)} bytes; it is damaged or forged"
    if len(view) < _COUNT.size:
        raise CodecError(message)
    (count,) = _COUNT.unpack_from(view)
    table = _COUNT.size + count * _MATRIX.size
    if count > min(MATRICES_MAX, elements) or len(view) < table:
        raise CodecError(message)
    shapes: list[tuple[int, int, int]] = list(_MATRIX.iter_unpack(view[_COUNT.size : table]))
    if any(rows == 0 or columns == 0 or rank not in {0, _rank(rows, columns)} for rows, columns, rank in shapes):
        raise CodecError(message)
    numbers = sum((rows + columns) * rank if rank else rows * columns for rows, columns, rank in shapes)
    if sum(rows * columns for rows, columns, _ in shapes) != elements or len(view) != table + 2 * numbers:
        raise CodecError(message)
    return shapes


def _multiply(p: Values, q: Values, matrix: Values) -> None:
    """Write the sum over the rank of p's row times q's row to `matrix`. Raises CodecError for unsound factors."""
    if not (bool((np.abs(p) <= _P_MAX).all()) and bool((np.abs(q) <= _Q_MAX).all())):
        message = "a factor is NaN or huge; the payload is damaged or forged"
        raise CodecError(message)
    np.multiply(p[0][:, None], q[0][None, :], out=matrix)
    for left, right in zip(p[1:], q[1:], strict=True):
        matrix += left[:, None] * right[None, :]


def _factors(matrix: Values, rank: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return P (rank x rows) and Q (rank x columns) with P's rows orthonormal."""
    scale = float(np.abs(matrix).max()) or 1.0
    scaled = matrix / np.float32(scale) if scale >= np.finfo(np.float32).tiny else matrix * np.float32(0)
    start = random_bytes(-(-matrix.shape[1] * rank // 4) * 4, 0, 0)[: matrix.shape[1] * rank]
    q = (start.astype(np.float32) - np.float32(127.5)).reshape(matrix.shape[1], rank)
    for _ in range(_ITERATIONS):
        p = np.linalg.qr((scaled @ q).astype(np.float64))[0].astype(np.float32)
        q = scaled.T @ p
    return p.T, (q * np.float32(scale)).T


def _halves(values: npt.NDArray[Any]) -> bytes:
    return rounded(np.ascontiguousarray(values, dtype=np.float32)).astype("<u2").tobytes()
