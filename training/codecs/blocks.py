"""Encoding and decoding in blocks that share one scale, tile by tile inside the processor's cache.

`int8`, `int4`, `fp4`, `sign` and `bf16` differ only in how a tile of values becomes codes and back; what they
share is here: the carry, the check, the scales, and the layout `header · scales · codes`. A tile is 256 KiB of
float32, so that the eight or so passes over it never leave the cache: a pass over memory costs three of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from training.codecs.framing import (
    HEADER,
    MAGNITUDE_MAX,
    Values,
    body,
    exact_length,
    header,
    output,
    unsound,
)
from training.errors import CodecError

TILE: Final = 1 << 16
# Below the smallest normal number a scale loses bits; such a block waits in the carry.
SCALE_MIN: Final = np.finfo(np.float32).tiny
_SCALE_MAX: Final = np.float32(2.0**100)

Codes = npt.NDArray[np.uint8]


class Tile:
    """Scratch space of one encode or decode. Grids have a row for each block."""

    def __init__(self, elements: int, block: int) -> None:
        """Make room for tiles of `elements` values in whole blocks of `block`."""
        blocks = max(1, -(-min(elements, TILE) // block))
        self.block = block
        self.total = np.zeros((blocks, block), dtype=np.float32)
        self.work = np.empty((blocks, block), dtype=np.float32)

    def rows(self, count: int) -> tuple[Values, Values]:
        """Return the first `count` rows of the two grids."""
        return self.total[:count], self.work[:count]


class BlockCodec(Protocol):
    """What a block-scaled codec adds to this module."""

    @property
    def magic(self) -> bytes:
        """The mark of its payloads."""
        ...

    @property
    def block(self) -> int:
        """The elements that share a scale; a divisor of TILE."""
        ...

    @property
    def bits(self) -> int:
        """The bits of one element's code: 1, 4 or 8."""
        ...

    def scales(self, total: Values, peaks: Values) -> Values:
        """Return each block's scale, of its values and their largest magnitude; 0 codes the block as zeros."""
        ...

    def pack(self, total: Values, scales: Values, work: Values, *, key: int, first: int) -> Codes:
        """Return the rows' codes as bytes, a row after the other, and leave what they decode to in `work`."""
        ...

    def unpack(self, codes: Codes, scales: Values, work: Values) -> None:
        """Write to `work` what rows of codes mean."""
        ...


