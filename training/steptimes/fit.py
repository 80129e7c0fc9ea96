"""Fit the closed form to a table: robust, pooled between models, the same at every run.

Every parameter that describes the cluster rather than the model is drawn towards the mean of all
models of the table (partial pooling, as in a hierarchical model with stated widths), so that a model
with few measurements, or few on many nodes, borrows what the others show. The loss is a pseudo-Huber
of log errors. Rows of one shape share their noise, hence the likelihood is tempered; every node
count of a model weighs alike, since large tables are mostly of one. Where exposed waiting
(`sync_s`) was measured, what remains of the step is fitted as a second signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import least_squares

from training.steptimes.form import OWN, SHARED, Form
from training.steptimes.table import Floats, StepTable, TableError

# Per parameter of OWN: where the pooled mean starts (a logarithm of it is used), how wide the mean
# may move, and how far a model may lie from it; None is free. `transfer_s` counts as a multiple of the
# model's shortest step: a model measured on one GPU alone moves about as much as others do. They are orders of magnitude, not
# figures of one cluster: one width is a factor of e.
_POOLED: Final[dict[str, tuple[float, float, float] | None]] = {
    "overhead_s": None,
    "sample_s": None,
    "host": (0.2, 1.5, 1.5),
    "straggle": (0.02, 1.5, 0.7),
    "latency": (0.1, 1.5, 1.0),
    "fabric": (0.2, 1.5, 0.7),
    "latency_between": (0.2, 1.5, 0.5),
    "transfer_s": (0.3, 1.5, 1.5),
    "wait": (0.15, 1.0, 0.3),
    "crosstalk": (0.02, 1.5, 1.0),
}
# Per parameter of SHARED: where it starts, in its own scale, and how wide it may move.
_SHARED: Final[dict[str, tuple[float, float]]] = {
    "spread": (-1.0, 0.7),
    "first": (-1.0, 0.7),
    "contention": (float(np.log(0.2)), 0.7),
    "power": (0.0, 0.3),
    "contention_two": (float(np.log(0.5)), 0.7),
    "scale_two": (0.0, 0.3),
}
# What a single measurement scatters (log), and how many rows share one draw of that scatter.
SCATTER: Final = 0.06
ROWS_ALIKE: Final = 10.0
EVALUATIONS_MAX: Final = 80
_STEP: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit found: `own` by model and OWN, the pooled `mean` by OWN (NaN where free), `shared`.

    `covariance` is of own (model by model) and shared together, as far as the measurements leave
    them open (Laplace's approximation).
    """

    models: tuple[str, ...]
    own: Floats
    mean: Floats
    shared: Floats
    unit_s: float
    covariance: Floats

    def predict(self, table: StepTable) -> Floats:
        """Return the predicted step of each row in seconds; the table's models must be the fit's."""
        assert table.models == self.models
        return Form(table, self.unit_s).steps(self.own, self.shared)[0]

    def doubt_log(self, table: StepTable) -> Floats:
        """Return how far each prediction's logarithm is open (one standard deviation), noise not counted."""
        form, width, size = Form(table, self.unit_s), len(OWN), self.own.size
        base = np.log(form.steps(self.own, self.shared)[0])
        slopes = np.empty((len(table), width + len(SHARED)))
        places = np.empty((len(table), width + len(SHARED)), dtype=np.int64)
        for column in range(width + len(SHARED)):
            own, shared = self.own.copy(), self.shared.copy()
            if column < width:
                own[:, column] += _STEP
                places[:, column] = table.model * width + column
            else:
                shared[column - width] += _STEP
                places[:, column] = size + column - width
            slopes[:, column] = (np.log(form.steps(own, shared)[0]) - base) / _STEP
        variance = np.empty(len(table))
        for model in np.unique(table.model):
            rows = np.flatnonzero(table.model == model)
            block = self.covariance[np.ix_(places[rows[0]], places[rows[0]])]
            variance[rows] = np.einsum("ri,ij,rj->r", slopes[rows], block, slopes[rows])
        return np.sqrt(np.maximum(variance, 0.0))


