from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from training.codecs import CODECS, MAGNITUDE_MAX, Codec, Values, decode
from training.codecs.int8 import BLOCK
from training.codecs.topk2 import BETA, CHUNK, KEPT_PER_CHUNK
from training.errors import CodecError

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
SIZES = (0, 1, 2, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097, 10_000)


def normal(elements: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).standard_normal(elements).astype(np.float32)


@st.composite
def values_and_carry(draw: st.DrawFn) -> tuple[Values, Values]:
    """Few drawn numbers, repeated over sizes around the blocks' edges: ties, zeros and subnormals included."""
    elements = draw(st.sampled_from(SIZES))
    number = st.floats(-(2.0**66), 2.0**66, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-140, 2.0**-100])
    pool = draw(arrays(np.float32, 16, elements=number))
    picks = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 16, (2, elements))
    return pool[picks[0]], pool[picks[1]]


@codecs
@settings(max_examples=60, deadline=None)
@given(case=values_and_carry())
def test_decoded_plus_new_carry_is_input_plus_old_carry(codec: Codec, case: tuple[Values, Values]) -> None:
    values, carry = case
    payload, left = codec.encode(values, carry)
    decoded = codec.decode(payload, values.size)
    total = values + (BETA * carry if codec.name == "topk2" else carry)
    error = np.abs(decoded.astype(np.float64) + left - total)
    # One float32 subtraction made the carry: half a unit in the last place of the larger operand.
    bound = np.maximum(np.abs(decoded), np.abs(total)).astype(np.float64) * 2.0**-24 + 2.0**-149
    assert np.all(error <= bound)


@codecs
@settings(max_examples=40, deadline=None)
@given(case=values_and_carry())
def test_encoding_is_deterministic_within_its_stated_size(codec: Codec, case: tuple[Values, Values]) -> None:
    values, carry = case
    first, _ = codec.encode(values, carry)
    again, _ = codec.encode(values.copy(), carry.copy())
    assert first == again
    assert len(first) <= codec.size_bytes_max(values.size)
    assert np.array_equal(decode(first, values.size), codec.decode(first, values.size))


@codecs
@pytest.mark.parametrize("elements", SIZES)
def test_every_size_survives_the_round_trip(codec: Codec, elements: int) -> None:
    payload, carry = codec.encode(normal(elements), None)
    assert codec.decode(payload, elements).shape == carry.shape == (elements,)


@codecs
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf, 2 * float(MAGNITUDE_MAX)])
def test_values_that_no_merge_survives_are_refused(codec: Codec, fault: float) -> None:
    values = normal(100)
    values[37] = fault
    with pytest.raises(CodecError, match="NaN, infinite or huge"):
        codec.encode(values, None)
    with pytest.raises(CodecError, match="NaN, infinite or huge"):
        codec.encode(normal(100), values)


def test_fp32_returns_the_same_bits() -> None:
    values = normal(5000)
    payload, carry = CODECS["fp32"].encode(values, None)
    assert np.array_equal(CODECS["fp32"].decode(payload, 5000).view(np.uint32), values.view(np.uint32))
    assert not carry.any()


def test_int8_errs_by_at_most_half_a_step_of_its_block() -> None:
    values = normal(10 * BLOCK) * np.repeat(10.0 ** np.arange(-5, 5), BLOCK).astype(np.float32)
    payload, _ = CODECS["int8"].encode(values, None)
    error = np.abs(CODECS["int8"].decode(payload, values.size) - values).reshape(10, BLOCK)
    step = np.abs(values).reshape(10, BLOCK).max(axis=1) / 127
    assert np.all(error <= step[:, None] * (0.5 + 1e-5))
    assert error.max(axis=1) == pytest.approx(step / 2, rel=0.05), "the bound is met, so the test could fail"


def test_topk2_sends_the_largest_of_each_chunk_with_their_signs() -> None:
    values = normal(3 * CHUNK)
    payload, _ = CODECS["topk2"].encode(values, None)
    decoded = CODECS["topk2"].decode(payload, values.size)
    for start in range(0, values.size, CHUNK):
        chunk, sent = values[start : start + CHUNK], decoded[start : start + CHUNK]
        largest = set(np.argsort(-np.abs(chunk))[:KEPT_PER_CHUNK].tolist())
        assert set(np.flatnonzero(sent).tolist()) == largest
        places = sorted(largest)
        assert np.array_equal(np.sign(sent[places]), np.sign(chunk[places]))
        assert len(set(np.abs(sent[places]).tolist())) == 2, "two magnitudes a chunk"
        assert np.linalg.norm(sent[places] - chunk[places]) < 0.15 * np.linalg.norm(chunk[places])


def test_topk2_is_195_times_smaller_than_fp32() -> None:
    elements = 1 << 20
    payload, _ = CODECS["topk2"].encode(normal(elements), None)
    assert 4 * elements / len(payload) >= 195
    clustered = np.zeros(elements, dtype=np.float32)
    clustered.reshape(-1, CHUNK)[:, -KEPT_PER_CHUNK:] = 1
    worst, _ = CODECS["topk2"].encode(clustered, None)
    assert 4 * elements / len(worst) >= 190, "positions that Golomb-Rice likes least"


def test_of_equal_magnitudes_topk2_keeps_the_first() -> None:
    payload, _ = CODECS["topk2"].encode(np.full(CHUNK, -2.5, dtype=np.float32), None)
    decoded = CODECS["topk2"].decode(payload, CHUNK)
    assert np.array_equal(np.flatnonzero(decoded), np.arange(KEPT_PER_CHUNK))
    assert set(decoded[:KEPT_PER_CHUNK].tolist()) == {-2.5}


def test_over_rounds_int8_loses_nothing_of_a_constant_gradient() -> None:
    values, carry = normal(2000) * np.float32(1e-3), None
    values[0] = 1.0  # an outlier, below whose step most of the block lies
    total = np.zeros(2000, dtype=np.float64)
    for _ in range(200):
        payload, carry = CODECS["int8"].encode(values, carry)
        total += CODECS["int8"].decode(payload, 2000)
    assert np.abs(total / 200 - values).max() < 1e-4
    without = CODECS["int8"].decode(CODECS["int8"].encode(values, None)[0], 2000)
    assert np.abs(without - values).max() > 1e-3, "without the carry they would be lost"
