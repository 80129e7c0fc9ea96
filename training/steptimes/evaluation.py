"""Score a model on a table that it was not fitted to, beside the published form fitted to the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.steptimes.intervals import COVERAGE
from training.steptimes.model import StepModel, renamed
from training.steptimes.pollux import PolluxFit
from training.steptimes.table import Floats, StepTable


@dataclass(frozen=True, slots=True)
class Score:
    """Absolute percentage errors of one model (or all), in percent; `covered` is a share."""

    name: str
    rows: int
    mean: float
    median: float
    p95: float
    bias: float
    covered: float
    half_width: float
    reference_mean: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by model; `overall` averages the models, each alike."""

    scores: tuple[Score, ...]
    overall: Score
    table: StepTable
    predicted_s: Floats
    half_width_log: Floats


def evaluate(model: StepModel, reference: PolluxFit, table: StepTable, coverage: float = COVERAGE) -> Evaluation:
    """Return the scores of `model` and of `reference` on `table`."""
    asked = renamed(table, model.fitted.models)
    step, half = model.predict_table(asked, coverage)
    other = reference.predict(asked)
    error, other_error = 100 * (step / asked.step_s - 1), 100 * (other / asked.step_s - 1)
    inside = np.abs(np.log(asked.step_s / step)) <= half
    scores = []
    for index, name in enumerate(asked.models):
        rows = asked.model == index
        if rows.any():
            scores.append(_score(name, error[rows], other_error[rows], inside[rows], half[rows]))
    names = ("mean", "median", "p95", "bias", "covered", "half_width", "reference_mean")
    means = {name: float(np.mean([getattr(score, name) for score in scores])) for name in names}
    overall = Score(name="all models", rows=len(asked), **means)
    return Evaluation(tuple(scores), overall, asked, step, half)


def _score(name: str, error: Floats, other: Floats, inside: Floats, half: Floats) -> Score:
    size = np.abs(error)
    return Score(
        name=name,
        rows=len(error),
        mean=float(size.mean()),
        median=float(np.median(size)),
        p95=float(np.quantile(size, 0.95)),
        bias=float(error.mean()),
        covered=float(inside.mean()),
        half_width=float(100 * np.mean(np.exp(half) - 1)),
        reference_mean=float(np.abs(other).mean()),
    )
