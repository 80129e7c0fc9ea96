"""The lossless codec: float32, little endian. Its carry is empty unless a round is missed."""

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


class Fp32:
    """Four bytes an element, no error."""

    name: Final = "fp32"
    magic: Final = b"HFP1"

    def encode(
        self, values: Values, carry: Values | None, hint: Hint = NO_HINT, out: Values | None = None
    ) -> tuple[bytes, Values]:
        """Return the payload of `values + carry` and the carry that is left: zeros."""
        total = with_carry(values, carry)
        payload = header(self.magic, total.size) + total.astype("<f4").tobytes()
        left = output(out, total.size)
        left[:] = 0
        return payload, left

    def decode(self, payload: bytes, elements: int, out: Values | None = None) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        view = body(payload, self.magic, elements)
        exact_length(view, 4 * elements)
        values = output(out, elements)
        values[:] = np.frombuffer(view, dtype="<f4")
        return checked(values, "the payload")

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        return HEADER.size + 4 * elements
