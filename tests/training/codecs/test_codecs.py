from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from training.codecs import CODECS, MAGNITUDE_MAX, NO_HINT, Codec, Hint, Values, decode
from training.codecs.blocks import TILE
from training.codecs.compiled import ELEMENTS_MIN, kernels
from training.codecs.int4 import random_bytes
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
    # One float32 subtraction made the carry: half a unit in the last place of its result.
    bound = np.abs(left).astype(np.float64) * 2.0**-24 + 2.0**-149
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


def wide(seed: int = 0) -> Values:
    """Forty blocks of 256 whose magnitudes span ten orders."""
    return normal(40 * 256, seed) * np.repeat(10.0 ** np.arange(-5, 5), 1024).astype(np.float32)


def test_bf16_errs_by_at_most_a_256th_of_each_value() -> None:
    values = wide()
    error = np.abs(CODECS["bf16"].decode(CODECS["bf16"].encode(values, None)[0], values.size) - values)
    assert np.all(error <= np.abs(values) / 256)
    assert np.max(error / np.abs(values)) > 0.95 / 256, "the bound is met, so the test could fail"


def test_int4_errs_by_less_than_a_step_and_not_to_one_side() -> None:
    values = wide()
    step = np.repeat(np.abs(values).reshape(-1, 256).max(axis=1) / 7, 256)
    total = np.zeros(values.size, dtype=np.float64)
    rounds = 400
    for key in range(rounds):
        payload, _ = CODECS["int4"].encode(values, None, Hint(key=key << 40 | 7))
        decoded = CODECS["int4"].decode(payload, values.size)
        assert np.all(np.abs(decoded - values) <= step * (1 + 1e-5))
        total += decoded
    bias = (total / rounds - values) / step
    # A rounding is right in the mean: its own deviation is at most half a step, so the mean's half / 20.
    assert np.abs(bias).max() < 5 * 0.5 / np.sqrt(rounds)
    assert abs(bias.mean()) < 4 * 0.5 / np.sqrt(rounds * values.size) + 1 / 512
    nearest = np.rint(values / step) * step
    assert np.abs((nearest - values) / step).max() > 0.45, "rounding to nearest would fail the bound above"


def test_int4_rounds_alike_under_one_key_and_otherwise_under_another() -> None:
    values = normal(3 * TILE + 77)
    first, again, other = (CODECS["int4"].encode(values, None, Hint(key=key))[0] for key in (5, 5, 6))
    assert first == again
    assert first != other
    stream = random_bytes(1 << 16, 9, 0)
    assert np.array_equal(stream[400:], random_bytes((1 << 16) - 400, 9, 400)), (
        "a place's bits do not depend on the tile"
    )
    counts = np.bincount(stream, minlength=256)
    assert abs(counts - 256).max() < 6 * 16, "each byte about equally often"


def test_fp4_errs_by_a_third_of_each_value_or_3_256ths_of_its_block() -> None:
    values = wide()
    error = np.abs(CODECS["fp4"].decode(CODECS["fp4"].encode(values, None)[0], values.size) - values)
    peak = np.repeat(np.abs(values).reshape(-1, 256).max(axis=1), 256)
    assert np.all(error <= np.maximum(np.abs(values) / 3, peak * 3 / 256) * (1 + 1e-5))
    assert np.max(error / np.abs(values) * (np.abs(values) > peak / 64)) > 0.32, "the bound is met"


def test_sign_errs_in_the_square_by_what_one_magnitude_cannot_hold() -> None:
    values = wide()
    error = CODECS["sign"].decode(CODECS["sign"].encode(values, None)[0], values.size) - values
    blocks, errors = values.reshape(-1, 1024).astype(np.float64), error.reshape(-1, 1024).astype(np.float64)
    expected = (blocks**2).sum(axis=1) - np.abs(blocks).sum(axis=1) ** 2 / 1024
    assert (errors**2).sum(axis=1) == pytest.approx(expected, rel=1e-4)


def test_lowrank_errs_by_the_singular_values_that_it_leaves_out() -> None:
    chance = np.random.default_rng(3)
    left, right = np.linalg.qr(chance.standard_normal((96, 96)))[0], np.linalg.qr(chance.standard_normal((160, 96)))[0]
    spectrum = 2.0 ** -np.arange(96)
    matrix = (left * spectrum @ right.T).astype(np.float32)
    bias = chance.standard_normal(200).astype(np.float32)
    values = np.concatenate([matrix.reshape(-1), bias])
    payload, carry = CODECS["lowrank"].encode(values, None, Hint(shapes=((96, 160), (1, 200))))
    assert len(payload) < 2 * (4 * (96 + 160) + 200) + 60
    rest = carry[: matrix.size]
    best = np.sqrt((spectrum[4:] ** 2).sum())
    # bfloat16 factors add up to a 256th of what is sent to what the best rank 4 leaves.
    assert best <= np.linalg.norm(rest) * (1 + 1e-5)
    assert np.linalg.norm(rest) <= 1.1 * best + np.linalg.norm(matrix) / 256
    assert np.all(np.abs(carry[matrix.size :]) <= np.abs(bias) / 256)


