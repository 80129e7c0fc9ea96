"""The form fitted to noisy tables of known parameters predicts what the fit has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.steptimes.synthetic_tables import MODELS, drawn, true_parameters
from training.steptimes.fit import fit
from training.steptimes.form import Form, slowest_of
from training.steptimes.intervals import Calibration, conformal_quantile
from training.steptimes.model import fit_model
from training.steptimes.pollux import fit_pollux
from training.steptimes.table import TableError, table_of

SEEN, UNSEEN = (1, 2, 3, 4), (6, 8, 12, 16)


def test_a_fit_on_four_nodes_predicts_sixteen() -> None:
    fitted = fit(drawn(SEEN))
    beyond = drawn(UNSEEN, noise=0.0)
    error = np.abs(fitted.predict(beyond) / beyond.step_s - 1)
    assert error.mean() < 0.05
    published = fit_pollux(drawn(SEEN))
    assert error.mean() < np.abs(published.predict(beyond) / beyond.step_s - 1).mean()


def test_the_same_table_gives_the_same_fit_to_the_bit() -> None:
    table = drawn(SEEN)
    first, second = fit(table), fit(table)
    assert first.own.tobytes() == second.own.tobytes()
    assert first.shared.tobytes() == second.shared.tobytes()


def test_a_few_wild_measurements_do_not_move_the_fit() -> None:
    clean, spoilt = drawn(SEEN), drawn(SEEN)
    spoilt.step_s[::40] *= 5.0
    beyond = drawn(UNSEEN, noise=0.0)
    moved = np.abs(np.log(fit(spoilt).predict(beyond) / fit(clean).predict(beyond)))
    assert moved.max() < 0.08


def test_models_of_one_table_share_what_the_cluster_does() -> None:
    table = drawn(SEEN)
    small = MODELS.index("small")
    # One model was measured on one node alone; the others show what more nodes cost.
    partial = table.where((table.model != small) | (table.nodes == 1))
    beyond = drawn(UNSEEN, noise=0.0)
    rows = beyond.model == small
    error = np.abs(np.log(fit(partial).predict(beyond)[rows] / beyond.step_s[rows]))
    # Its own 5 % scatter and what the others know suffice for a factor of 1.5; how much it moves stays open.
    assert error.mean() < 0.4
    doubt = fit(partial).doubt_log(beyond)
    assert doubt[rows].mean() > 3 * doubt[~rows].mean()


def test_a_model_without_rows_cannot_be_fitted() -> None:
    table = drawn(SEEN)
    with pytest.raises(TableError, match="no measurement of dense"):
        fit(table.where(table.model != 0))


def test_sync_times_may_be_missing() -> None:
    table = drawn(SEEN)
    table.sync_s[:] = np.nan
    beyond = drawn(UNSEEN, noise=0.0)
    assert np.abs(fit(table).predict(beyond) / beyond.step_s - 1).mean() < 0.08


def test_one_row_is_enough_to_fit_without_an_error() -> None:
    row = {"model": "one", "nodes": "1", "gpus": "1", "local_batch": "8", "step_time_s": "0.5"}
    table = table_of([row])
    assert fit(table).predict(table)[0] == pytest.approx(0.5, rel=0.05)


def test_the_slowest_of_more_is_slower() -> None:
    slowest = slowest_of(np.array([1.0, 2.0, 4.0, 64.0, 4096.0]))
    assert slowest[0] == 0.0
    assert (np.diff(slowest) > 0).all()
    draws = np.random.default_rng(1).standard_normal((20_000, 64)).max(axis=1).mean()
    assert slowest[3] == pytest.approx(draws, rel=0.02)


def test_more_nodes_and_larger_batches_never_run_faster_steps() -> None:
    own, shared = true_parameters()
    table = drawn((1, 3, 4, 8, 16), noise=0.0)
    step, _ = Form(table, 0.1).steps(own, shared)
    for model in range(len(MODELS)):
        for gpus in (1, 2, 3, 4):
            rows = (table.model == model) & (table.node_gpus == gpus)
            by_nodes = [step[rows & (table.nodes == nodes) & (table.batch == 8)][0] for nodes in (1, 3, 4, 8, 16)]
            assert by_nodes == sorted(by_nodes)


def test_conformal_quantile_has_the_finite_sample_correction() -> None:
    scores = np.arange(1.0, 20.0)  # 19 scores
    assert conformal_quantile(scores, 0.9) == 18.0  # the ceil(20 x 0.9)-th
    assert conformal_quantile(scores[:3], 0.9) == 3.0


def test_intervals_state_what_they_cover_on_unseen_rows_of_seen_node_counts() -> None:
    model = fit_model(drawn(SEEN))
    fresh = drawn(SEEN, seed=7)
    step, half = model.predict_table(fresh)
    covered = (np.abs(np.log(fresh.step_s / step)) <= half).mean()
    assert 0.85 <= covered <= 0.95


def test_intervals_widen_with_the_distance_of_extrapolation() -> None:
    calibration = Calibration(np.arange(1.0, 101.0), np.array([0.02]), 0.5, 4.0)
    near, same, far = calibration.half_width_log(0, np.array([2.0, 4.0, 16.0]))
    assert near == same
    assert far == pytest.approx(2.0 * same)


def test_beyond_a_kind_of_network_that_was_never_seen_the_interval_is_wide() -> None:
    scores = np.arange(1.0, 101.0)
    on_two, on_three = (Calibration(scores, np.array([0.001]), 0.5, nodes) for nodes in (2.0, 3.0))
    assert on_two.half_width_log(0, np.array([4.0]))[0] >= 0.5
    assert on_two.half_width_log(0, np.array([2.0]))[0] < 0.1
    assert Calibration(scores, np.array([0.001]), 0.5, 1.0).half_width_log(0, np.array([2.0]))[0] >= 1.0
    assert on_three.half_width_log(0, np.array([4.0]))[0] < 0.2
