"""Eight bits an element with one scale per block of 1,024; the rounding error is carried on.

Rounding is to nearest, ties to even: deterministic, and with the carry as unbiased over rounds
as stochastic rounding without its random numbers.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from training.codecs import blocks
from training.codecs.blocks import SCALE_MIN, Codes
from training.codecs.compiled import ELEMENTS_MIN, kernels
from training.codecs.framing import NO_HINT, Hint, Values, output

# The block size of published int8 pseudo-gradients is 1,024 to 4,096; the smaller keeps one
# outlier from flattening more than a thousand neighbours, for 0.4 % more bytes.
BLOCK: Final = 1024
_LEVELS: Final = np.float32(127)


class Int8:
    """Block-scaled int8. Error per element: at most half of (block's largest magnitude / 127)."""

    name: Final = "int8"
    magic: Final = b"HI81"
    block: Final = BLOCK
    bits: Final = 8

    def encode(
        self, values: Values, carry: Values | None, hint: Hint = NO_HINT, out: Values | None = None
    ) -> tuple[bytes, Values]:
        """Return the payload of `values + carry` and what rounding left of it."""
        if values.size >= ELEMENTS_MIN and (loops := kernels()):
            return blocks.encode_in_one_pass(
                self,
                values,
                carry,
                out,
                lambda *arrays: loops["encode_int8"](*arrays[:4], arrays[4].view(np.int8), BLOCK),
            )
        return blocks.encode(self, values, carry, key=hint.key, out=out)

    def decode(self, payload: bytes, elements: int, out: Values | None = None) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        if elements >= ELEMENTS_MIN and (loops := kernels()):
            scales, codes = blocks.opened(self, payload, elements)
            values = output(out, elements)
            loops["decode_int8"](codes.view(np.int8), scales, values, BLOCK)
            return values
        return blocks.decode(self, payload, elements, out)

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        return blocks.size_bytes_max(self, elements)

    def scales(self, total: Values, peaks: Values) -> Values:
        """Return a 127th of each block's largest magnitude."""
        steps = peaks / _LEVELS
        steps[steps < SCALE_MIN] = 0
        return steps

    def pack(self, total: Values, scales: Values, work: Values, *, key: int, first: int) -> Codes:
        """Return the nearest steps. A quotient passes 127 by half a unit in the last place at most: it rounds back."""
        blocks.divided(total, np.where(scales > 0, scales, np.float32(np.inf)), work)
        np.rint(work, out=work)
        steps = work.astype(np.int8)
        blocks.scaled(work, scales, work)
        return steps.view(np.uint8)

    def unpack(self, codes: Codes, scales: Values, work: Values) -> None:
        """Write the steps times their scale."""
        np.copyto(work, codes.view(np.int8))
        blocks.scaled(work, scales, work)
