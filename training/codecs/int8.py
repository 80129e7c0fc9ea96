"""Eight bits an element with one scale per block of 1,024; the rounding error is carried on.

Rounding is to nearest, ties to even: deterministic, and with the carry as unbiased over rounds
as stochastic rounding without its random numbers.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from training.codecs.framing import HEADER, Values, body, exact_length, header, with_carry
from training.errors import CodecError

# The block size of published int8 pseudo-gradients is 1,024 to 4,096; the smaller keeps one
# outlier from flattening more than a thousand neighbours, for 0.4 % more bytes.
BLOCK: Final = 1024
_LEVELS: Final = np.float32(127)
# Below the smallest normal number a scale loses bits; such a block waits in the carry.
_SCALE_MIN: Final = np.finfo(np.float32).tiny
_SCALE_MAX: Final = np.float32(2.0**100)


class Int8:
    """Block-scaled int8. Error per element: at most half of (block's largest magnitude / 127)."""

    name: Final = "int8"
    magic: Final = b"HI81"

    def encode(self, values: Values, carry: Values | None) -> tuple[bytes, Values]:
        """Return the payload of `values + carry` and what rounding left of it."""
        total = with_carry(values, carry)
        blocks = -(-total.size // BLOCK)
        padded = np.zeros(blocks * BLOCK, dtype=np.float32)
        padded[: total.size] = total
        grid = padded.reshape(blocks, BLOCK)
        scales = np.max(np.abs(grid), axis=1, initial=np.float32(0)) / _LEVELS
        scales[scales < _SCALE_MIN] = 0
        divisors = np.where(scales > 0, scales, np.float32(np.inf))
        steps = np.clip(np.rint(grid / divisors[:, None]), -_LEVELS, _LEVELS).astype(np.int8)
        payload = (
            header(self.magic, total.size) + scales.astype("<f4").tobytes() + steps.reshape(-1)[: total.size].tobytes()
        )
        return payload, total - self.decode(payload, total.size)

    def decode(self, payload: bytes, elements: int) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        view = body(payload, self.magic, elements)
        blocks = -(-elements // BLOCK)
        exact_length(view, 4 * blocks + elements)
        scales = np.frombuffer(view[: 4 * blocks], dtype="<f4").astype(np.float32)
        if not bool(np.all((scales >= 0) & (scales <= _SCALE_MAX))):
            message = "a block's scale is NaN, negative or huge; the payload is damaged or forged"
            raise CodecError(message)
        steps = np.frombuffer(view[4 * blocks :], dtype=np.int8)
        values = steps.astype(np.float32)
        values *= np.repeat(scales, BLOCK)[:elements]
        return values

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        return HEADER.size + 4 * -(-elements // BLOCK) + elements
