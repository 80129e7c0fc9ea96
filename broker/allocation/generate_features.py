"""What a generated market can have beyond its family: each feature by its own draws."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from broker.allocation.instance import NONE
from broker.allocation.table_checks import checked
from broker.allocation.tables import CODECS, SCHEMA, STRATEGIES, Array, Tables, starts
from training import throughput
from training.catalogue import GPU_TYPES

FEATURES: Final = (
    "ask_curves",
    "mixed_types",
    "slots",
    "budgets",
    "floors",
    "incumbents",
    "bid_steps",
    "speeds",
)
_JOBS_PER_TENANT: Final = 50
_HOUR_MS: Final = 3_600_000


def add_features(tables: Tables, features: frozenset[str], seed: int) -> Tables:
    """Return the market with the features added."""
    arrays = {name: tables[name].copy() for name in _columns()}
    for place, feature in enumerate(FEATURES):
        if feature in features:
            draw = np.random.Generator(np.random.PCG64([seed, 1 + place]))
            _ADD[feature](arrays, draw)
    return checked(arrays)


def _columns() -> list[str]:
    return [f"{group}.{column}" for group, columns in SCHEMA.items() for column in columns]


def _put(arrays: dict[str, Array], group: str, **columns: ArrayLike) -> None:
    """Set columns of a group with the types that the schema says."""
    for name, values in columns.items():
        arrays[f"{group}.{name}"] = np.asarray(values).astype(SCHEMA[group][name].dtype)


def _ask_curves(arrays: dict[str, Array], draw: np.random.Generator) -> None:
    """Make the last fifth of each pool dearer, and its last tenth dearer still."""
    capacity, ask = arrays["pools.capacity_gpus"], arrays["pools.ask_micros_per_gpu_hour"]
    pool = np.repeat(np.arange(len(capacity)), 2)
    rise = np.cumsum(draw.uniform(0.1, 0.4, (len(capacity), 2)), axis=1)
    steps = np.maximum(ask[:, None] + [1, 2], np.rint(ask[:, None] * (1 + rise)))
    _put(
        arrays,
        "ask_steps",
        pool=pool,
        gpus=np.repeat(np.maximum(1, capacity // 10), 2),
        ask_micros_per_gpu_hour=steps.reshape(-1),
    )


def _mixed_types(arrays: dict[str, Array], draw: np.random.Generator) -> None:
    """Let a third of the jobs that span sites mix types."""
    spans = arrays["jobs.sites_max"] > 1
    _put(arrays, "jobs", mixed_types=spans & (draw.random(len(spans)) < 1 / 3))


def _slots(arrays: dict[str, Array], draw: np.random.Generator) -> None:
    """Plan four hours, with maintenance in a tenth of the pools and a few that leave."""
    pools = len(arrays["pools.site"])
    now_ms = int(arrays["market.taken_at_ms"][0])
    _put(arrays, "market", slots=[4], slot_s=[3600], waiting_discount=[0.05])
    shut = np.flatnonzero(draw.random(pools) < 0.1)
    from_ms = now_ms + draw.integers(0, 3, len(shut)) * _HOUR_MS
    capacity = arrays["pools.capacity_gpus"][shut]
    _put(
        arrays,
        "reserved",
        pool=shut,
        from_ms=from_ms,
        to_ms=from_ms + _HOUR_MS,
        gpus=np.maximum(1, np.rint(capacity * draw.uniform(0.2, 1.0, len(shut)))),
    )
    leaves = draw.random(pools) < 0.03
    _put(arrays, "pools", drains_at_ms=np.where(leaves, now_ms + draw.integers(1, 4, pools) * _HOUR_MS, NONE))


def _tenants(arrays: dict[str, Array]) -> NDArray[np.int64]:
    """Give every job a tenant, one for about fifty jobs, and return the tenants' row of each job."""
    jobs = len(arrays["jobs.job_id"])
    count = max(1, jobs // _JOBS_PER_TENANT)
    tenant = np.arange(jobs) * 7919 % count
    if len(arrays["tenants.tenant_id"]) == 0:
        place = _add_names(arrays, [f"tenant{index:05d}" for index in range(count)])
        _put(arrays, "tenants", tenant_id=place, budget_micros_per_hour=[NONE] * count, floor_gpus=[NONE] * count)
        _put(arrays, "jobs", tenant_id=place[tenant])
    return tenant


def _add_names(arrays: dict[str, Array], texts: list[str]) -> NDArray[np.int64]:
    """Add names to the dictionary, move what refers to it, and return where the new ones stand."""
    old = arrays["names.text"]
    new = np.array([text.encode() for text in texts])
    merged = np.unique(np.concatenate([old, new]))
    moved = np.append(np.searchsorted(merged, old), NONE).astype(np.int32)
    for group, columns in SCHEMA.items():
        for name, column in columns.items():
            if column.refers == "names":
                arrays[f"{group}.{name}"] = moved[arrays[f"{group}.{name}"]]
    arrays["names.text"] = merged
    return np.searchsorted(merged, new)


def _budgets(arrays: dict[str, Array], draw: np.random.Generator) -> None:
    """Give half of the tenants a budget around a third of what their jobs could spend."""
    tenant = _tenants(arrays)
    count = len(arrays["tenants.tenant_id"])
    could = np.bincount(tenant, arrays["jobs.hold_left_micros"], count)
    budget = np.maximum(1, np.rint(could * draw.uniform(0.1, 0.6, count)))
    _put(arrays, "tenants", budget_micros_per_hour=np.where(draw.random(count) < 0.5, budget, NONE))


def _floors(arrays: dict[str, Array], draw: np.random.Generator) -> None:
    """Promise a third of the tenants a tenth of their even share."""
    _tenants(arrays)
    count = len(arrays["tenants.tenant_id"])
    even = int(arrays["pools.capacity_gpus"].sum()) / count
    floor = np.maximum(1, np.rint(even * draw.uniform(0.05, 0.2, count)))
    _put(arrays, "tenants", floor_gpus=np.where(draw.random(count) < 1 / 3, floor, NONE))
    _put(arrays, "market", floor_penalty_micros_per_gpu_hour=[200_000])


def _incumbents(arrays: dict[str, Array], draw: np.random.Generator) -> None:
    """Let most jobs run already, on one site as far as pools have room; one in five is past its term."""
    jobs = len(arrays["jobs.job_id"])
    start = starts(arrays["accelerators.job"], jobs)
    free = arrays["pools.capacity_gpus"].copy()
    quota = np.where(arrays["pools.job_gpus_max"] < 0, free, arrays["pools.job_gpus_max"])
    pool_type, names = arrays["pools.gpu_type"], [text.decode() for text in arrays["names.text"].tolist()]
    of_type = {kind: np.flatnonzero(pool_type == kind) for kind in np.unique(pool_type).tolist()}
    wish, spot = draw.random(jobs), draw.random((jobs, 2))
    rows: list[tuple[int, int, int]] = []
    for row in range(jobs):
        if wish[row] > 0.75:
            continue
        request = start[row] + int(spot[row, 0] * (start[row + 1] - start[row]))
        count = min(int(arrays["accelerators.count_max"][request]), 2 * int(arrays["accelerators.count_min"][request]))
        pools = of_type.get(int(arrays["accelerators.gpu_type"][request]), np.zeros(0, np.int64))
        pools = pools[(free[pools] >= count) & (quota[pools] >= count)]
        if len(pools):
            place = int(pools[int(spot[row, 1] * len(pools))])
            free[place] -= count
            rows.append((row, place, count))
    job, pool, gpus = np.array(rows, np.int64).reshape(-1, 3).T
    past = draw.random(len(job)) < 0.2
    now_ms = int(arrays["market.taken_at_ms"][0])
    times = np.array([_times(arrays, *placed, names) for placed in rows]).reshape(-1, 4)
    speed = times[:, 0]
    worth = arrays["jobs.bid_micros_per_million_samples"][job] * speed * 3600 / 1e6
    _put(
        arrays,
        "incumbents",
        job=job,
        epoch=np.ones(len(job)),
        term_ends_ms=np.where(past, now_ms, now_ms + draw.integers(60_000, _HOUR_MS, len(job))),
        restart_cost_micros=np.rint(worth * 60 / 3600),
        hub_site=np.full(len(job), NONE),
        strategy=np.full(len(job), STRATEGIES.index("local")),
        codec=np.full(len(job), CODECS.index("fp32")),
        fragments=np.full(len(job), 4),
        overlap_steps=np.full(len(job), 1),
        **{
            name: arrays[f"jobs.{name}"][job]
            for name in ("period_steps", "outer_learning_rate", "outer_momentum", "checkpoint_rounds", "patience_s")
        },
        samples_per_s=speed,
        compute_s=times[:, 1],
        intra_site_s=times[:, 2],
        inter_site_s=np.zeros(len(job)),
        step_s=times[:, 3],
    )
    site_name = arrays["sites.site_id"][arrays["pools.site"][pool]]
    _put(
        arrays, "incumbent_parts", incumbent=np.arange(len(job)), site_id=site_name, gpu_type=pool_type[pool], gpus=gpus
    )
    labels = [f"{names[site]}/{names[kind]}" for site, kind in zip(site_name, pool_type[pool], strict=True)]
    distinct = sorted(set(labels))
    name_of = dict(zip(distinct, _add_names(arrays, distinct).tolist(), strict=True)) if distinct else {}
    _put(
        arrays,
        "locked_prices",
        incumbent=np.arange(len(job)),
        pool_id=[name_of[label] for label in labels],
        price_micros_per_gpu_hour=arrays["pools.ask_micros_per_gpu_hour"][pool],
    )


def _times(
    arrays: dict[str, Array], job: int, pool: int, gpus: int, names: list[str]
) -> tuple[float, float, float, float]:
    """Return samples/s and the seconds of a step: compute, all-reduce, whole."""
    gpu = GPU_TYPES[names[arrays["pools.gpu_type"][pool]]]
    batch = float(arrays["jobs.batch_per_gpu"][job])
    flops = gpu.peak_flops_per_s * gpu.achieved_share
    compute_s = throughput.compute_s(batch, float(arrays["jobs.flops_per_sample"][job]), flops)
    reduce_s = throughput.all_reduce_s(float(arrays["jobs.parameters"][job]), gpus, gpu.intra_site_bits_per_s)
    return batch * gpus / (compute_s + reduce_s), compute_s, reduce_s, compute_s + reduce_s


def _bid_steps(arrays: dict[str, Array], draw: np.random.Generator) -> None:
    """Let half of the jobs bid less for speed beyond what their usual count gives on an A100."""
    jobs = np.flatnonzero(draw.random(len(arrays["jobs.job_id"])) < 0.5)
    start = starts(arrays["accelerators.job"], len(arrays["jobs.job_id"]))
    usual = arrays["accelerators.count_max"][start[jobs]] / 2
    gpu = GPU_TYPES["A100"]
    speed = usual * gpu.peak_flops_per_s * gpu.achieved_share / arrays["jobs.flops_per_sample"][jobs]
    bid = arrays["jobs.bid_micros_per_million_samples"][jobs]
    lower = np.floor(bid * draw.uniform(0.3, 0.8, len(jobs)))
    falls = lower < bid
    _put(
        arrays,
        "bid_steps",
        job=jobs[falls],
        above_samples_per_s=speed[falls],
        bid_micros_per_million_samples=lower[falls],
    )


def _speeds(arrays: dict[str, Array], draw: np.random.Generator) -> None:
    """State measured speeds for a fifth of the requests: around the catalogue's prior."""
    rows = np.flatnonzero(draw.random(len(arrays["accelerators.job"])) < 0.2)
    kinds = [text.decode() for text in arrays["names.text"][arrays["accelerators.gpu_type"][rows]].tolist()]
    prior = np.array([GPU_TYPES[kind].peak_flops_per_s * GPU_TYPES[kind].achieved_share for kind in kinds])
    _put(
        arrays,
        "speeds",
        job=arrays["accelerators.job"][rows],
        gpu_type=arrays["accelerators.gpu_type"][rows],
        flops_per_s=prior * draw.uniform(0.7, 1.3, len(rows)),
        ring_bits_per_s=np.full(len(rows), np.nan),
    )


_ADD: Final = {
    "ask_curves": _ask_curves,
    "mixed_types": _mixed_types,
    "slots": _slots,
    "budgets": _budgets,
    "floors": _floors,
    "incumbents": _incumbents,
    "bid_steps": _bid_steps,
    "speeds": _speeds,
}
