"""A fitted model outlives its process as JSON, learns from a profile, and says when it knows little."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.training.steptimes.synthetic_tables import MODELS, drawn
from training.spec import Workload
from training.steptimes.model import (
    Shape,
    StepModel,
    StepModelError,
    cold_model,
    dump,
    fit_model,
    load,
)
from training.steptimes.table import table_of


@pytest.fixture(scope="module")
def model() -> StepModel:
    return fit_model(drawn((1, 2, 3, 4)))


def test_a_model_read_back_predicts_the_same(model: StepModel) -> None:
    again = load(dump(model))
    shapes = [Shape(1, 1, 8), Shape(4, 16, 8), Shape(16, 64, 32), Shape(3, 10, 8, node_gpus=4)]
    for name in MODELS:
        for one, other in zip(model.predict(name, shapes), again.predict(name, shapes), strict=True):
            assert other.step_s == pytest.approx(one.step_s, rel=1e-12)
            assert other.high_s == pytest.approx(one.high_s, rel=1e-6)


def test_an_interval_holds_its_prediction_and_bounds_throughput(model: StepModel) -> None:
    answer = model.predict("wide", [Shape(8, 32, 16)])[0]
    assert answer.low_s < answer.step_s < answer.high_s
    assert answer.samples_per_s == pytest.approx(32 * 16 / answer.step_s)
    assert answer.samples_per_s_low == pytest.approx(32 * 16 / answer.high_s)


def test_a_higher_coverage_is_wider(model: StepModel) -> None:
    narrow, wide = (model.predict("wide", [Shape(8, 32, 16)], coverage)[0] for coverage in (0.5, 0.95))
    assert wide.high_s > narrow.high_s


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: d.pop("own"), "own"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d["own"].pop(), "do not fit together"),
        (lambda d: d["own"][0].pop(), "do not fit together"),
        (lambda d: d["covariance_root"].pop(), "do not fit together"),
        (lambda d: d.update(unit_s=0), "unit_s"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d["own_names"].reverse(), "do not fit together"),
    ],
    ids=["missing", "version", "model", "parameter", "covariance", "zero", "unknown", "names"],
)
def test_a_spoilt_model_file_is_refused_in_a_sentence(
    model: StepModel, spoil: Callable[[dict[str, Any]], object], said: str
) -> None:
    document = json.loads(dump(model))
    spoil(document)
    with pytest.raises(StepModelError) as caught:
        load(json.dumps(document))
    assert said in str(caught.value)


def test_text_that_is_no_model_file_is_refused() -> None:
    with pytest.raises(StepModelError, match="not a model file"):
        load("model,nodes\n")


@pytest.mark.parametrize("shape", [Shape(0, 1, 8), Shape(4, 2, 8), Shape(2, 8, 0), Shape(2, 8, 8, node_gpus=2)])
def test_an_impossible_shape_is_refused(model: StepModel, shape: Shape) -> None:
    with pytest.raises(StepModelError):
        model.predict("wide", [shape])


def test_an_unknown_name_says_which_are_known(model: StepModel) -> None:
    with pytest.raises(StepModelError, match="it has dense, small, wide"):
        model.predict("gpt", [Shape(1, 1, 8)])


def profile(step_s: float, sample_s: float) -> list[dict[str, str | None]]:
    return [
        {
            "model": "new",
            "nodes": "1",
            "gpus": "1",
            "local_batch": str(batch),
            "step_time_s": str(step_s + batch * sample_s),
        }
        for batch in (4, 8, 16, 32)
    ]


def test_a_profile_of_one_gpu_teaches_a_new_model(model: StepModel) -> None:
    taught = model.with_profile(table_of(profile(0.07, 0.004)))
    one, many = taught.predict("new", [Shape(1, 1, 24), Shape(8, 32, 24)])
    assert one.step_s == pytest.approx(0.07 + 24 * 0.004, rel=0.03)
    # How much the network carries is not in a profile of one GPU, and the interval says so.
    assert many.step_s >= one.step_s
    assert many.high_s / many.step_s > 1.5 * one.high_s / one.step_s


def test_a_faster_gpu_shortens_compute_and_leaves_the_network(model: StepModel) -> None:
    faster = model.on_other_gpu(2.0)
    alone = [one.predict("wide", [Shape(1, 1, 64)])[0].step_s for one in (model, faster)]
    spread = [one.predict("wide", [Shape(16, 64, 4)])[0].step_s for one in (model, faster)]
    assert alone[0] / alone[1] == pytest.approx(2.0, rel=0.01)
    assert 1.0 < spread[0] / spread[1] < 1.9
    with pytest.raises(StepModelError, match="above 0"):
        model.on_other_gpu(0.0)


def test_the_catalogue_alone_gives_a_wide_interval() -> None:
    workload = Workload(samples=10**6, batch_per_gpu=32, parameters=25_000_000, flops_per_sample=1.2e10)
    slow, fast = (cold_model("resnet", workload, gpu).predict("resnet", [Shape(1, 1, 32)])[0] for gpu in ("T4", "A100"))
    assert fast.step_s < slow.step_s
    assert slow.step_s == pytest.approx(32 * 1.2e10 / (65e12 * 0.35), rel=0.2)
    assert slow.high_s / slow.low_s > 4
    assert np.isfinite(load(dump(cold_model("resnet", workload, "T4"))).predict("resnet", [Shape(4, 16, 32)])[0].step_s)
