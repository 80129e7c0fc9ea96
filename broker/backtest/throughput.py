"""Measured training speeds: steps per second of model families by GPU type and count.

Columns: `gpu_type`, `consolidated` (yes: in one node, no: over nodes), `job_type` (the model family),
`gpus`, `steps_per_s`; 0 says that it does not run there (out of memory). The form of the published table
of Gavel (OSDI'20).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.backtest.errors import TableError
from broker.backtest.rows import rows

COLUMNS: Final = ("gpu_type", "consolidated", "job_type", "gpus", "steps_per_s")
# Up to this many GPUs a job is taken to lie within one node, as the clusters of the trace had them.
NODE_GPUS: Final = 8

Real = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Throughput:
    """Steps/s by (model, GPU type, GPUs), in one node and over nodes; what was not measured is absent."""

    name: str
    gpu_types: tuple[str, ...]
    models: tuple[str, ...]
    in_node: dict[tuple[str, str, int], float]
    over_nodes: dict[tuple[str, str, int], float]

    def speed(self, model: str, gpu_type: str, gpus: int) -> float:
        """Return steps/s, 0 where the model does not run so or nothing was measured.

        Up to a node's GPUs the measured figure in one node; between measured counts, the speed per
        GPU of the next lower one. Beyond a node, the figure measured over nodes for a node's worth of
        GPUs, times the number of nodes (weak scaling: the step grows with the GPUs, and what slows
        it further beyond two nodes is not in the table).
        """
        if gpus > NODE_GPUS:
            return self.over_nodes.get((model, gpu_type, NODE_GPUS), 0.0) * gpus / NODE_GPUS
        exact = self.in_node.get((model, gpu_type, gpus))
        if exact is not None:
            return exact
        lower = [count for count in range(gpus - 1, 0, -1) if (model, gpu_type, count) in self.in_node]
        if not lower or all((model, gpu_type, more) not in self.in_node for more in range(gpus + 1, NODE_GPUS + 1)):
            return 0.0
        return self.in_node[model, gpu_type, lower[0]] * gpus / lower[0]

    def speeds(self, gpu_types: tuple[str, ...], counts: Int) -> Real:
        """Return [model, gpu type, count] speeds. Raises TableError for a type that the table lacks."""
        for gpu_type in gpu_types:
            self.require(gpu_type, "the sites file")
        return np.array(
            [
                [[self.speed(model, gpu_type, int(gpus)) for gpus in counts] for gpu_type in gpu_types]
                for model in self.models
            ]
        ).reshape(len(self.models), len(gpu_types), len(counts))

    def require(self, gpu_type: str, where: str) -> None:
        """Raise TableError where the table has no such GPU type."""
        if gpu_type not in self.gpu_types:
            raise TableError(
                f"{where} names the GPU type {gpu_type!r}, which {self.name} has no measurements of; "
                f"it has {', '.join(self.gpu_types)}"
            )


# Without a table there is one model, equally fast on every GPU and linear in their number.
UNIFORM_MODEL: Final = "uniform"


def uniform(gpu_types: tuple[str, ...]) -> Throughput:
    """Return the table that stands in where none is given: all GPUs equal, speed linear in their number."""
    in_node = {
        (UNIFORM_MODEL, gpu_type, gpus): float(gpus) for gpu_type in gpu_types for gpus in range(1, NODE_GPUS + 1)
    }
    over = {(UNIFORM_MODEL, gpu_type, NODE_GPUS): float(NODE_GPUS) for gpu_type in gpu_types}
    return Throughput("no table", gpu_types, (UNIFORM_MODEL,), in_node, over)


def read_throughput(path: Path) -> Throughput:
    """Read a throughput table. Raises TableError with the line of the first fault."""
    in_node: dict[tuple[str, str, int], float] = {}
    over_nodes: dict[tuple[str, str, int], float] = {}
    types: dict[str, None] = {}
    models: dict[str, None] = {}
    for line, row in rows(path, COLUMNS, (), TableError):
        where = f"{path.name} line {line}"
        if row["consolidated"] not in {"yes", "no"}:
            raise TableError(f"{where}: consolidated is {row['consolidated'][:60]!r}; it must be yes or no")
        try:
            gpus, speed = int(row["gpus"]), float(row["steps_per_s"])
        except ValueError:
            raise TableError(f"{where}: gpus must be a whole number and steps_per_s a number") from None
        if gpus < 1 or not math.isfinite(speed) or speed < 0:
            raise TableError(f"{where}: gpus must be at least 1 and steps_per_s 0 or more")
        model, gpu_type = row["job_type"].strip(), row["gpu_type"].strip()
        if not model or not gpu_type:
            raise TableError(f"{where}: job_type and gpu_type must not be empty")
        table = in_node if row["consolidated"] == "yes" else over_nodes
        if (model, gpu_type, gpus) in table:
            raise TableError(f"{where}: {model} on {gpus} x {gpu_type} stands twice")
        types[gpu_type] = models[model] = None
        table[model, gpu_type, gpus] = speed
    if not in_node:
        raise TableError(f"{path.name}: the table has no measurement within one node")
    return Throughput(path.name, tuple(types), tuple(models), in_node, over_nodes)
