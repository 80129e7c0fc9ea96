"""The columnar form of a snapshot: the same content as named numpy arrays, one group per row type.

At a hundred thousand jobs an object per row costs seconds, columns cost milliseconds; compiling
reads only this form. It has one canonical spelling: rows in order of name (jobs by submission),
short strings once each in `names`, absent values as -1 or NaN. So `digest` is over the arrays,
and is the same whether a market came as JSON, as a file of columns or from the generator.

`table_checks` says what columns must satisfy, `table_rows` turns a Snapshot into columns and back,
`table_file` reads and writes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from broker.allocation import snapshot as limits
from broker.allocation.instance import RATE_MICROS_PER_HOUR_MAX
from pricing.payments import PaymentRule
from training.spec import BUDGET_MICROS_MAX, GPUS_PER_JOB_MAX, SAMPLES_MAX, SITES_PER_JOB_MAX, Codec, Strategy

Array = NDArray[Any]

TABLES_VERSION: Final = limits.SNAPSHOT_VERSION
STRATEGIES: Final[tuple[str, ...]] = get_args(Strategy)
CODECS: Final[tuple[str, ...]] = get_args(Codec)
# From the narrowest to the widest: a residency's index is the highest tier that it allows.
RESIDENCIES: Final[tuple[str, ...]] = get_args(limits.Residency)
PAYMENT_RULES: Final[tuple[str, ...]] = tuple(PaymentRule)
# Columns that came after the version did, with the value that means "not used". Where they have it they are no
# part of the digest, and a file without them is read as if they had it: what was taken before keeps its name.
LATER_COLUMNS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "market.payment_rule": 0,
        "market.follow_last_prices": 0,
        "links.last_price_micros_per_share_hour": 0,
        # What only a choice of plans looks at, and where only an open plan says other than this.
        "jobs.sync_open": 0,
        "jobs.target_utilisation": 0.95,
        "jobs.max_egress_gb": 0,
        "jobs.fragments": 4,
        "incumbents.fragments": 4,
        "incumbents.overlap_steps": 1,
    }
)
NAME_LENGTH_MAX: Final = 100
FINITE_MAX: Final = 1e300


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its type, the bounds of its values, and the group whose rows it counts into.

    `low` -1 where a reference or a number may be absent; `optional` floats are NaN where absent.
    """

    dtype: str
    low: float = 0
    high: float = 0
    refers: str | None = None
    optional: bool = False


def _whole(high: int, low: int = 0) -> Column:
    return Column("<i8", low, high)


def _real(high: float, low: float = 0.0, *, optional: bool = False) -> Column:
    return Column("<f8", low, high, optional=optional)


def _to(group: str, *, optional: bool = False) -> Column:
    return Column("<i4", -1 if optional else 0, 2**31 - 1, refers=group)


def _choice(values: tuple[str, ...]) -> Column:
    return Column("<i4", 0, len(values) - 1)


_FLAG: Final = Column("|b1", 0, 1)
_RATE: Final = _whole(RATE_MICROS_PER_HOUR_MAX)
_MICROS: Final = _whole(limits.MICROS_MAX)
_COUNT: Final = _whole(limits.COUNT_MAX)
_GPUS: Final = _whole(limits.CAPACITY_GPUS_MAX, 1)
_SYNC: Final = {
    "strategy": _choice(STRATEGIES),
    "codec": _choice(CODECS),
    "period_steps": _whole(10_000, 1),
    "outer_learning_rate": _real(2.0),
    "outer_momentum": _real(1.0),
    "checkpoint_rounds": _whole(10_000, 1),
    "patience_s": _real(3600.0, 1.0),
}

