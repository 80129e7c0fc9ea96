"""Tables of step times drawn from known parameters, with known noise."""

from __future__ import annotations

import numpy as np

from training.steptimes.fit import prior
from training.steptimes.form import OWN, Form
from training.steptimes.table import StepTable, table_of

MODELS = ("dense", "small", "wide")
TRUE_SECONDS = {  # overhead, per sample, transfer
    "dense": (0.20, 0.0500, 0.25),
    "small": (0.01, 0.0004, 0.01),
    "wide": (0.07, 0.0040, 0.12),
}


def true_parameters() -> tuple[np.ndarray, np.ndarray]:
    mean, shared = prior()
    own = np.tile(mean, (len(MODELS), 1))
    for row, name in enumerate(MODELS):
        for column, value in zip(("overhead_s", "sample_s", "transfer_s"), TRUE_SECONDS[name], strict=True):
            own[row, OWN.index(column)] = np.log(value)
    return own, shared


def drawn(
    nodes: tuple[int, ...], *, noise: float = 0.05, seed: int = 0, batches: tuple[int, ...] = (4, 8, 16, 32)
) -> StepTable:
    rows = [
        {"model": name, "part": "", "nodes": str(k), "gpus": str(k * g), "local_batch": str(b), "step_time_s": "1"}
        for name in MODELS
        for k in nodes
        for g in (1, 2, 3, 4)
        for b in batches
    ]
    table = table_of(rows)
    own, shared = true_parameters()
    step, local = Form(table, 0.1).steps(own, shared)
    draws = np.random.default_rng(seed)
    measured = step * np.exp(noise * draws.standard_normal(len(table)))
    table.step_s[:] = measured
    table.sync_s[:] = np.maximum(measured - local, 0.0)
    return table


def csv_text(table: StepTable) -> str:
    lines = ["model,part,gpus_per_node,nodes,gpus,local_batch,step_time_s,sync_time_s"]
    for row in range(len(table)):
        part = "placements" if table.nodes[row] <= 4 else "scalability"
        lines.append(
            f"{table.models[table.model[row]]},{part},,{table.nodes[row]:.0f},{table.gpus[row]:.0f},"
            f"{table.batch[row]:.0f},{table.step_s[row]:.9g},{table.sync_s[row]:.9g}"
        )
    return "\n".join(lines) + "\n"
