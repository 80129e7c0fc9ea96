"""The twelve bytes before every payload, and the checks that all codecs share.

A payload names its codec and its element count, so that a receiver refuses what does not fit
before it allocates anything.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from training.errors import CodecError

Values = npt.NDArray[np.float32]

HEADER: Final = struct.Struct("<4sQ")
# A fragment is at most 4 Mi elements by default (training.fragments); 64 Mi leaves room.
ELEMENTS_MAX: Final = 1 << 26
# A difference of parameters beyond this is a diverged run. It keeps sums and scales of
# contributions far from float32's overflow at 3.4e38.
MAGNITUDE_MAX: Final = np.float32(2.0**100)


@dataclass(frozen=True, slots=True)
class Hint:
    """What an encoder may know beyond the values: a key for its rounding, and the matrices that lie in them.

    `key` names the contribution (64 bits of site, round and fragment), so that encoding it again gives the same bytes. `shapes`
    are (rows, columns) of consecutive stretches that together are the whole array; empty where nothing is known.
    """

    key: int = 0
    shapes: tuple[tuple[int, int], ...] = ()


NO_HINT: Final = Hint()


def header(magic: bytes, elements: int) -> bytes:
    """Return the header of a payload of `elements` values."""
    assert len(magic) == 4, magic  # noqa: PLR2004 - the struct's own "4s"
    return HEADER.pack(magic, elements)


def body(payload: bytes, magic: bytes, elements: int) -> memoryview:
    """Return the payload after its header. Raises CodecError where the header is not as expected."""
    if not 0 <= elements <= ELEMENTS_MAX:
        message = f"a payload of {elements} elements is outside 0..{ELEMENTS_MAX}; cut the fragment smaller"
        raise CodecError(message)
    if len(payload) < HEADER.size:
        message = f"a payload of {len(payload)} bytes is shorter than its header of {HEADER.size}"
        raise CodecError(message)
    found_magic, found_elements = HEADER.unpack_from(payload)
    if found_magic != magic or found_elements != elements:
        message = (
            f"the payload says {found_magic!r} with {found_elements} elements where {magic!r} with {elements} "
            "was expected; its author runs another model or version"
        )
        raise CodecError(message)
    return memoryview(payload)[HEADER.size :]


def exact_length(view: memoryview, length: int) -> None:
    """Raise CodecError unless `view` has exactly `length` bytes."""
    if len(view) != length:
        message = f"the payload's body has {len(view)} bytes where {length} are due"
        raise CodecError(message)


def checked(values: Values, what: str) -> Values:
    """Return `values`, or raise CodecError where one is NaN, infinite or beyond MAGNITUDE_MAX."""
    assert values.ndim == 1, "codecs take flat arrays"
    assert values.dtype == np.float32, f"codecs take float32, not {values.dtype}"
    # A comparison with NaN is false, so two reductions find all three faults.
    if values.size and not (bool(values.max() <= MAGNITUDE_MAX) and bool(values.min() >= -MAGNITUDE_MAX)):
        raise unsound(what)
    return values


def unsound(what: str) -> CodecError:
    """Return the error for values that no merge would survive."""
    return CodecError(f"{what} holds NaN, infinite or huge values; lower the learning rate or clip the gradients")


def output(out: Values | None, elements: int) -> Values:
    """Return `out`, checked, or a new array of `elements` values: fresh memory costs as much as a codec."""
    if out is None:
        return np.empty(elements, dtype=np.float32)
    assert out.shape == (elements,), "the output has the values' shape"
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    return out


def with_carry(values: Values, carry: Values | None, decay: np.float32 | None = None) -> Values:
    """Return `values` plus the (decayed) carry, checked. A carry of None is zero."""
    checked(values, "the contribution")
    if carry is None:
        return values
    assert carry.shape == values.shape, "a carry belongs to one fragment"
    return checked(values + (carry if decay is None else decay * carry), "the contribution with its carry")