def fit(table: StepTable, held: Fitted | None = None) -> Fitted:
    """Return the fit to `table`; with `held`, only each model's own parameters move.

    `held` is a fit of the same cluster: its shared parameters and pooled means are kept, so that a
    model that it has not seen needs few measurements. TableError where a model has no row.
    """
    present = np.unique(table.model)
    if len(present) < len(table.models):
        missing = ", ".join(name for i, name in enumerate(table.models) if i not in present)
        message = f"no measurement of {missing} to fit; measure at least one GPU with two batch sizes"
        raise TableError(message)
    problem = _Problem(table, held)
    solution = least_squares(
        problem.residuals, problem.start, jac=problem.slopes, max_nfev=EVALUATIONS_MAX, xtol=1e-6, ftol=1e-6
    )
    return problem.fitted(solution.x, solution.jac)


def prior() -> tuple[Floats, Floats]:
    """Return where the pooled means (logarithms by OWN, NaN where free) and the shared parameters start."""
    mean = [np.nan if pooled is None else float(np.log(pooled[0])) for pooled in _POOLED.values()]
    return np.array(mean), np.array([start for start, _ in _SHARED.values()])


class _Problem:
    """Residuals and slopes over one vector: own (model by model), then pooled means, then shared."""

    def __init__(self, table: StepTable, held: Fitted | None) -> None:
        self.table, self.held = table, held
        self.unit_s = held.unit_s if held is not None else _unit_s(table)
        self.form = Form(table, self.unit_s)
        self.models, self.width = len(table.models), len(OWN)
        self.pooled = [column for column, name in enumerate(OWN) if _POOLED[name] is not None]
        self.log_step = np.log(table.step_s)
        local_s = table.step_s - table.sync_s
        # Exposed waiting that takes nearly the whole step leaves a remainder of noise.
        self.local_known = np.isfinite(local_s) & (local_s > 0.05 * table.step_s)
        self.log_local = np.log(np.where(self.local_known, local_s, 1.0))
        self.weight = _weights(table)
        # What a pooled parameter is counted from, as a logarithm: nothing, or the model's shortest step.
        self.origin = np.zeros((self.models, self.width))
        self.origin[:, OWN.index("transfer_s")] = np.log(_shortest_s(table))
        self.start = np.concatenate([_start(table).ravel(), *self._common(held)])

    def _common(self, held: Fitted | None) -> list[Floats]:
        mean, shared = prior()
        return [] if held is not None else [mean[self.pooled], shared]

    def split(self, x: Floats) -> tuple[Floats, Floats, Floats]:
        """Return own, means of the pooled columns, and shared."""
        size = self.models * self.width
        own = x[:size].reshape(self.models, self.width)
        if self.held is not None:
            return own, self.held.mean[self.pooled], self.held.shared
        return own, x[size : size + len(self.pooled)], x[size + len(self.pooled) :]

    def fitted(self, x: Floats, slopes: Floats) -> Fitted:
        own, mean, shared = self.split(x)
        whole = np.linalg.pinv(slopes.T @ slopes, hermitian=True)
        kept = np.r_[0 : own.size, own.size + len(self.pooled) : len(x)]
        covariance = whole[np.ix_(kept, kept)]
        if self.held is not None:
            covariance = np.zeros((own.size + len(SHARED), own.size + len(SHARED)))
            covariance[: own.size, : own.size] = whole
            covariance[own.size :, own.size :] = self.held.covariance[-len(SHARED) :, -len(SHARED) :]
        every = np.full(self.width, np.nan)
        every[self.pooled] = mean
        return Fitted(self.table.models, own.copy(), every, shared.copy(), self.unit_s, covariance)

    def residuals(self, x: Floats) -> Floats:
        return np.concatenate([self._data(x), self._prior(x)])

    def _data(self, x: Floats) -> Floats:
        own, _, shared = self.split(x)
        step, local = self.form.steps(own, shared)
        stepping = (np.log(step) - self.log_step) / SCATTER
        computing = np.where(self.local_known, (np.log(local) - self.log_local) / SCATTER, 0.0)
        return np.concatenate([self.weight * _robust(stepping), self.weight * _robust(computing)])

    def _prior(self, x: Floats) -> Floats:
        own, mean, shared = self.split(x)
        pooled = [_POOLED[OWN[column]] for column in self.pooled]
        apart = [
            (own[:, c] - self.origin[:, c] - m) / p[2]
            for c, m, p in zip(self.pooled, mean, pooled, strict=True)
            if p is not None
        ]
        if self.held is not None:
            return np.concatenate(apart)
        moved = [(m - np.log(p[0])) / p[1] for m, p in zip(mean, pooled, strict=True) if p is not None]
        common = [(value - start) / wide for value, (start, wide) in zip(shared, _SHARED.values(), strict=True)]
        return np.concatenate([*apart, moved, common])

    def slopes(self, x: Floats) -> Floats:
        """Return the derivatives of `residuals`: one evaluation moves one parameter of all models."""
        data, prior = self._data(x), self._prior(x)
        size = self.models * self.width
        matrix = np.zeros((len(data) + len(prior), len(x)))
        rows_of = [np.flatnonzero(np.tile(self.table.model, 2) == model) for model in range(self.models)]
        for column in range(self.width):
            moved = x.copy()
            moved[column : size : self.width] += _STEP
            slope = (self._data(moved) - data) / _STEP
            for model, rows in enumerate(rows_of):
                matrix[rows, model * self.width + column] = slope[rows]
        for column in range(len(x)):
            moved = x.copy()
            moved[column] += _STEP
            matrix[len(data) :, column] = (self._prior(moved) - prior) / _STEP
            if column >= size + len(self.pooled):
                matrix[: len(data), column] = (self._data(moved) - data) / _STEP
        return matrix


