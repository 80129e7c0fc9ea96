"""Measured training speeds that the peers' problems are drawn from: a table of steps/s by GPU type.

A file in the form `gpu_type,consolidated,job_type,gpus,steps_per_s` (as published with Gavel) is
read where one is named; without one a table of the same form is generated from a seed. Nothing of
a file is kept here. `instances` draws jobs from these tables.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from broker.allocation.instance import Real

GPU_TYPES: Final = ("k80", "p100", "v100")
SCALES: Final = (1, 2, 4, 8)

# The generated table's families: steps/s at the smallest batch on the slowest GPU, gain of the two
# faster types, exponent of the gain with more GPUs. Magnitudes are those of common vision,
# language and recommendation models; the figures are made up.
_FAMILIES: Final = (
    ("vision small", 6.0, (6.0, 8.0), 0.9, 5),
    ("vision large", 2.3, (4.2, 6.0), 0.85, 4),
    ("translation", 5.0, (2.4, 4.0), 0.6, 5),
    ("language", 25.0, (3.4, 4.2), 0.55, 5),
    ("recommendation", 33.0, (1.6, 0.8), 0.0, 5),
    ("control", 3.4, (1.7, 2.1), 0.0, 1),
    ("image to image", 0.5, (4.8, 8.9), 0.0, 1),
)


class Speeds(NamedTuple):
    """Steps/s by (job type, GPUs), one per GPU type, 0 where it does not run; `source` says whence."""

    source: str
    gpu_types: tuple[str, ...]
    steps_per_s: dict[tuple[str, int], Real]

    def job_types(self, gpus: int) -> list[str]:
        """Return the job types measured on this many GPUs, in order of name."""
        return sorted(name for name, count in self.steps_per_s if count == gpus)


def read_or_generate(path: Path | None, seed: int) -> Speeds:
    """Return the table of a file, or a generated one."""
    return _read(path) if path else _generate(seed)


def _read(path: Path) -> Speeds:
    rows: dict[tuple[str, int], dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["consolidated"] == "yes":
                rows.setdefault((row["job_type"], int(row["gpus"])), {})[row["gpu_type"]] = float(row["steps_per_s"])
    if not rows:
        raise SystemExit(f"{path} has no rows with consolidated=yes. Name a table of isolated throughputs.")
    types = tuple(sorted({name for by_type in rows.values() for name in by_type}))
    speeds = {key: np.array([by_type.get(name, 0.0) for name in types]) for key, by_type in rows.items()}
    return Speeds(path.name, types, speeds)


def _generate(seed: int) -> Speeds:
    rng = np.random.default_rng((seed, 1))
    speeds: dict[tuple[str, int], Real] = {}
    for family, slowest, gains, exponent, batches in _FAMILIES:
        for batch in range(batches):
            alone = slowest * 0.62**batch * np.array([1.0, *gains]) * rng.uniform(0.75, 1.3, len(GPU_TYPES))
            for gpus in SCALES if exponent else (1,):
                noise = rng.uniform(0.8, 1.2, len(GPU_TYPES)) if gpus > 1 else 1.0
                speeds[f"{family} (batch {batch})", gpus] = alone * gpus**exponent * noise
    return Speeds(f"generated, seed {seed}", GPU_TYPES, speeds)
