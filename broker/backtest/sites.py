"""The federation of a run: which clusters of the trace are sites, and what each has and asks for it.

    capacity_percentile: 75        # of each cluster's own use in the trace; `capacity_gpus` overrides
    sites:
      - {name: 6214e9, gpu_type: p100, ask: "0.70"}
      - {name: 11cb48, gpu_type: k80, ask: "0.35", capacity_gpus: 64}

One pool at each site. A trace knows neither types nor asks, so this file is an assumption, and the report
repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.backtest.errors import SitesError
from broker.backtest.trace import Trace, use_percentile
from pricing.errors import AmountError
from pricing.money import parse_credits

FILE_BYTES_MAX: Final = 256 * 1024
SITES_MAX: Final = 1_000
ASK_MICROS_MAX: Final = 1_000_000_000

Index = NDArray[np.int32]
Int = NDArray[np.int64]


class SiteRow(BaseModel):
    """A cluster of the trace as a site."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=100)]
    gpu_type: Annotated[str, Field(min_length=1, max_length=40)]
    ask: str
    capacity_gpus: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class SitesFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    capacity_percentile: Annotated[float, Field(gt=0, le=100)] = 75.0
    sites: Annotated[list[SiteRow], Field(min_length=1, max_length=SITES_MAX)]


@dataclass(frozen=True, slots=True)
class Federation:
    """Sites by index, in the order of their names; one pool each."""

    names: tuple[str, ...]
    gpu_types: tuple[str, ...]
    kind: Index
    capacity: Int
    ask_micros: Int
    capacity_rule: str

    def __len__(self) -> int:
        """Sites of the federation."""
        return len(self.names)

    def part(self, sites: list[int]) -> Federation:
        """Return the federation of some of the sites, kinds kept as they are."""
        return replace(
            self,
            names=tuple(self.names[site] for site in sites),
            kind=self.kind[sites],
            capacity=self.capacity[sites],
            ask_micros=self.ask_micros[sites],
        )


def read_sites(path: Path) -> SitesFile:
    """Read a sites file. Raises SitesError for its content, OSError where it cannot be opened."""
    with path.open("rb") as stream:
        content = stream.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise SitesError(f"{path.name}: larger than {FILE_BYTES_MAX} bytes; a site needs one line")
    try:
        document = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise SitesError(f"{path.name}{where}: this is not YAML: {getattr(problem, 'problem', problem)}") from None
    try:
        file = SitesFile.model_validate(document)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = "/".join(str(part) for part in first["loc"]) or "the file"
        raise SitesError(f"{path.name}: {place}: {first['msg']}") from None
    names = [row.name for row in file.sites]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise SitesError(f"{path.name}: the site {doubled[0]!r} stands twice")
    return file


def federation(file: SitesFile, trace: Trace) -> Federation:
    """Return the sites with their capacities for a trace.

    A capacity that is not given is the stated percentile of the cluster's own use, and at least
    its largest own job, so that every job could run at home. Raises SitesError for a site without
    jobs in the trace and for an ask that is no amount.
    """
    rows = sorted(file.sites, key=lambda row: row.name)
    present = set(trace.cluster)
    capacity, asks = [], []
    for row in rows:
        if row.name not in present:
            raise SitesError(
                f"the site {row.name!r} has no job in {trace.name}; clusters there: {', '.join(sorted(present)[:20])}"
            )
        try:
            ask = parse_credits(row.ask)
        except AmountError as problem:
            raise SitesError(f"the site {row.name!r}: ask: {problem}") from None
        if not 0 < ask <= ASK_MICROS_MAX:
            raise SitesError(f"the site {row.name!r}: the ask must be above 0 and at most 1,000 credits per GPU-hour")
        asks.append(ask)
        largest = int(max(gpus for gpus, name in zip(trace.gpus, trace.cluster, strict=True) if name == row.name))
        capacity.append(row.capacity_gpus or max(largest, use_percentile(trace, row.name, file.capacity_percentile)))
    gpu_types = tuple(sorted({row.gpu_type for row in rows}))
    return Federation(
        tuple(row.name for row in rows),
        gpu_types,
        np.array([gpu_types.index(row.gpu_type) for row in rows], dtype=np.int32),
        np.array(capacity, dtype=np.int64),
        np.array(asks, dtype=np.int64),
        f"the {file.capacity_percentile:g}th percentile of each cluster's own use over time, "
        "at least its largest own job, unless given",
    )
