"""What columns must satisfy to be a snapshot: types, bounds, references, order, and the rules between rows.

The same rules as `broker.allocation.snapshot` states for rows, over whole columns at a time, and the
canonical order. Every refusal names the column, the row and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.allocation.errors import DocumentError
from broker.allocation.tables import (
    LATER_COLUMNS,
    ROWS_MAX,
    SCHEMA,
    TABLES_VERSION,
    Array,
    Column,
    Tables,
    column_names,
    starts,
)
from training.catalogue import GPU_TYPES

_SITE_ID: Final = re.compile(rb"[a-z][a-z0-9-]{0,30}")
_SITE_COLUMNS: Final = frozenset({"site_id", "from_site", "to_site", "hub_site"})
_PRINTABLE: Final = (0x21, 0x7E)


def checked(arrays: Mapping[str, Array]) -> Tables:
    """Return the tables that `arrays` are. Raises DocumentError where they break a rule."""
    if "market.version" in arrays:
        check_version(arrays["market.version"])
    arrays = {**_later(arrays), **arrays}
    missing = [name for name in column_names() if name not in arrays]
    extra = sorted(set(arrays) - set(column_names()))
    if missing or extra:
        message = (
            f"column {missing[0]} is missing" if missing else f"column {extra[0][:100]} is unknown"
        ) + "; write the tables with this version of Hansa"
        raise DocumentError(message)
    kept: dict[str, Array] = {}
    for group, columns in SCHEMA.items():
        lengths = {len(arrays[f"{group}.{column}"]) for column in columns if arrays[f"{group}.{column}"].ndim == 1}
        if len(lengths) != 1 or any(arrays[f"{group}.{column}"].ndim != 1 for column in columns):
            message = f"the columns of {group} differ in length; each row needs a value in every column"
            raise DocumentError(message)
        if max(lengths) > ROWS_MAX[group] or (group == "market" and lengths != {1}):
            message = f"{group} has {max(lengths)} rows, at most {ROWS_MAX[group]} are read; split the market"
            raise DocumentError(message)
        for name, column in columns.items():
            kept[f"{group}.{name}"] = _column(f"{group}.{name}", column, arrays[f"{group}.{name}"])
    for group, columns in SCHEMA.items():
        for name, column in columns.items():
            if column.refers is not None:
                count = len(kept[f"{column.refers}.{next(iter(SCHEMA[column.refers]))}"])
                _refuse(f"{group}.{name}", kept[f"{group}.{name}"] >= count, f"there are {count} {column.refers}")
    tables = Tables(kept)
    _order(tables)
    _texts(tables)
    _rules(tables)
    return tables


def _later(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the columns that a file from before they existed lacks, as not used."""
    found = {}
    for name, unused in LATER_COLUMNS.items():
        group, _, column = name.partition(".")
        first = arrays.get(f"{group}.{next(iter(SCHEMA[group]))}")
        found[name] = np.full(0 if first is None else len(first), unused, SCHEMA[group][column].dtype)
    return found


def check_version(version: Array) -> None:
    """Raise DocumentError where columns were written as another version."""
    if version.shape == (1,) and version.dtype.kind in "iu" and version[0] != TABLES_VERSION:
        message = (
            f"these tables have version {version[0]}, and this Hansa reads version {TABLES_VERSION}; take a new "
            "snapshot, or use the release of Hansa that wrote it"
        )
        raise DocumentError(message)


def _column(name: str, column: Column, array: Array) -> Array:
    """Return one column with its exact type, its values within bounds."""
    if column.dtype == "S":
        if array.dtype.kind != "S" or array.dtype.itemsize > column.high:
            message = f"{name} is {array.dtype}; it must be ASCII of at most {column.high:.0f} bytes"
            raise DocumentError(message)
        width = max(1, int(np.strings.str_len(array).max(initial=0)))
        return np.ascontiguousarray(array, dtype=f"S{width}")
    if array.dtype != np.dtype(column.dtype):
        message = f"{name} is {array.dtype}; it must be {np.dtype(column.dtype)}"
        raise DocumentError(message)
    if array.dtype.kind == "b":
        # A byte that is neither 0 nor 1 would compare as both.
        return np.ascontiguousarray(array.view(np.uint8) != 0)
    if array.dtype.kind == "f":
        within = (array >= column.low) & (array <= column.high)
        _refuse(name, ~(within | np.isnan(array) if column.optional else within), _bounds(column), array)
        return np.ascontiguousarray(array + 0.0)  # one spelling of zero
    # Comparing with whole numbers: as floats the highest amounts would be rounded up.
    _refuse(name, (array < int(column.low)) | (array > int(column.high)), _bounds(column), array)
    return np.ascontiguousarray(array)


