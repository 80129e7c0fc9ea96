from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy._core._multiarray_umath import __cpu_dispatch__ as CPU_FEATURES  # noqa: N812 - numpy's name for what it may use

from tests.training import golden_rounds
from training.merge import fixed_sum, sum_of_squares, weighted_mean
from training.outer import PLAIN, OuterRule, fragment_digest, outer_rule, outer_step, state_hash
from training.spec import SyncPlan

ROOT = Path(__file__).resolve().parents[2]
# Recorded from this code once; a change of any means that releases of unlike age no longer agree.
GOLDEN = {
    "fp32": "38e743020c06daee26798f5d108e20c725d437da7b570946fa0eac4440a9862f",
    "fp32 payloads": "db89e58c9e5ed74060ef158879928b61b0d009f5e21236110a5fed5786c429ee",
    "fp32 norm": "0x1.0e37ba428a630p+9",
    "bf16": "ebefe4a2cd704fa614ff0219912ec80def11219191073530610cc885a2e032b3",
    "bf16 payloads": "8a156d1b6699844a949d911f2a51797cea8aa8c578d10a4a6e75462c465e7fc9",
    "bf16 norm": "0x1.0e38433cae2d0p+9",
    "int8": "ffa89f0f1fd4609f15b8b62e786571b698b72e0288e09681bb72aad963e2b1b7",
    "int8 payloads": "93b19308f43e31611e4f456eb0947ad94be57bdfbe0b7c3883ba0f6c3427888a",
    "int8 norm": "0x1.0e35cb046683cp+9",
    "int4": "db17493e8650e32671babf48eebb3e0493bcbc32ebee4e16c9f761fac5271024",
    "int4 payloads": "18303babe5138558355dfe3c7114fb340ce5098dea77d29e38a39e9c1a01e596",
    "int4 norm": "0x1.0f4b21bbad7a8p+9",
    "fp4": "336b15a64fe0b1ed89a87701102754b7617902a6f34a86e1fcf69b69593c8d51",
    "fp4 payloads": "ea30ef494e03dbfca2146da292295f59e447a016ff233806be08cb235551a11c",
    "fp4 norm": "0x1.0dcb2489153a6p+9",
    "sign": "fb8f734256a6bb2b410ca1b174a12e1a5129d953efdb6610c67c1840f6b653d9",
    "sign payloads": "0f24e0782013c5a3b0367f95b80d3a0bb134717c9fb72e26de547d00fd7a2f98",
    "sign norm": "0x1.ab5731a150b08p+8",
    "lowrank decoded": "398733adc752cba91b85db1df28fd16e7c632dad14732d2fbaad7aee6f90aace",
    "topk2": "02009fc4102cae644deb20520c49bec497fded045a3f84e22f046f9687e0c6c6",
    "topk2 payloads": "0452368aa1ffcfcf7937f3d301e87cb98abef99fbcf4f07c40ef7cae10b0e3af",
    "topk2 norm": "0x1.b921418ad92fap+6",
}


def subprocess_hashes(**environment: str) -> dict[str, str]:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.training.golden_rounds"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    hashes: dict[str, str] = json.loads(process.stdout)
    return hashes


def test_five_rounds_give_the_golden_hashes() -> None:
    assert golden_rounds.hashes() == GOLDEN


def test_the_bits_do_not_depend_on_the_processors_features() -> None:
    assert subprocess_hashes(NPY_DISABLE_CPU_FEATURES=" ".join(CPU_FEATURES)) == GOLDEN


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "7")
    assert subprocess_hashes(**threads) == GOLDEN


@settings(max_examples=50)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 1 << 20), st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3)),
        min_size=1,
        max_size=8,
    )
)
def test_the_merge_equals_scalar_arithmetic_in_python(rows: list[tuple[int, list[float]]]) -> None:
    merged = weighted_mean((weight, np.array(values, dtype=np.float32)) for weight, values in rows)
    for place in range(3):
        total = rows[0][1][place] * float(rows[0][0])
        for weight, values in rows[1:]:
            total = total + values[place] * float(weight)
        assert merged[place] == np.float32(total / float(sum(weight for weight, _ in rows)))


@settings(max_examples=50)
@given(theta=st.floats(-4, 4, width=32), moved=st.floats(-1, 1, width=32), velocity=st.floats(-1, 1, width=32))
def test_the_nesterov_step_rounds_each_operation_to_float32(theta: float, moved: float, velocity: float) -> None:
    arrays = [np.array([each], dtype=np.float32) for each in (theta, velocity, moved)]
    after, speed = outer_step(*arrays, OuterRule(0.7, 0.9))
    rate, momentum = np.float32(0.7), np.float32(0.9)
    expected_speed = np.float32(np.float32(momentum * np.float32(velocity)) + np.float32(moved))
    direction = np.float32(np.float32(momentum * expected_speed) + np.float32(moved))
    assert speed[0] == expected_speed
    assert after[0] == np.float32(np.float32(theta) - np.float32(rate * direction))


def test_a_plain_step_of_equal_weights_is_the_mean_of_the_parameters_bit_for_bit() -> None:
    """On multiples of 2**-10, where float32 subtraction is exact, against the mean taken directly."""
    chance = np.random.default_rng(4)
    theta, *models = (chance.integers(-1000, 1000, (5, 4000)) / 1024).astype(np.float32)
    merged = weighted_mean((16, theta - each) for each in models)
    after, velocity = outer_step(theta, np.zeros_like(theta), merged, PLAIN)
    assert np.array_equal(after, (np.sum(models, axis=0, dtype=np.float64) / 4).astype(np.float32))
    assert not velocity.any()


def test_a_heavier_site_pulls_harder() -> None:
    merged = weighted_mean([(30, np.float32([1.0])), (10, np.float32([5.0]))])
    assert merged[0] == 2.0


def test_the_fixed_sum_is_right_and_ignores_padding() -> None:
    for size in (0, 1, 4095, 4096, 4097, 3 * 4096 + 5):
        values = np.random.default_rng(size).standard_normal(size)
        assert fixed_sum(values) == pytest.approx(math.fsum(values), abs=1e-9)
    assert sum_of_squares(np.float32([3, 4])) == 25


def test_topk2_takes_no_momentum_unless_the_plan_says_other_than_its_defaults() -> None:
    assert outer_rule(SyncPlan(codec="topk2")) == PLAIN
    assert outer_rule(SyncPlan(codec="topk2", outer_momentum=0.3)) == OuterRule(0.7, 0.3)
    assert outer_rule(SyncPlan(codec="topk2", outer_learning_rate=1.0)) == OuterRule(1.0, 0.9)
    assert outer_rule(SyncPlan(codec="int8")) == OuterRule(0.7, 0.9)


def test_the_state_hash_covers_values_velocity_layout_and_done_samples() -> None:
    zeros, ones = np.zeros(4, dtype=np.float32), np.ones(4, dtype=np.float32)
    states = [
        state_hash("a", [fragment_digest(zeros, zeros)], ()),
        state_hash("b", [fragment_digest(zeros, zeros)], ()),
        state_hash("a", [fragment_digest(ones, zeros)], ()),
        state_hash("a", [fragment_digest(zeros, ones)], ()),
        state_hash("a", [fragment_digest(zeros, zeros)], (golden_rounds.SampleRange(0, 1),)),
    ]
    assert len(set(states)) == 5
