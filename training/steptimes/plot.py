"""A picture of predicted against measured step times with their intervals, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from training.errors import TrainingError
from training.steptimes.evaluation import Evaluation

POINTS_MAX: Final = 400
COLUMNS: Final = 3


class PlotError(TrainingError):
    """A picture that cannot be drawn here."""

    code = "plot.failed"


def draw(evaluation: Evaluation, path: Path, title: str) -> None:
    """Write a panel for each model: measured over predicted, the interval as a bar; PlotError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  drawing is optional, and slow to load
        from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter  # noqa: PLC0415  the same
    except ImportError:
        message = "pictures need matplotlib, which is not installed here; install hansa with its extra `plots`"
        raise PlotError(message) from None
    scores, table = evaluation.scores, evaluation.table
    lines = -(-len(scores) // COLUMNS)
    figure = Figure(figsize=(4.2 * min(COLUMNS, len(scores)), 3.9 * lines + 0.5), layout="constrained")
    figure.suptitle(title)
    for place, score in enumerate(scores):
        axes = figure.add_subplot(lines, min(COLUMNS, len(scores)), place + 1)
        rows = np.flatnonzero(table.model == table.models.index(score.name))
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), POINTS_MAX)).astype(int)]
        measured, predicted = table.step_s[rows], evaluation.predicted_s[rows]
        factor = np.exp(evaluation.half_width_log[rows])
        inside = np.abs(np.log(measured / predicted)) <= evaluation.half_width_log[rows]
        bars = np.stack([predicted - predicted / factor, predicted * factor - predicted])
        axes.errorbar(measured, predicted, yerr=bars, fmt="none", ecolor="#9db4c8", elinewidth=0.5, alpha=0.5, zorder=1)
        for chosen, colour, label in ((inside, "#1f5f8b", "inside its interval"), (~inside, "#c0392b", "outside")):
            axes.scatter(measured[chosen], predicted[chosen], s=9, color=colour, label=label, zorder=3)
        ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
        axes.plot(ends, ends, color="#444444", linewidth=0.8, zorder=2)
        axes.set(xscale="log", yscale="log", xlabel="measured step, s", ylabel="predicted step, s")
        axes.set_title(f"{score.name}: {score.mean:.1f} % error, {100 * score.covered:.0f} % inside", fontsize=10)
        axes.tick_params(which="both", labelsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            # Steps of one model span less than a decade, where decades' ticks would be too few.
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        if place == 0:
            axes.legend(fontsize=8, loc="upper left", frameon=False)
    figure.savefig(path, dpi=110, format="png")