def encode(
    codec: BlockCodec, values: Values, carry: Values | None, *, key: int, out: Values | None
) -> tuple[bytes, Values]:
    """Return the payload of `values + carry` and what coding left of it."""
    assert values.ndim == 1, "codecs take flat arrays"
    assert values.dtype == np.float32, f"codecs take float32, not {values.dtype}"
    assert carry is None or carry.shape == values.shape, "a carry belongs to one fragment"
    elements, block = values.size, codec.block
    blocks = -(-elements // block)
    all_scales = np.empty(blocks, dtype="<f4")
    all_codes = np.empty(blocks * block * codec.bits // 8, dtype=np.uint8)
    left = output(out, elements)
    tile = Tile(elements, block)
    for start in range(0, elements, TILE):
        stop = min(start + TILE, elements)
        total, work = tile.rows(-(-(stop - start) // block))
        flat = total.reshape(-1)
        if carry is None:
            flat[: stop - start] = values[start:stop]
        else:
            np.add(values[start:stop], carry[start:stop], out=flat[: stop - start])
        flat[stop - start :] = 0
        np.abs(total, out=work)
        peaks = work.max(axis=1)
        # A comparison with NaN is false, so one look at the blocks' maxima finds all three faults.
        if not bool((peaks <= MAGNITUDE_MAX).all()):
            raise unsound("the contribution with its carry")
        scales = codec.scales(total, peaks)
        first = start // block
        all_scales[first : first + len(total)] = scales
        codes = codec.pack(total, scales, work, key=key, first=first)
        offset = first * block * codec.bits // 8
        all_codes[offset : offset + codes.size] = codes.reshape(-1)
        np.subtract(flat[: stop - start], work.reshape(-1)[: stop - start], out=left[start:stop])
    used = code_bytes(codec, elements)
    return b"".join((header(codec.magic, elements), all_scales.data, all_codes[:used].data)), left


def encode_in_one_pass(
    codec: BlockCodec, values: Values, carry: Values | None, out: Values | None, loop: Callable[..., int]
) -> tuple[bytes, Values]:
    """Do what `encode` does by one compiled `loop` over values, carry, left, scales and codes."""
    assert values.ndim == 1, "codecs take flat arrays"
    assert values.dtype == np.float32, f"codecs take float32, not {values.dtype}"
    assert carry is None or carry.shape == values.shape, "a carry belongs to one fragment"
    blocks = -(-values.size // codec.block)
    scales, codes = np.empty(blocks, dtype="<f4"), np.empty(code_bytes(codec, values.size), dtype=np.uint8)
    left = output(out, values.size)
    largest = loop(np.ascontiguousarray(values), np.zeros_like(values) if carry is None else carry, left, scales, codes)
    # The bits of NaN and infinity are larger than those of any number.
    if largest > int(MAGNITUDE_MAX.view(np.int32)):
        raise unsound("the contribution with its carry")
    return b"".join((header(codec.magic, values.size), scales.data, codes.data)), left


def opened(codec: BlockCodec, payload: bytes, elements: int) -> tuple[Values, Codes]:
    """Return the scales and codes of a payload. Raises CodecError on anything but a payload of `elements` values."""
    view = body(payload, codec.magic, elements)
    blocks = -(-elements // codec.block)
    used = code_bytes(codec, elements)
    exact_length(view, 4 * blocks + used)
    all_scales = np.frombuffer(view[: 4 * blocks], dtype="<f4").astype(np.float32)
    if not bool(np.all((all_scales >= 0) & (all_scales <= _SCALE_MAX))):
        message = "a block's scale is NaN, negative or huge; the payload is damaged or forged"
        raise CodecError(message)
    return all_scales, np.frombuffer(view[4 * blocks :], dtype=np.uint8)


def decode(codec: BlockCodec, payload: bytes, elements: int, out: Values | None) -> Values:
    """Return the values. Raises CodecError on anything but a payload of `elements` values."""
    all_scales, codes = opened(codec, payload, elements)
    values = output(out, elements)
    per_tile = TILE * codec.bits // 8
    tile = Tile(elements, codec.block)
    for number, start in enumerate(range(0, elements, TILE)):
        stop = min(start + TILE, elements)
        rows = -(-(stop - start) // codec.block)
        piece = codes[number * per_tile : (number + 1) * per_tile]
        width = codec.block * codec.bits // 8
        if piece.size < rows * width:
            piece = np.concatenate([piece, np.zeros(rows * width - piece.size, dtype=np.uint8)])
        whole = stop - start == rows * codec.block
        work = values[start:stop].reshape(rows, codec.block) if whole else tile.rows(rows)[1]
        codec.unpack(piece.reshape(rows, width), all_scales[start // codec.block :][:rows], work)
        if not whole:
            values[start:stop] = work.reshape(-1)[: stop - start]
    return values


def code_bytes(codec: BlockCodec, elements: int) -> int:
    """Return the bytes of all codes: whole blocks, and of the last one what its elements need.

    Codecs below eight bits spread a block's elements over its bytes, so their last block is sent whole.
    """
    if codec.bits == 8:  # noqa: PLR2004 - a byte
        return elements
    return -(-elements // codec.block) * codec.block * codec.bits // 8


def size_bytes_max(codec: BlockCodec, elements: int) -> int:
    """Return the bytes that a payload of `elements` values takes."""
    return HEADER.size + 4 * -(-elements // codec.block) + code_bytes(codec, elements)


def inverse(scales: Values, numerator: np.float32) -> Values:
    """Return `numerator` over each scale, and 0 where a scale is 0: such a block is coded as zeros."""
    divisors: Values = np.where(scales > 0, scales, np.float32(np.inf)).astype(np.float32, copy=False)
    quotients: Values = np.divide(numerator, divisors, dtype=np.float32)
    return quotients


def scaled(grid: Values, factors: Values, out: Values) -> None:
    """Write each row times its factor to `out`: one IEEE product each, in torch, whose rows cost nothing extra."""
    torch.mul(torch.from_numpy(grid), torch.from_numpy(factors)[:, None], out=torch.from_numpy(out))


def divided(grid: Values, divisors: Values, out: Values) -> None:
    """Write each row divided by its divisor to `out`."""
    torch.div(torch.from_numpy(grid), torch.from_numpy(divisors)[:, None], out=torch.from_numpy(out))