# Every group with its columns. The order is that of the digest; adding a column is a new version.
SCHEMA: Final[Mapping[str, Mapping[str, Column]]] = MappingProxyType(
    {
        "market": {
            "version": _whole(TABLES_VERSION, TABLES_VERSION),
            "round_number": _COUNT,
            "taken_at_ms": _COUNT,
            "seed": _MICROS,
            "term_s": _whole(limits.TERM_S_MAX, 1),
            "market_equity_micros": _MICROS,
            "fee_basis_points": _whole(10_000),
            "payment_rule": _choice(PAYMENT_RULES),
            "follow_last_prices": _FLAG,
            "floor_penalty_micros_per_gpu_hour": _RATE,
            "slots": _whole(limits.SLOTS_MAX, 1),
            "slot_s": _whole(limits.SLOT_S_MAX, 60),
            "waiting_discount": _real(1.0),
        },
        "names": {"text": Column("S", 1, NAME_LENGTH_MAX)},
        "sites": {
            "site_id": _to("names"),
            "listens": _FLAG,
            "region": _to("names", optional=True),
            "continent": _to("names", optional=True),
            "to_region": _RATE,
            "to_continent": _RATE,
            "beyond": _RATE,
        },
        "pools": {
            "site": _to("sites"),
            "gpu_type": _to("names"),
            "capacity_gpus": _whole(limits.CAPACITY_GPUS_MAX),
            "ask_micros_per_gpu_hour": _RATE,
            "flops_per_s": _real(limits.FLOPS_PER_S_MAX, 1.0, optional=True),
            "intra_site_bits_per_s": _real(limits.BITS_PER_S_MAX, 1.0, optional=True),
            "job_gpus_max": _whole(limits.CAPACITY_GPUS_MAX, -1),
            "drains_at_ms": _whole(limits.COUNT_MAX, -1),
        },
        "ask_steps": {"pool": _to("pools"), "gpus": _GPUS, "ask_micros_per_gpu_hour": _RATE},
        "reserved": {"pool": _to("pools"), "from_ms": _COUNT, "to_ms": _COUNT, "gpus": _GPUS},
        "links": {
            "from_site": _to("sites"),
            "to_site": _to("sites"),
            "bandwidth_bits_per_s": _real(limits.BITS_PER_S_MAX, 1.0),
            "delay_s": _real(60.0),
            "loss": _real(1.0),
            "egress_price_micros_per_gb": _RATE,
            "last_price_micros_per_share_hour": _MICROS,
        },
        "tenants": {
            "tenant_id": _to("names"),
            "budget_micros_per_hour": _whole(RATE_MICROS_PER_HOUR_MAX, -1),
            "floor_gpus": _whole(limits.CAPACITY_GPUS_MAX, -1),
        },
        "last_prices": {"pool_id": _to("names"), "price_micros_per_gpu_hour": _MICROS},
        "site_lists": {"length": _whole(limits.POOLS_MAX)},
        "site_list_sites": {"site_id": _to("names")},
        "jobs": {
            "job_id": Column("S", 1, NAME_LENGTH_MAX),
            "version": _COUNT,
            "submitted_ms": _COUNT,
            "sites_max": _whole(SITES_PER_JOB_MAX, 1),
            "site_list": _to("site_lists", optional=True),
            "samples": _whole(SAMPLES_MAX, 1),
            "batch_per_gpu": _whole(1_000_000, 1),
            "parameters": _whole(10**13, 1),
            "flops_per_sample": _real(1e21, 1.0),
            **_SYNC,
            "samples_done": _whole(SAMPLES_MAX),
            "bid_micros_per_million_samples": _whole(limits.MICROS_MAX, 1),
            "hold_left_micros": _whole(BUDGET_MICROS_MAX),
            "deadline_ms": _whole(limits.COUNT_MAX, -1),
            "tenant_id": _to("names", optional=True),
            "data_home": _to("sites", optional=True),
            "data_residency": _choice(RESIDENCIES),
            "data_bytes_per_sample": _real(limits.BYTES_PER_SAMPLE_MAX),
            "mixed_types": _FLAG,
            "sync_open": _FLAG,
            "target_utilisation": _real(0.999, 0.5),
            "max_egress_gb": _real(1e9),
            "fragments": _whole(64, 1),
        },
        "accelerators": {
            "job": _to("jobs"),
            "gpu_type": _to("names"),
            "count_min": _whole(GPUS_PER_JOB_MAX, 1),
            "count_max": _whole(GPUS_PER_JOB_MAX, 1),
        },
        "bid_steps": {
            "job": _to("jobs"),
            "above_samples_per_s": _real(1e15),
            "bid_micros_per_million_samples": _MICROS,
        },
        "speeds": {
            "job": _to("jobs"),
            "gpu_type": _to("names"),
            "flops_per_s": _real(limits.FLOPS_PER_S_MAX, 1.0),
            "ring_bits_per_s": _real(limits.BITS_PER_S_MAX, 1.0, optional=True),
        },
        "barred": {"job": _to("jobs"), "key": Column("S", 1, limits.BARRED_LENGTH_MAX)},
        "incumbents": {
            "job": _to("jobs"),
            "epoch": _whole(limits.COUNT_MAX, 1),
            "term_ends_ms": _COUNT,
            "restart_cost_micros": _whole(BUDGET_MICROS_MAX),
            "hub_site": _to("names", optional=True),
            **_SYNC,
            "fragments": _whole(64, 1),
            "overlap_steps": _whole(1000),
            "samples_per_s": _real(FINITE_MAX),
            "compute_s": _real(FINITE_MAX),
            "intra_site_s": _real(FINITE_MAX),
            "inter_site_s": _real(FINITE_MAX),
            "step_s": _real(FINITE_MAX),
        },
        "incumbent_parts": {
            "incumbent": _to("incumbents"),
            "site_id": _to("names"),
            "gpu_type": _to("names"),
            "gpus": _GPUS,
        },
        "incumbent_traffic": {
            "incumbent": _to("incumbents"),
            "from_site": _to("names"),
            "to_site": _to("names"),
            "bytes_per_s": _MICROS,
        },
        "locked_prices": {
            "incumbent": _to("incumbents"),
            "pool_id": _to("names"),
            "price_micros_per_gpu_hour": _RATE,
        },
    }
)

