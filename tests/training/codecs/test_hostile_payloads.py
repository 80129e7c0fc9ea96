"""Bytes from a hostile site: a CodecError or values that are finite, and no allocation beyond the caller's elements."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.codecs import CODECS, ELEMENTS_MAX, Codec, decode
from training.codecs.golomb import decode_gaps, encode_gaps
from training.errors import CodecError

ELEMENTS = 5000
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def payload_of(codec: Codec) -> bytes:
    values = np.random.default_rng(1).standard_normal(ELEMENTS).astype(np.float32)
    return codec.encode(values, None)[0]


def decodes_soundly(payload: bytes, elements: int) -> None:
    try:
        values = decode(payload, elements)
    except CodecError:
        return
    assert values.shape == (elements,)
    assert np.isfinite(values).all()


@codecs
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_payloads_decode_soundly_or_are_refused(codec: Codec, data: st.DataObject) -> None:
    damaged = bytearray(payload_of(codec))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    decodes_soundly(bytes(damaged[:cut]) + data.draw(st.binary(max_size=8)), ELEMENTS)


@codecs
@settings(max_examples=150, deadline=None)
@given(body=st.binary(max_size=400), elements=st.sampled_from([0, 1, 64, 65, 4096, 4097]))
def test_random_bodies_decode_soundly_or_are_refused(codec: Codec, body: bytes, elements: int) -> None:
    decodes_soundly(codec.magic + struct.pack("<Q", elements) + body, elements)


@codecs
def test_a_payload_longer_than_any_honest_one_is_refused_before_it_is_read(codec: Codec) -> None:
    padded = codec.magic + struct.pack("<Q", ELEMENTS) + bytes(codec.size_bytes_max(ELEMENTS))
    with pytest.raises(CodecError, match="at most"):
        decode(padded, ELEMENTS)


@settings(max_examples=50, deadline=None)
@given(payload=st.binary(max_size=64))
def test_bytes_of_no_codec_are_refused(payload: bytes) -> None:
    if payload[:4] not in {codec.magic for codec in CODECS.values()}:
        with pytest.raises(CodecError, match="no codec"):
            decode(payload, 10)


@codecs
def test_an_announced_size_allocates_nothing(codec: Codec) -> None:
    lying = codec.magic + struct.pack("<Q", 1 << 60) + b"\0" * 100
    tracemalloc.start()
    try:
        for elements in (ELEMENTS, 1 << 60, ELEMENTS_MAX):
            with pytest.raises(CodecError):
                decode(lying, elements)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@codecs
def test_another_length_by_one_byte_is_refused(codec: Codec) -> None:
    payload = payload_of(codec)
    for changed in (payload[:-1], payload + b"\0"):
        with pytest.raises(CodecError):
            codec.decode(changed, ELEMENTS)
    with pytest.raises(CodecError, match="was expected"):
        codec.decode(payload, ELEMENTS + 1)


@pytest.mark.parametrize("level", [np.nan, np.inf, -0.5, 1.5])
def test_topk2_magnitudes_must_be_sound(level: float) -> None:
    payload = bytearray(payload_of(CODECS["topk2"]))
    payload[14:16] = np.array([level], dtype="<f2").tobytes()
    with pytest.raises(CodecError, match="magnitudes"):
        decode(bytes(payload), ELEMENTS)


def forged_topk2(elements: int, positions: list[int]) -> bytes:
    """A payload whose every part is in order, but for where its values lie."""
    chunks = -(-elements // 4096)
    remainders, unary = encode_gaps(np.diff(positions, prepend=-1) - 1)
    levels = np.full(2 * chunks, 0.5, dtype="<f2").tobytes()
    codes = bytes(-(-2 * len(positions) // 8))
    return b"HTK1" + struct.pack("<Qh", elements, 0) + levels + codes + remainders + unary


@pytest.mark.parametrize(
    ("elements", "positions"),
    [(8192, list(range(128))), (8192, list(range(8064, 8192))), (100, [10, 100]), (100, [10, 99 + 4096])],
)
def test_topk2_refuses_positions_outside_their_chunk(elements: int, positions: list[int]) -> None:
    honest = [*range(64), *range(4096, 4160)] if elements == 8192 else [10, 99]
    assert np.flatnonzero(decode(forged_topk2(elements, honest), elements)).tolist() == honest
    with pytest.raises(CodecError):
        decode(forged_topk2(elements, positions), elements)


def test_topk2_has_one_way_to_write_a_payload() -> None:
    payload = bytearray(CODECS["topk2"].encode(np.ones(1, dtype=np.float32), None)[0])
    assert decode(bytes(payload), 1).tolist() == [1.0]
    for place in (18, 19):  # the codes, then the remainders: two and five bits of a byte are used
        changed = bytearray(payload)
        changed[place] |= 1
        with pytest.raises(CodecError, match="padding"):
            decode(bytes(changed), 1)


def test_fp32_and_int8_refuse_numbers_that_are_not_finite() -> None:
    for codec, place in ((CODECS["fp32"], 12), (CODECS["int8"], 12)):
        payload = bytearray(payload_of(codec))
        payload[place : place + 4] = struct.pack("<f", float("nan"))
        with pytest.raises(CodecError):
            decode(bytes(payload), ELEMENTS)


@settings(max_examples=100, deadline=None)
@given(gaps=st.lists(st.integers(0, 5000), max_size=200))
def test_gap_coding_is_lossless(gaps: list[int]) -> None:
    remainders, unary = encode_gaps(np.array(gaps, dtype=np.int64))
    assert decode_gaps(memoryview(remainders), memoryview(unary), len(gaps)).tolist() == gaps


def test_gaps_near_the_entropy_cost_seven_and_a_half_bits() -> None:
    gaps = np.random.default_rng(2).geometric(1 / 64, 100_000) - 1
    remainders, unary = encode_gaps(gaps.astype(np.int64))
    assert 7.4 < 8 * (len(remainders) + len(unary)) / gaps.size < 7.6
