"""Tables of measured step times: read strictly, kept as arrays.

A table is a CSV file with one measured configuration a row:

    model,part,gpus_per_node,nodes,gpus,local_batch,step_time_s,sync_time_s
    bert,placements,4-4-2,3,10,8,1.53,0.88

`part`, `gpus_per_node` and `sync_time_s` may be missing or empty. Without `gpus_per_node` the GPUs
are taken to be spread evenly. `sync_time_s` is what a step waits for its collectives, after overlap.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

REQUIRED: Final = ("model", "nodes", "gpus", "local_batch", "step_time_s")
ROWS_MAX: Final = 1_000_000
MODELS_MAX: Final = 1_000
COUNT_MAX: Final = 1_000_000
STEP_S_MAX: Final = 1e6
NAME_LENGTH_MAX: Final = 200
FAULTS_SHOWN_MAX: Final = 8


class TableError(TrainingError):
    """A table of step times that cannot be used; each fault names row, field and remedy."""

    code: ClassVar[str] = "table.invalid"


@dataclass(frozen=True, slots=True)
class StepTable:
    """Measured steps as columns of one length; `sync_s` is NaN where it was not measured.

    `model` indexes `models`. `node_gpus` are the GPUs of the fullest node: the others wait for it.
    """

    models: tuple[str, ...]
    model: Integers
    part: tuple[str, ...]
    nodes: Floats
    gpus: Floats
    node_gpus: Floats
    batch: Floats
    step_s: Floats
    sync_s: Floats

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.step_s)

    def where(self, mask: Mask) -> StepTable:
        """Return the rows of `mask`, with the same models."""
        chosen = [part for part, keep in zip(self.part, mask, strict=True) if keep]
        return StepTable(
            self.models,
            self.model[mask],
            tuple(chosen),
            self.nodes[mask],
            self.gpus[mask],
            self.node_gpus[mask],
            self.batch[mask],
            self.step_s[mask],
            self.sync_s[mask],
        )

    def in_part(self, part: str) -> StepTable:
        """Return the rows of one part."""
        return self.where(np.array([name == part for name in self.part], dtype=bool))


def read_table(path: Path) -> StepTable:
    """Return the table in a CSV file.

    Raises TableError with the faults, OSError where the file cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return table_of(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        message = f"{path.name} is not a CSV file in UTF-8 ({error}); save the table as plain CSV"
        raise TableError(message) from None


def table_of(rows: Iterable[Mapping[str, str | None]]) -> StepTable:
    """Return the table of text rows, such as a csv.DictReader gives; TableError lists the faults."""
    numbers: list[tuple[float, ...]] = []
    names: list[str] = []
    parts: list[str] = []
    faults: list[str] = []
    # A header is row 1, so that the numbers in messages are those that an editor shows.
    for number, row in enumerate(rows, start=2):
        if number == 2:  # noqa: PLR2004  the first row after the header
            _require_columns(row)
        if number > ROWS_MAX:
            message = f"the table has more than {ROWS_MAX} rows; split it"
            raise TableError(message)
        try:
            names.append(_name(row))
            numbers.append(_numbers(row))
            parts.append(row.get("part") or "")
        except ValueError as error:
            faults.append(f"row {number}, {error}")
            if len(faults) == FAULTS_SHOWN_MAX:
                faults.append("further rows were not looked at")
                break
    if faults:
        raise TableError("the table of step times cannot be used: " + "; ".join(faults))
    if not numbers:
        message = f"the table has no rows: it needs a header with {', '.join(REQUIRED)} and one row per measurement"
        raise TableError(message)
    models = tuple(sorted(set(names)))
    if len(models) > MODELS_MAX:
        message = f"the table has {len(models)} models, at most {MODELS_MAX} fit together; split it"
        raise TableError(message)
    place = {name: index for index, name in enumerate(models)}
    columns = np.array(numbers, dtype=np.float64).T
    nodes, gpus, node_gpus, batch, step_s, sync_s = (np.ascontiguousarray(column) for column in columns)
    index = np.array([place[name] for name in names], dtype=np.int64)
    return StepTable(models, index, tuple(parts), nodes, gpus, node_gpus, batch, step_s, sync_s)


def _require_columns(row: Mapping[str, str | None]) -> None:
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        found = ", ".join(str(name) for name in row if name is not None)
        message = (
            f"the table lacks the column {', '.join(missing)}; it has {found or 'none'}: name them in the first row"
        )
        raise TableError(message)


def _name(row: Mapping[str, str | None]) -> str:
    name = (row["model"] or "").strip()
    if not 0 < len(name) <= NAME_LENGTH_MAX:
        message = f"model: {'empty' if not name else 'too long'}; give a name of at most {NAME_LENGTH_MAX} characters"
        raise ValueError(message)
    return name


def _numbers(row: Mapping[str, str | None]) -> tuple[float, ...]:
    nodes = _whole(row, "nodes")
    gpus = _whole(row, "gpus")
    if gpus < nodes:
        message = f"gpus: {gpus} on {nodes} nodes; count the GPUs of all nodes together"
        raise ValueError(message)
    shape = (row.get("gpus_per_node") or "").strip()
    per_node = _shape(shape, nodes, gpus) if shape else (math.ceil(gpus / nodes),)
    step_s = _seconds(row, "step_time_s", lambda value: 0 < value <= STEP_S_MAX, "above 0")
    sync_s = math.nan
    if (row.get("sync_time_s") or "").strip():
        sync_s = _seconds(row, "sync_time_s", lambda value: 0 <= value <= STEP_S_MAX, "0 or more")
    return float(nodes), float(gpus), float(max(per_node)), float(_whole(row, "local_batch")), step_s, sync_s


def _shape(shape: str, nodes: int, gpus: int) -> Sequence[int]:
    try:
        per_node = [int(count) for count in shape.split("-")]
    except ValueError:
        per_node = []
    if not per_node or min(per_node) < 1:
        message = f"gpus_per_node: {shape[:40]!r} is no shape; write the GPUs of each node, such as 4-4-2"
        raise ValueError(message)
    if len(per_node) != nodes or sum(per_node) != gpus:
        message = (
            f"gpus_per_node: {shape[:40]} are {sum(per_node)} GPUs on {len(per_node)} nodes, "
            f"but the row says {gpus} on {nodes}; correct one of them"
        )
        raise ValueError(message)
    return per_node


def _whole(row: Mapping[str, str | None], field: str) -> int:
    text = (row[field] or "").strip()
    # int() alone would also take underscores and other scripts' digits.
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= COUNT_MAX:  # noqa: PLR2004
        message = f"{field}: {text[:40]!r}; give a whole number from 1 to {COUNT_MAX}"
        raise ValueError(message)
    return int(text)


def _seconds(row: Mapping[str, str | None], field: str, allowed: Callable[[float], bool], bound: str) -> float:
    text = (row[field] or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        message = f"{field}: {text[:40]!r}; give seconds, {bound} and at most {STEP_S_MAX:.0e}, or leave the row out"
        raise ValueError(message)
    return value