def _robust(residual: Floats) -> Floats:
    """Return the signed root of the pseudo-Huber loss, so that its square is the loss."""
    loss = np.sqrt(2 * (np.sqrt(1 + residual * residual) - 1))
    result: Floats = np.sign(residual) * loss
    return result


def _weights(table: StepTable) -> Floats:
    """Return a weight for each row: every node count of a model alike, and rows alike count once."""
    key = table.model * (int(table.nodes.max()) + 1) + table.nodes.astype(np.int64)
    _, place, count = np.unique(key, return_inverse=True, return_counts=True)
    share = len(table) / len(count) / count[place]
    # A table smaller than ROWS_ALIKE rows a group holds no crowd to discount.
    alike = np.minimum(ROWS_ALIKE, count.mean())
    result: Floats = np.sqrt(share / alike)
    return result


def _unit_s(table: StepTable) -> float:
    return float(np.exp(np.mean(np.log(_shortest_s(table)))))


def _shortest_s(table: StepTable) -> Floats:
    return np.array([table.step_s[table.model == model].min() for model in range(len(table.models))])


def _start(table: StepTable) -> Floats:
    """Return where the fit starts: a line through the one-GPU rows, the rest from orders of magnitude."""
    own = np.zeros((len(table.models), len(OWN)))
    for column, name in enumerate(OWN):
        pooled = _POOLED[name]
        own[:, column] = np.log(pooled[0]) if pooled is not None else 0.0
    for model in range(len(table.models)):
        rows = table.model == model
        fewest = rows & (table.gpus == table.gpus[rows].min())
        shortest = float(table.step_s[rows].min())
        relative = np.stack([np.ones(fewest.sum()), table.batch[fewest]], axis=1) / table.step_s[fewest][:, None]
        line = np.linalg.lstsq(relative, np.ones(int(fewest.sum())), rcond=None)[0]
        overhead_s = max(float(line[0]), 1e-3 * shortest)
        sample_s = max(float(line[1]), 1e-3 * shortest / float(table.batch[rows].max()))
        own[model, :2] = np.log([overhead_s, sample_s])
        own[model, OWN.index("transfer_s")] = np.log(0.3 * shortest)
    return own


assert tuple(_POOLED) == OWN
assert tuple(_SHARED) == SHARED
