"""One bit an element: its sign, with one magnitude per block of 1,024. Useless without its carry.

The magnitude is the block's mean, which of all single magnitudes errs least in the squared sense (EF-SignSGD,
arXiv 1901.09847).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from training.codecs import blocks
from training.codecs.blocks import SCALE_MIN, Codes
from training.codecs.framing import NO_HINT, Hint, Values

BLOCK: Final = 1024


class Sign:
    """Scaled signs. Squared error per block of n: |x|^2 - (sum |x|)^2 / n, so below |x|^2; not bounded per element."""

    name: Final = "sign"
    magic: Final = b"HSG1"
    block: Final = BLOCK
    bits: Final = 1

    def encode(
        self, values: Values, carry: Values | None, hint: Hint = NO_HINT, out: Values | None = None
    ) -> tuple[bytes, Values]:
        """Return the payload of `values + carry` and all that one bit left of it."""
        return blocks.encode(self, values, carry, key=hint.key, out=out)

    def decode(self, payload: bytes, elements: int, out: Values | None = None) -> Values:
        """Return the values. Raises CodecError on anything but a payload of `elements` values."""
        return blocks.decode(self, payload, elements, out)

    def size_bytes_max(self, elements: int) -> int:
        """Return the most bytes that a payload of `elements` values takes."""
        return blocks.size_bytes_max(self, elements)

    def scales(self, total: Values, peaks: Values) -> Values:
        """Return each block's mean magnitude. The zeros that pad the last block pull it down: the carry keeps the rest."""
        grid = np.abs(total)
        while grid.shape[1] > 1:  # halved explicitly: numpy's own sum adds in another order on other processors
            half = grid.shape[1] // 2
            grid = grid[:, :half] + grid[:, half:]
        means: Values = np.divide(grid[:, 0], np.float32(BLOCK), dtype=np.float32)
        means[means < SCALE_MIN] = 0
        return means

    def pack(self, total: Values, scales: Values, work: Values, *, key: int, first: int) -> Codes:
        """Return a set bit for each negative element."""
        negative = np.signbit(total)
        np.copyto(work, scales[:, None])
        np.negative(work, out=work, where=negative)
        return np.packbits(negative, axis=1)

    def unpack(self, codes: Codes, scales: Values, work: Values) -> None:
        """Write the scale with each element's sign."""
        negative = np.unpackbits(codes, axis=1).view(np.bool_)
        np.copyto(work, scales[:, None])
        np.negative(work, out=work, where=negative)