def test_over_rounds_every_codec_below_four_bits_sends_the_whole_of_a_constant_gradient() -> None:
    values = normal(CHUNK)
    for name in ("sign", "lowrank"):
        carry, total = None, np.zeros(CHUNK, dtype=np.float64)
        for _ in range(300):
            payload, carry = CODECS[name].encode(values, carry)
            total += CODECS[name].decode(payload, CHUNK)
        assert np.linalg.norm(total / 300 - values) < 0.1 * np.linalg.norm(values), name
        alone = CODECS[name].decode(CODECS[name].encode(values, None)[0], CHUNK)
        assert np.linalg.norm(alone - values) > 0.5 * np.linalg.norm(values), "without the carry most of it is lost"


@codecs
def test_the_carry_and_the_values_may_be_written_in_place(codec: Codec) -> None:
    values, carry = normal(5000), normal(5000, 1)
    payload, left = codec.encode(values, carry)
    target = np.empty(5000, dtype=np.float32)
    same, in_place = codec.encode(values, carry, NO_HINT, carry)
    assert same == payload
    assert in_place is carry
    assert np.array_equal(in_place, left)
    assert codec.decode(payload, 5000, target) is target
    assert np.array_equal(target, codec.decode(payload, 5000))


@pytest.mark.parametrize("spread", [1, 3, 50])
def test_topk2_picks_exactly_among_near_and_equal_magnitudes(spread: int) -> None:
    """Few distinct magnitudes, so that nearly every threshold is a tie, against sorting in Python."""
    values = np.random.default_rng(spread).integers(-spread, spread + 1, 3 * CHUNK + 1000).astype(np.float32)
    decoded = CODECS["topk2"].decode(CODECS["topk2"].encode(values, None)[0], values.size)
    for start in range(0, values.size, CHUNK):
        chunk = np.abs(values[start : start + CHUNK])
        count = -(-chunk.size * KEPT_PER_CHUNK // CHUNK)
        expected = sorted(sorted(range(chunk.size), key=lambda place: (-chunk[place], place))[:count])
        sent = np.flatnonzero(decoded[start : start + CHUNK])
        assert sent.tolist() == [place for place in expected if chunk[place] > 0]


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


def test_topk2_is_215_times_smaller_than_fp32() -> None:
    elements = 1 << 20
    payload, _ = CODECS["topk2"].encode(normal(elements), None)
    assert 4 * elements / len(payload) >= 215
    clustered = np.zeros(elements, dtype=np.float32)
    clustered.reshape(-1, CHUNK)[:, -KEPT_PER_CHUNK:] = 1
    worst, _ = CODECS["topk2"].encode(clustered, None)
    assert 4 * elements / len(worst) >= 190, "positions that a code of fixed parameters likes least"


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


@pytest.mark.parametrize("name", ["int8", "int4", "topk2"])
@pytest.mark.parametrize("elements", [ELEMENTS_MIN, ELEMENTS_MIN + 77])
@pytest.mark.parametrize("ties", [False, True])
def test_compiled_loops_give_the_bytes_of_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, *, name: str, elements: int, ties: bool
) -> None:
    pytest.importorskip("numba")
    values, carry = normal(elements), normal(elements, 1) * np.float32(1e-3)
    if ties:
        values, carry = np.rint(values), np.zeros_like(carry)
    values[1024:3072], values[5000:5100], carry[1024:3072] = 0, 1e-30, 0
    found = []
    for wish in ("1", "0"):
        monkeypatch.setenv("HANSA_COMPILE", wish)
        kernels.cache_clear()
        assert bool(kernels()) == (wish == "1")
        payload, left = CODECS[name].encode(values, carry, Hint(key=1234567890123456789))
        faulty = values.copy()
        faulty[77] = np.nan
        with pytest.raises(CodecError, match="NaN, infinite or huge"):
            CODECS[name].encode(faulty, None)
        found.append((payload, left.tobytes(), CODECS[name].decode(payload, elements).tobytes()))
    kernels.cache_clear()
    assert found[0] == found[1]