def _bounds(column: Column) -> str:
    return f"it must be {column.low:.17g} to {column.high:.17g}" + (" or absent" if column.optional else "")


def _refuse(name: str, bad: NDArray[np.bool_], rule: str, values: Array | None = None) -> None:
    """Raise for the first row that breaks a rule."""
    if bad.any():
        row = int(np.argmax(bad))
        value = "" if values is None else f" is {values[row]}"
        message = f"{name}: row {row}{value}; {rule}; correct the row or leave it out"
        raise DocumentError(message)


def _order(tables: Tables) -> None:
    """Check that rows stand in canonical order, each once."""
    for group, keys in {
        "names": ("text",),
        "sites": ("site_id",),
        "pools": ("site", "gpu_type"),
        "links": ("from_site", "to_site"),
        "tenants": ("tenant_id",),
        "last_prices": ("pool_id",),
        "jobs": ("submitted_ms", "job_id"),
        "incumbents": ("job",),
        "incumbent_parts": ("incumbent", "site_id"),
        "locked_prices": ("incumbent", "pool_id"),
    }.items():
        before = np.zeros(max(0, tables.rows(group) - 1), dtype=np.bool_)
        same = ~before
        for key in keys:
            values = tables[f"{group}.{key}"]
            before |= same & (values[:-1] < values[1:])
            same &= values[:-1] == values[1:]
        _refuse(f"{group}.{keys[-1]}", np.append(False, ~before), "rows stand in order, each name once")
    for group, parent in {
        "ask_steps": "pool",
        "reserved": "pool",
        "accelerators": "job",
        "bid_steps": "job",
        "speeds": "job",
        "barred": "job",
        "incumbent_traffic": "incumbent",
    }.items():
        values = tables[f"{group}.{parent}"]
        _refuse(
            f"{group}.{parent}", np.append(False, values[:-1] > values[1:]), "rows stand in the order of their parent"
        )
    ids = tables["jobs.job_id"]
    if len(np.unique(ids)) != len(ids):
        message = "jobs.job_id: a job stands twice; each may stand there once"
        raise DocumentError(message)


def _texts(tables: Tables) -> None:
    """Check that strings are printable."""
    for name in ("names.text", "jobs.job_id", "barred.key"):
        array = tables[name]
        bytes_ = array.view(np.uint8).reshape(len(array), -1) if len(array) else np.zeros((0, 1), np.uint8)
        length = np.strings.str_len(array) if len(array) else np.zeros(0, np.int64)
        inside = np.arange(bytes_.shape[1]) < length[:, None]
        printable = (bytes_ >= _PRINTABLE[0]) & (bytes_ <= _PRINTABLE[1])
        _refuse(name, (length == 0) | (inside & ~printable).any(axis=1), "names are printable ASCII without spaces")
    _used_names(tables)


def _used_names(tables: Tables) -> None:
    """Check that every name is used, and that those of sites and GPU types are such."""
    used, sites = (np.zeros(tables.rows("names"), dtype=np.bool_) for _ in range(2))
    for group, columns in SCHEMA.items():
        for name, column in columns.items():
            if column.refers == "names":
                values = tables[f"{group}.{name}"]
                values = values[values >= 0]
                used[values] = True
                if name in _SITE_COLUMNS:
                    sites[values] = True
    _refuse("names.text", ~used, "no row uses it")
    texts = tables["names.text"]
    for index in np.flatnonzero(sites):
        if _SITE_ID.fullmatch(texts[index]) is None:
            message = f"{texts[index].decode()!r} is no site id; use lower-case letters, digits and hyphens, at most 31"
            raise DocumentError(message)
    # Leases may hold a type that is no longer sold; nothing else may name an unknown one.
    known = np.array([text.decode() in GPU_TYPES for text in texts.tolist()], dtype=np.bool_)
    for group in ("pools", "accelerators", "speeds"):
        unknown = ~known[tables[f"{group}.gpu_type"]]
        _refuse(f"{group}.gpu_type", unknown, f"the market knows {', '.join(sorted(GPU_TYPES))}")


