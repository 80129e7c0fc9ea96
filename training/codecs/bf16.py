"""Two bytes an element: the upper half of a float32, rounded to nearest, ties to even."""

from __future__ import annotations

from typing import Final

import numpy as np

from training.codecs.framing import (
    HEADER,
    NO_HINT,
    Hint,
    Values,
    body,
    checked,
    exact_length,
    header,
    output,
    with_carry,
)

_HALF_LESS_ONE: Final = np.uint32(0x7FFF)


class Bf16:
    """bfloat16. Error per element: at most its 256th (half a unit of 8 significant bits), or 2**-134 near zero."""

    name: Final = "bf16"
    magic: Final = b"HBF1"

    def encode(
        self, values: Values, carry: Values | None, hint: Hint = NO_HINT, out: Values | None = None
    ) -> tuple[bytes, Values]:
        """Return the payload of `values + carry` and what rounding left of it."""
        total = with_carry(values, carry)
        halves = rounded(total)
        left = output(out, total.size)
        np.subtract(total, widened(halves), out=left)
        return header(self.magic, total.size) + halves.astype("<u2").tobytes(), left

    def decode(self, payload: bytes, elements: int, out: Values | None = None) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        view = body(payload, self.magic, elements)
        exact_length(view, 2 * elements)
        values = output(out, elements)
        values[:] = widened(np.frombuffer(view, dtype="<u2").astype(np.uint16))
        return checked(values, "the payload")

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        return HEADER.size + 2 * elements


def rounded(values: Values) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """Return the nearest bfloat16 of finite values, as their bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + (odd + _HALF_LESS_ONE)) >> np.uint32(16)).astype(np.uint16)


def widened(halves: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> Values:
    """Return bfloat16 bits as float32: exact."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
