"""The published seven-parameter form of Pollux (OSDI'21), fitted in the same way, as a reference.

    compute = a_c + b_c m            m the local batch
    sync    = 0                      one GPU
              a_l + b_l (n - 2)      n GPUs on one node
              a_r + b_r (n - 2)      n GPUs on several
    step    = (compute^gamma + sync^gamma)^(1/gamma),  1 <= gamma <= 10

fitted per model to log step times, each model alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import least_squares

from training.steptimes.table import Floats, StepTable

GAMMA_MAX: Final = 10.0


@dataclass(frozen=True, slots=True)
class PolluxFit:
    """Logarithms of the six seconds and gamma - 1, by model."""

    models: tuple[str, ...]
    parameters: Floats

    def predict(self, table: StepTable) -> Floats:
        """Return the predicted step of each row in seconds."""
        assert table.models == self.models
        return _steps(self.parameters[table.model].T, table)


def fit_pollux(table: StepTable) -> PolluxFit:
    """Return the reference form fitted to each model of `table`."""
    rows = [_fit_one(table.where(table.model == model)) for model in range(len(table.models))]
    return PolluxFit(table.models, np.array(rows))


def _fit_one(table: StepTable) -> Floats:
    shortest, batch = float(table.step_s.min()), float(table.batch.max())
    seconds = [0.5 * shortest, 0.5 * shortest / batch, 0.1 * shortest, 0.01 * shortest, 0.3 * shortest, 0.01 * shortest]
    start = np.array([*np.log(seconds), 0.0])
    measured = np.log(table.step_s)

    def residuals(x: Floats) -> Floats:
        result: Floats = np.log(_steps(np.repeat(x[:, None], len(table), axis=1), table)) - measured
        return result

    bounds = (np.array([-40.0] * 7), np.array([20.0] * 6 + [float(np.log(GAMMA_MAX - 1))]))
    parameters: Floats = least_squares(residuals, start, bounds=bounds, max_nfev=400).x
    return parameters


def _steps(logs: Floats, table: StepTable) -> Floats:
    a_c, b_c, a_l, b_l, a_r, b_r, above_one = np.exp(logs)
    beyond = np.maximum(table.gpus - 2, 0)
    inside = a_l + b_l * beyond
    sync = np.where(table.gpus == 1, 0.0, np.where(table.nodes > 1, a_r + b_r * beyond, inside))
    gamma, compute = 1 + above_one, a_c + b_c * table.batch
    # The longer of both stands outside, so that no power overflows.
    longer, shorter = np.maximum(compute, sync), np.minimum(compute, sync)
    result: Floats = longer * (1 + (shorter / longer) ** gamma) ** (1 / gamma)
    return result