# Rows of a group at most: what a hostile file may make us allocate.
ROWS_MAX: Final[Mapping[str, int]] = MappingProxyType(
    {
        "market": 1,
        "names": 2_000_000,
        "sites": limits.POOLS_MAX,
        "pools": limits.POOLS_MAX,
        "ask_steps": limits.POOLS_MAX * limits.STEPS_MAX,
        "reserved": limits.POOLS_MAX * limits.RESERVATIONS_MAX,
        "links": limits.LINKS_MAX,
        "tenants": limits.TENANTS_MAX,
        "last_prices": limits.POOLS_MAX,
        "site_lists": limits.JOBS_MAX,
        "site_list_sites": 5_000_000,
        "jobs": limits.JOBS_MAX,
        "accelerators": limits.JOBS_MAX * 10,
        "bid_steps": limits.JOBS_MAX * 4,
        "speeds": limits.JOBS_MAX * 10,
        "barred": 1_000_000,
        "incumbents": limits.JOBS_MAX,
        "incumbent_parts": limits.JOBS_MAX * SITES_PER_JOB_MAX,
        "incumbent_traffic": limits.JOBS_MAX * SITES_PER_JOB_MAX * 2,
        "locked_prices": limits.JOBS_MAX * SITES_PER_JOB_MAX,
    }
)


class Tables:
    """A snapshot in columns: `tables["jobs.version"]`. Made by `table_checks.checked` alone, read-only."""

    __slots__ = ("_arrays",)

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        """Keep arrays that were checked, and make them read-only."""
        for array in arrays.values():
            array.flags.writeable = False
        self._arrays = MappingProxyType(dict(arrays))

    def __getitem__(self, name: str) -> Array:
        """Return a column by `group.column`."""
        return self._arrays[name]

    def rows(self, group: str) -> int:
        """Return how many rows a group has."""
        return len(self._arrays[f"{group}.{next(iter(SCHEMA[group]))}"])

    def market(self, name: str) -> int:
        """Return one of the market's own whole numbers."""
        return int(self._arrays[f"market.{name}"][0])

    def names(self, column: str) -> list[str]:
        """Return a column of references to `names` (or of strings) as text, '' where absent."""
        values = self._arrays[column]
        if values.dtype.kind == "S":
            return [bytes(text).decode() for text in values.tolist()]
        texts = [bytes(text).decode() for text in self._arrays["names.text"].tolist()]
        return [texts[index] if index >= 0 else "" for index in values.tolist()]

    def digest(self) -> str:
        """Return the SHA-256 over all columns in the schema's order: name, type, length, bytes."""
        digest = hashlib.sha256()
        for name, array in self._arrays.items():
            if name in LATER_COLUMNS and (array == LATER_COLUMNS[name]).all():
                continue
            digest.update(f"{name} {array.dtype.str} {len(array)}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def column_names() -> list[str]:
    """Return every `group.column` in the schema's order."""
    return [f"{group}.{column}" for group, columns in SCHEMA.items() for column in columns]


def starts(parent: Array, parents: int) -> NDArray[np.int64]:
    """Return where each parent's rows start in a sorted column of references, the end appended."""
    return np.searchsorted(parent, np.arange(parents + 1)).astype(np.int64)
