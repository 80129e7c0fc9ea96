"""Bytes from a hostile site: a CodecError or values that are finite, and no allocation beyond the caller's elements."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.codecs import CODECS, ELEMENTS_MAX, Codec, arithmetic, decode
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


def forged_topk2(elements: int, gaps: list[int], scale: tuple[int, int, int, int] = (1, 0, 1, 0)) -> bytes:
    """A payload whose every part is in order, but for where its values lie or what they are."""
    chunks = -(-elements // 4096)
    stream = arithmetic.encode(
        np.array(gaps), np.zeros(len(gaps), np.int64), np.array([scale] * chunks), 64, compiled=False
    )
    return b"HTK2" + struct.pack("<Qh", elements, 0) + bytes(-(-len(gaps) // 8)) + stream


@pytest.mark.parametrize("scale", [(0, 0, -1, 0), (3, 5, 3, 4), (30, 0, 31, 0)])
def test_topk2_magnitudes_must_be_in_order(scale: tuple[int, int, int, int]) -> None:
    assert set(decode(forged_topk2(100, [9, 9], (3, 5, 3, 5)), 100).tolist()) == {0.0, 21 / 256}
    with pytest.raises(CodecError, match="magnitudes"):
        decode(forged_topk2(100, [9, 9], scale), 100)


@pytest.mark.parametrize(
    ("elements", "gaps"),
    [(8192, [8064] + [0] * 127), (8192, [4033] + [0] * 127), (100, [10, 89]), (100, [10, 4184]), (100, [8191, 0])],
)
def test_topk2_refuses_positions_outside_their_chunk(elements: int, gaps: list[int]) -> None:
    honest = [4032] + [0] * 127 if elements == 8192 else [10, 88]
    places = [*range(4032, 4096), *range(4096, 4160)] if elements == 8192 else [10, 99]
    assert np.flatnonzero(decode(forged_topk2(elements, honest), elements)).tolist() == places
    with pytest.raises(CodecError, match="outside its chunk"):
        decode(forged_topk2(elements, gaps), elements)


def test_topk2_has_one_way_to_write_signs() -> None:
    payload = bytearray(CODECS["topk2"].encode(np.ones(1, dtype=np.float32), None)[0])
    assert decode(bytes(payload), 1).tolist() == [1.0]
    payload[14] |= 1  # of the signs' byte one bit is used
    with pytest.raises(CodecError, match="padding"):
        decode(bytes(payload), 1)


WIDTHS, COUNTS = np.array([4096, 200]), np.array([64, 4])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_stream_that_decodes_is_the_only_one_for_its_content(data: st.DataObject) -> None:
    chance = np.random.default_rng(data.draw(st.integers(0, 99)))
    gaps = np.minimum(chance.geometric(1 / 32, 68) - 1, 49)
    honest = arithmetic.encode(
        gaps, chance.integers(0, 2, 68), np.array([[3, 1, 2, 9], [3, 0, 3, 0]]), 64, compiled=False
    )
    stream = bytearray(honest + data.draw(st.binary(max_size=3)))
    for _ in range(data.draw(st.integers(0, 2))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    del stream[data.draw(st.integers(len(stream) - 5, len(stream))) :]
    try:
        content = arithmetic.decode(memoryview(stream), WIDTHS, COUNTS, compiled=False)
    except CodecError:
        assert stream != honest
        return
    assert arithmetic.encode(*content, 64, compiled=False) == stream


def test_fp32_and_int8_refuse_numbers_that_are_not_finite() -> None:
    for codec, place in ((CODECS["fp32"], 12), (CODECS["int8"], 12)):
        payload = bytearray(payload_of(codec))
        payload[place : place + 4] = struct.pack("<f", float("nan"))
        with pytest.raises(CodecError):
            decode(bytes(payload), ELEMENTS)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1, 3, 60, 4000]), zero=st.booleans())
def test_arithmetic_coding_is_lossless(seed: int, spread: int, *, zero: bool) -> None:
    chance = np.random.default_rng(seed)
    counts, widths = np.array([64, 64, 5]), np.full(3, 4096)
    gaps = np.concatenate(
        [np.diff(np.sort(chance.permutation(spread + 96)[:count]), prepend=-1) - 1 for count in counts]
    )
    high = chance.integers(0, 2, gaps.size)
    scales = np.array([[31, 0, 31, 0] if zero else [9, 15, 9, 15], [31, 0, 30, 7], [7, 3, 0, 1]])
    stream = arithmetic.encode(gaps, high, scales, 64, compiled=False)
    assert len(stream) <= arithmetic.stream_bytes_max(3, gaps.size)
    for found, written in zip(
        arithmetic.decode(memoryview(stream), widths, counts, compiled=False), (gaps, high, scales), strict=True
    ):
        assert np.array_equal(found, written)


def test_positions_by_chance_cost_their_entropy_and_clustered_ones_less() -> None:
    chance = np.random.default_rng(2)
    places = np.sort(np.argsort(chance.random((100, 4096)), axis=1)[:, :64], axis=1)
    high, scales = np.zeros(6400, np.int64), np.tile([3, 0, 3, 0], (100, 1))
    by_chance = arithmetic.encode(
        (np.diff(places, axis=1, prepend=-1) - 1).reshape(-1), high, scales, 64, compiled=False
    )
    # log2 of 4,096 over 64 is 471 bits, to which eight of magnitudes come; Golomb-Rice takes 482.
    assert 471 < 8 * len(by_chance) / 100 - 8 < 480
    clustered = np.tile([40, 1, 0, 3], 1600)
    assert len(arithmetic.encode(clustered, high, scales, 64, compiled=False)) < len(by_chance) / 2