def _rules(tables: Tables) -> None:
    """Check what several columns of a row, or several rows, must satisfy together."""
    _refuse(
        "accelerators.count_min",
        tables["accelerators.count_min"] > tables["accelerators.count_max"],
        "it is above count_max",
    )
    _refuse("reserved.to_ms", tables["reserved.to_ms"] <= tables["reserved.from_ms"], "it must be after from_ms")
    for name in ("market.waiting_discount", "links.loss", "jobs.outer_momentum", "incumbents.outer_momentum"):
        _refuse(name, tables[name] >= 1, "it must be below 1")
    for name in (
        "jobs.outer_learning_rate",
        "incumbents.outer_learning_rate",
        "incumbents.samples_per_s",
        "incumbents.step_s",
        "bid_steps.above_samples_per_s",
    ):
        _refuse(name, tables[name] <= 0, "it must be above 0")
    for group, parent in (("accelerators", "jobs"), ("incumbent_parts", "incumbents")):
        reference = tables[f"{group}.{next(iter(SCHEMA[group]))}"]
        counts = np.diff(starts(reference, tables.rows(parent)))
        _refuse(f"{parent}", counts < 1, f"it has no row in {group}")
    for group in ("accelerators", "speeds"):
        pairs = tables[f"{group}.job"].astype(np.int64) * (tables.rows("names") + 1) + tables[f"{group}.gpu_type"]
        if len(np.unique(pairs)) != len(pairs):
            message = f"{group}: a job lists a GPU type twice; each may stand there once"
            raise DocumentError(message)
    _rising(
        "ask_steps",
        tables["ask_steps.pool"],
        tables["ask_steps.ask_micros_per_gpu_hour"],
        tables["pools.ask_micros_per_gpu_hour"],
    )
    bids, flat = tables["bid_steps.bid_micros_per_million_samples"], tables["jobs.bid_micros_per_million_samples"]
    _rising("bid_steps", tables["bid_steps.job"], -bids, -flat)
    above = tables["bid_steps.above_samples_per_s"]
    _rising("bid_steps", tables["bid_steps.job"], above, np.zeros(tables.rows("jobs")))
    absent = tables["jobs.data_home"] < 0
    _refuse(
        "jobs.data_home",
        absent & ((tables["jobs.data_bytes_per_sample"] > 0) | (tables["jobs.data_residency"] > 0)),
        "data needs a home",
    )
    if int(tables["site_lists.length"].sum()) != tables.rows("site_list_sites"):
        message = "site_lists.length does not add up to the rows of site_list_sites"
        raise DocumentError(message)
    listed = tables["jobs.site_list"][tables["jobs.site_list"] >= 0]
    ends = np.cumsum(tables["site_lists.length"])
    lists = np.split(tables["site_list_sites.site_id"], ends[:-1])
    if len(ends) and len({row.tobytes() for row in lists}) != len(ends):
        message = "site_lists: a list stands twice; jobs with the same sites share one"
        raise DocumentError(message)
    firsts, positions = np.unique(listed, return_index=True)
    if len(firsts) != tables.rows("site_lists") or (np.diff(positions) <= 0).any():
        message = "site_lists: each list is used, and they stand in the order of the first job that uses them"
        raise DocumentError(message)


def _rising(group: str, parent: Array, values: Array, flat: Array) -> None:
    """Refuse steps of one parent that do not rise from its flat value."""
    before = np.append(values[:1], values[:-1])
    first = np.append(True, parent[:-1] != parent[1:])[: len(parent)]
    before = np.where(first, flat[parent], before)
    _refuse(group, values <= before, "each step lies beyond the one before (asks rise, bids fall, speeds rise)")
