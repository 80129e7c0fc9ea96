"""How far off a prediction may be: split conformal intervals on log errors.

Errors grow with the distance of extrapolation, so the table itself is extrapolated: fits on its
smaller node counts predict the larger, and fits without some shapes predict those. Each such error
is divided by its model's own scatter and by

    1 + growth d,   d = log2(nodes / most nodes that the fit has seen), at least 0,

with the growth at which near and far errors have the same quantile, and at least GROWTH_MIN: what a
table can hold out lies near what it keeps, and says little of four times as many nodes. The quantile of what results,
with the finite-sample correction of split conformal prediction (Vovk; Lei et al. 2018), times the
same scale is the half-width of the interval in log step time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from training.steptimes.fit import SCATTER, fit
from training.steptimes.table import Floats, Integers, Mask, StepTable

COVERAGE: Final = 0.90
FOLDS: Final = 3
# By how much an interval widens for each doubling of the nodes, of its width where the fit has seen
# as many: the least, and what is searched.
GROWTH_MIN: Final = 0.5
GROWTHS: Final = np.linspace(GROWTH_MIN, 3.0, 51)
# A model's scatter is a mean of its own and of this many errors that scatter as all do.
SHRINK_ROWS: Final = 30.0
# Fewer errors than these say nothing about a 90 % quantile: the widest known scatter is assumed.
ERRORS_MIN: Final = 20
UNCALIBRATED_LOG: Final = 0.5
# One node, two and more are three kinds of network. What has seen fewer than three nodes has not seen
# the kind that it is asked for beyond, and no error of its own can say how far off it is there.
TREND_NODES_MIN: Final = 3.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """Sorted `scores`, scatter by model, the growth with distance, and the most nodes seen."""

    scores: Floats
    scatter: Floats
    growth: float
    nodes_max: float

    def half_width_log(self, model: Integers | int, nodes: Floats | float, coverage: float = COVERAGE) -> Floats:
        """Return the half-width of the interval in log step time."""
        if len(self.scores) < ERRORS_MIN:
            return np.full(np.shape(nodes), UNCALIBRATED_LOG)
        distance = np.log2(np.maximum(np.asarray(nodes, dtype=np.float64) / self.nodes_max, 1.0))
        result: Floats = (
            conformal_quantile(self.scores, coverage)
            * self.scatter[np.asarray(model, dtype=np.int64)]
            * (1 + self.growth * distance)
        )
        if self.nodes_max < TREND_NODES_MIN:
            unseen = UNCALIBRATED_LOG if self.nodes_max > 1 else 2 * UNCALIBRATED_LOG
            result = np.where(distance > 0, np.hypot(result, unseen), result)
        return result


def conformal_quantile(scores: Floats, coverage: float) -> float:
    """Return the ceil((n + 1) coverage)-th smallest of `scores`, the largest where n is too small."""
    rank = int(np.ceil((len(scores) + 1) * coverage))
    return float(np.sort(scores)[min(rank, len(scores)) - 1])


def calibrate(table: StepTable, progress: Callable[[str], None] | None = None) -> Calibration:
    """Return the calibration of the form on `table`, whose fit is to use all of it."""
    errors, model, distance = _held_out(table, progress or (lambda _stage: None))
    scatter = _scatter(errors, model, distance, len(table.models))
    if len(errors) < ERRORS_MIN:
        return Calibration(np.empty(0), scatter, 0.0, float(table.nodes.max()))
    relative = np.abs(errors) / scatter[model]
    growth = _growth(relative, distance)
    scores = np.sort(relative / (1 + growth * distance))
    return Calibration(scores, scatter, growth, float(table.nodes.max()))


def _held_out(table: StepTable, tell: Callable[[str], None]) -> tuple[Floats, Integers, Floats]:
    """Return log errors of fits that have not seen the rows, with model and distance of each."""
    parts = []
    for cut in _cuts(table):
        tell(f"calibrating: fitted up to {cut:.0f} nodes, asked beyond")
        parts.append(_errors(table, table.nodes <= cut, table.nodes > cut))
    shape = np.unique(
        np.stack([table.model, table.nodes, table.gpus, table.node_gpus], axis=1), axis=0, return_inverse=True
    )[1].ravel()
    for fold in range(FOLDS):
        tell(f"calibrating: shapes left out, {fold + 1} of {FOLDS}")
        held = shape % FOLDS == fold
        parts.append(_errors(table, ~held, held))
    kept = [part for part in parts if part is not None]
    if not kept:
        return np.empty(0), np.empty(0, dtype=np.int64), np.empty(0)
    errors, models, distances = zip(*kept, strict=True)
    return np.concatenate(errors), np.concatenate(models), np.concatenate(distances)


def _cuts(table: StepTable) -> list[float]:
    """Return the node counts up to which a fit knows enough to extrapolate: two above one.

    Two nodes are a case of their own (a ring with a single peer), so one such count shows no trend.
    """
    levels = [float(level) for level in np.unique(table.nodes)]
    several = [level for level in levels if level > 1]
    return several[1:-1]


def _errors(table: StepTable, seen: Mask, asked: Mask) -> tuple[Floats, Integers, Floats] | None:
    """Fit to `seen`, predict `asked`; None where a model would be asked that was not seen."""
    known = np.isin(table.model, np.unique(table.model[seen]))
    asked = asked & known
    if not asked.any() or len(np.unique(table.model[seen])) < len(table.models):
        return None
    train, test = table.where(seen), table.where(asked)
    errors = np.log(test.step_s) - np.log(fit(train).predict(test))
    distance = np.log2(np.maximum(test.nodes / train.nodes.max(), 1.0))
    return errors, test.model, distance


def _scatter(errors: Floats, model: Integers, distance: Floats, models: int) -> Floats:
    """Return each model's scatter: the median absolute near error, drawn towards that of all."""
    if not len(errors):
        return np.full(models, SCATTER)
    near = np.abs(errors[distance == 0]) if (distance == 0).any() else np.abs(errors)
    whose = model[distance == 0] if (distance == 0).any() else model
    everyone = max(float(np.median(near)), 1e-3)
    result = np.empty(models)
    for one in range(models):
        own = near[whose == one]
        mine = max(float(np.median(own)), 1e-3) if len(own) else everyone
        result[one] = np.exp((len(own) * np.log(mine) + SHRINK_ROWS * np.log(everyone)) / (len(own) + SHRINK_ROWS))
    return result


def _growth(relative: Floats, distance: Floats) -> float:
    """Return the growth at which near and far errors have quantiles as equal as can be."""
    near = distance == 0
    if not near.any() or near.all():
        return 1.0
    near_quantile = conformal_quantile(relative[near], COVERAGE)
    apart = [
        abs(np.log(conformal_quantile(relative[~near] / (1 + growth * distance[~near]), COVERAGE) / near_quantile))
        for growth in GROWTHS
    ]
    return float(GROWTHS[int(np.argmin(apart))])
