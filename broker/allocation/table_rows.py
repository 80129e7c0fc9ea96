"""A snapshot as columns, and columns as a snapshot: both ways without loss, rows in canonical order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from broker.allocation.configuration import Configuration, Part, Traffic
from broker.allocation.errors import DocumentError
from broker.allocation.snapshot import (
    AskStep,
    BidStep,
    DataEgress,
    DataState,
    Incumbent,
    JobSpeed,
    JobState,
    LinkState,
    PoolState,
    Reservation,
    SiteState,
    Snapshot,
    TenantState,
)
from broker.allocation.table_checks import checked
from broker.allocation.tables import (
    CODECS,
    LATER_COLUMNS,
    PAYMENT_RULES,
    RESIDENCIES,
    SCHEMA,
    STRATEGIES,
    Array,
    Tables,
    starts,
)
from training.spec import GpuRequest, SyncPlan, Workload

_MARKET: Final = tuple(SCHEMA["market"])
_WORKLOAD: Final = ("samples", "batch_per_gpu", "parameters", "flops_per_sample")
_PLAN: Final = ("period_steps", "outer_learning_rate", "outer_momentum", "checkpoint_rounds", "patience_s")
_UNUSED: Final = SyncPlan()
_TIMES: Final = ("samples_per_s", "compute_s", "intra_site_s", "inter_site_s", "step_s")


class Names:
    """The dictionary of short strings while tables are being made: text to index in sorted order."""

    def __init__(self, texts: Iterable[str | None]) -> None:
        """Give the distinct texts numbers in their order."""
        self.texts = sorted({text for text in texts if text is not None})
        self._index = {text: index for index, text in enumerate(self.texts)}

    def __getitem__(self, text: str | None) -> int:
        """Return the index of a text, -1 for none."""
        return -1 if text is None else self._index[text]


class TablesBuilder:
    """Columns being collected: each appended as a sequence of plain values in row order."""

    def __init__(self) -> None:
        """Start without any."""
        self._arrays: dict[str, Array] = {}

    def add(self, group: str, **columns: Sequence[Any] | Array) -> None:
        """Add columns of a group with the types that the schema says."""
        for name, values in columns.items():
            dtype = SCHEMA[group][name].dtype
            try:
                if dtype == "S":
                    self._arrays[f"{group}.{name}"] = _ascii(values)
                else:
                    self._arrays[f"{group}.{name}"] = np.asarray(values, dtype=dtype).reshape(len(values))
            except (OverflowError, UnicodeError) as error:
                message = f"{group}.{name}: {error}; give whole numbers below 2^63 and ASCII names"
                raise DocumentError(message) from None

    def tables(self) -> Tables:
        """Return the finished tables; groups that were not added are empty."""
        for group, columns in SCHEMA.items():
            for name, column in columns.items():
                if f"{group}.{name}" in LATER_COLUMNS:
                    continue  # `checked` adds what is not used
                self._arrays.setdefault(f"{group}.{name}", np.zeros(0, "S1" if column.dtype == "S" else column.dtype))
        return checked(self._arrays)


def from_snapshot(snapshot: Snapshot) -> Tables:
    """Return a snapshot's columns, rows sorted. Raises DocumentError where a value fits no column."""
    build = TablesBuilder()
    names = Names(_texts(snapshot))
    build.add("market", **{name: [getattr(snapshot, name)] for name in _MARKET if name != "payment_rule"})
    build.add("market", payment_rule=[PAYMENT_RULES.index(snapshot.payment_rule)])
    build.add("names", text=names.texts)
    site_index = _sites(build, snapshot, names)
    _pools(build, snapshot, names, site_index)
    links = sorted(snapshot.links, key=lambda link: (link.from_site, link.to_site))
    build.add(
        "links",
        from_site=[site_index[link.from_site] for link in links],
        to_site=[site_index[link.to_site] for link in links],
        **_plain(
            links,
            "bandwidth_bits_per_s",
            "delay_s",
            "loss",
            "egress_price_micros_per_gb",
            "last_price_micros_per_share_hour",
        ),
    )
    tenants = sorted(snapshot.tenants, key=lambda tenant: tenant.tenant_id)
    build.add(
        "tenants",
        tenant_id=[names[tenant.tenant_id] for tenant in tenants],
        budget_micros_per_hour=[_or(tenant.budget_micros_per_hour, -1) for tenant in tenants],
        floor_gpus=[_or(tenant.floor_gpus, -1) for tenant in tenants],
    )
    prices = sorted(snapshot.last_prices.items())
    build.add(
        "last_prices",
        pool_id=[names[pool] for pool, _ in prices],
        price_micros_per_gpu_hour=[price for _, price in prices],
    )
    jobs = sorted(snapshot.jobs, key=lambda job: (job.submitted_ms, job.job_id))
    _jobs(build, jobs, names, site_index)
    _job_rows(build, jobs, names)
    _incumbents(build, jobs, names)
    return build.tables()


def _texts(snapshot: Snapshot) -> Iterable[str | None]:
    for site in snapshot.sites:
        yield from (site.site_id, site.region, site.continent)
    yield from (pool.gpu_type for pool in snapshot.pools)
    yield from (tenant.tenant_id for tenant in snapshot.tenants)
    yield from snapshot.last_prices
    lists = set()
    for job in snapshot.jobs:
        yield job.tenant_id
        yield from (request.gpu_type for request in job.accelerators)
        yield from (speed.gpu_type for speed in job.speeds)
        if job.sites_allowed:
            lists.add(job.sites_allowed)
        if job.incumbent is not None:
            sold = job.incumbent.configuration
            yield sold.hub_site
            yield from job.incumbent.locked_prices
            for part in sold.parts:
                yield from (part.site_id, part.gpu_type)
            for row in sold.traffic:
                yield from (row.from_site, row.to_site)
    for sites in lists:
        yield from sites


def _sites(build: TablesBuilder, snapshot: Snapshot, names: Names) -> dict[str, int]:
    sites = sorted(snapshot.sites, key=lambda site: site.site_id)
    build.add(
        "sites",
        site_id=[names[site.site_id] for site in sites],
        region=[names[site.region] for site in sites],
        continent=[names[site.continent] for site in sites],
        **_plain(sites, "listens"),
        **_plain([site.egress_micros_per_gb for site in sites], "to_region", "to_continent", "beyond"),
    )
    return {site.site_id: index for index, site in enumerate(sites)}


def _pools(build: TablesBuilder, snapshot: Snapshot, names: Names, site_index: dict[str, int]) -> None:
    pools = sorted(snapshot.pools, key=lambda pool: (pool.site_id, pool.gpu_type))
    build.add(
        "pools",
        site=[site_index[pool.site_id] for pool in pools],
        gpu_type=[names[pool.gpu_type] for pool in pools],
        **_plain(pools, "capacity_gpus", "ask_micros_per_gpu_hour"),
        flops_per_s=[_or(pool.flops_per_s, np.nan) for pool in pools],
        intra_site_bits_per_s=[_or(pool.intra_site_bits_per_s, np.nan) for pool in pools],
        job_gpus_max=[_or(pool.job_gpus_max, -1) for pool in pools],
        drains_at_ms=[_or(pool.drains_at_ms, -1) for pool in pools],
    )
    parents, steps = _flat([pool.ask_steps for pool in pools])
    build.add("ask_steps", pool=parents, **_plain(steps, "gpus", "ask_micros_per_gpu_hour"))
    parents, reserved = _flat([pool.reserved for pool in pools])
    build.add("reserved", pool=parents, **_plain(reserved, "from_ms", "to_ms", "gpus"))


def _jobs(build: TablesBuilder, jobs: list[JobState], names: Names, site_index: dict[str, int]) -> None:
    lists: dict[tuple[str, ...], int] = {}
    for job in jobs:
        if job.sites_allowed is not None:
            lists.setdefault(job.sites_allowed, len(lists))
    build.add("site_lists", length=[len(sites) for sites in lists])
    build.add("site_list_sites", site_id=[names[site] for sites in lists for site in sites])
    build.add(
        "jobs",
        **_plain(
            jobs,
            "job_id",
            "version",
            "submitted_ms",
            "sites_max",
            "samples_done",
            "bid_micros_per_million_samples",
            "hold_left_micros",
            "mixed_types",
        ),
        site_list=[-1 if job.sites_allowed is None else lists[job.sites_allowed] for job in jobs],
        **_plain([job.workload for job in jobs], *_WORKLOAD),
        **_sync([job.sync for job in jobs]),
        **_open_sync(jobs),
        deadline_ms=[_or(job.deadline_ms, -1) for job in jobs],
        tenant_id=[names[job.tenant_id] for job in jobs],
        data_home=[-1 if job.data is None else site_index[job.data.home_site] for job in jobs],
        data_residency=[0 if job.data is None else RESIDENCIES.index(job.data.residency) for job in jobs],
        data_bytes_per_sample=[0.0 if job.data is None else job.data.bytes_per_sample for job in jobs],
    )


def _job_rows(build: TablesBuilder, jobs: list[JobState], names: Names) -> None:
    parents, requests = _flat([job.accelerators for job in jobs])
    build.add(
        "accelerators",
        job=parents,
        gpu_type=[names[request.gpu_type] for request in requests],
        **_plain(requests, "count_min", "count_max"),
    )
    parents, steps = _flat([job.bid_steps for job in jobs])
    build.add("bid_steps", job=parents, **_plain(steps, "above_samples_per_s", "bid_micros_per_million_samples"))
    parents, speeds = _flat([job.speeds for job in jobs])
    build.add(
        "speeds",
        job=parents,
        gpu_type=[names[speed.gpu_type] for speed in speeds],
        flops_per_s=[speed.flops_per_s for speed in speeds],
        ring_bits_per_s=[_or(speed.ring_bits_per_s, np.nan) for speed in speeds],
    )
    parents, keys = _flat([job.barred for job in jobs])
    build.add("barred", job=parents, key=keys)


def _incumbents(build: TablesBuilder, jobs: list[JobState], names: Names) -> None:
    running = [(index, job.incumbent) for index, job in enumerate(jobs) if job.incumbent is not None]
    leases = [incumbent for _, incumbent in running]
    sold = [lease.configuration for lease in leases]
    build.add(
        "incumbents",
        job=[index for index, _ in running],
        **_plain(leases, "epoch", "term_ends_ms", "restart_cost_micros"),
        hub_site=[names[configuration.hub_site] for configuration in sold],
        **_sync([configuration.sync for configuration in sold]),
        **_sold_sync(
            [(jobs[index], configuration.sync) for (index, _), configuration in zip(running, sold, strict=True)]
        ),
        **_plain(sold, *_TIMES),
    )
    parents, parts = _flat([configuration.parts for configuration in sold])
    build.add(
        "incumbent_parts",
        incumbent=parents,
        site_id=[names[part.site_id] for part in parts],
        gpu_type=[names[part.gpu_type] for part in parts],
        **_plain(parts, "gpus"),
    )
    parents, rows = _flat([configuration.traffic for configuration in sold])
    build.add(
        "incumbent_traffic",
        incumbent=parents,
        from_site=[names[row.from_site] for row in rows],
        to_site=[names[row.to_site] for row in rows],
        **_plain(rows, "bytes_per_s"),
    )
    parents, prices = _flat([tuple(sorted(lease.locked_prices.items())) for lease in leases])
    build.add(
        "locked_prices",
        incumbent=parents,
        pool_id=[names[pool] for pool, _ in prices],
        price_micros_per_gpu_hour=[price for _, price in prices],
    )


def _sync(plans: list[SyncPlan]) -> dict[str, list[Any]]:
    return {
        "strategy": [STRATEGIES.index(plan.strategy) for plan in plans],
        "codec": [CODECS.index(plan.codec) for plan in plans],
        **_plain(plans, *_PLAN),
    }


def _open_sync(jobs: list[JobState]) -> dict[str, list[Any]]:
    """Return what a choice of plans looks at, as not used where none is made."""
    plans = [job.sync if job.sync_open else _UNUSED for job in jobs]
    return {
        "sync_open": [job.sync_open for job in jobs],
        "max_egress_gb": [plan.max_egress_gb or 0.0 for plan in plans],
        **_plain(plans, "target_utilisation", "fragments"),
    }


def _sold_sync(leases: list[tuple[JobState, SyncPlan]]) -> dict[str, list[Any]]:
    """Return what leases were sold with that only a choice of plans decides."""
    return _plain([plan if job.sync_open else _UNUSED for job, plan in leases], "fragments", "overlap_steps")


def _plain(rows: Sequence[Any], *names: str) -> dict[str, list[Any]]:
    return {name: [getattr(row, name) for row in rows] for name in names}


def _flat(groups: Sequence[Sequence[Any]]) -> tuple[list[int], list[Any]]:
    parents = [parent for parent, rows in enumerate(groups) for _ in rows]
    return parents, [row for rows in groups for row in rows]


def _or(value: float | None, absent: float) -> float:
    return absent if value is None else value


def _ascii(values: Sequence[str] | Array) -> Array:
    if isinstance(values, np.ndarray) and values.dtype.kind == "S":
        return values
    encoded = [str(value).encode("ascii") for value in values]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def to_snapshot(tables: Tables) -> Snapshot:
    """Return the snapshot that columns hold, rows in canonical order."""
    market: dict[str, Any] = {name: tables[f"market.{name}"][0].item() for name in _MARKET}
    market["payment_rule"] = PAYMENT_RULES[market["payment_rule"]]
    site_ids = tables.names("sites.site_id")
    return Snapshot(
        **market,
        sites=tuple(_site_rows(tables)),
        pools=tuple(_pool_rows(tables, site_ids)),
        links=tuple(
            LinkState(from_site=site_ids[row.pop("from_site")], to_site=site_ids[row.pop("to_site")], **row)
            for row in _rows(tables, "links")
        ),
        tenants=tuple(
            TenantState(
                tenant_id=row["tenant_id"],
                budget_micros_per_hour=_absent(row["budget_micros_per_hour"]),
                floor_gpus=_absent(row["floor_gpus"]),
            )
            for row in _rows(tables, "tenants")
        ),
        last_prices={row["pool_id"]: row["price_micros_per_gpu_hour"] for row in _rows(tables, "last_prices")},
        jobs=tuple(_job_states(tables, site_ids)),
    )


def _rows(tables: Tables, group: str) -> list[dict[str, Any]]:
    """Return a group's rows as plain values, references to names as text or None."""
    columns: dict[str, list[Any]] = {}
    for name, column in SCHEMA[group].items():
        if column.refers == "names":
            columns[name] = [text or None for text in tables.names(f"{group}.{name}")]
        elif column.dtype == "S":
            columns[name] = tables.names(f"{group}.{name}")
        else:
            columns[name] = tables[f"{group}.{name}"].tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _children(tables: Tables, group: str, parents: int) -> list[list[dict[str, Any]]]:
    """Return a group's rows by parent, without the reference."""
    parent = next(iter(SCHEMA[group]))
    rows = _rows(tables, group)
    for row in rows:
        del row[parent]
    start = starts(tables[f"{group}.{parent}"], parents).tolist()
    return [rows[start[index] : start[index + 1]] for index in range(parents)]


def _site_rows(tables: Tables) -> Iterable[SiteState]:
    for row in _rows(tables, "sites"):
        egress = DataEgress(**{name: row.pop(name) for name in ("to_region", "to_continent", "beyond")})
        yield SiteState(egress_micros_per_gb=egress, **row)


def _pool_rows(tables: Tables, site_ids: list[str]) -> Iterable[PoolState]:
    count = tables.rows("pools")
    steps, reserved = _children(tables, "ask_steps", count), _children(tables, "reserved", count)
    for index, row in enumerate(_rows(tables, "pools")):
        site = site_ids[row.pop("site")]
        yield PoolState(
            pool_id=f"{site}/{row['gpu_type']}",
            site_id=site,
            gpu_type=row["gpu_type"],
            capacity_gpus=row["capacity_gpus"],
            ask_micros_per_gpu_hour=row["ask_micros_per_gpu_hour"],
            flops_per_s=_number(row["flops_per_s"]),
            intra_site_bits_per_s=_number(row["intra_site_bits_per_s"]),
            ask_steps=tuple(AskStep(**step) for step in steps[index]),
            job_gpus_max=_absent(row["job_gpus_max"]),
            reserved=tuple(Reservation(**window) for window in reserved[index]),
            drains_at_ms=_absent(row["drains_at_ms"]),
        )


def _job_states(tables: Tables, site_ids: list[str]) -> Iterable[JobState]:
    count = tables.rows("jobs")
    requests, steps = _children(tables, "accelerators", count), _children(tables, "bid_steps", count)
    speeds, barred = _children(tables, "speeds", count), _children(tables, "barred", count)
    ends = np.cumsum(tables["site_lists.length"]).tolist()
    listed = tables.names("site_list_sites.site_id")
    lists = [tuple(listed[end - length : end]) for end, length in zip(ends, tables["site_lists.length"], strict=True)]
    incumbents = _incumbent_rows(tables)
    for index, row in enumerate(_rows(tables, "jobs")):
        home = row["data_home"]
        yield JobState(
            job_id=row["job_id"],
            version=row["version"],
            submitted_ms=row["submitted_ms"],
            accelerators=tuple(GpuRequest(**request) for request in requests[index]),
            sites_max=row["sites_max"],
            sites_allowed=None if row["site_list"] < 0 else lists[row["site_list"]],
            workload=Workload(**{name: row[name] for name in _WORKLOAD}),
            sync=_plan(row, target_utilisation=row["target_utilisation"], max_egress_gb=row["max_egress_gb"] or None),
            samples_done=row["samples_done"],
            bid_micros_per_million_samples=row["bid_micros_per_million_samples"],
            hold_left_micros=row["hold_left_micros"],
            deadline_ms=_absent(row["deadline_ms"]),
            barred=tuple(bar["key"] for bar in barred[index]),
            incumbent=incumbents.get(index),
            tenant_id=row["tenant_id"],
            data=None
            if home < 0
            else DataState.model_validate(
                {
                    "home_site": site_ids[home],
                    "residency": RESIDENCIES[row["data_residency"]],
                    "bytes_per_sample": row["data_bytes_per_sample"],
                }
            ),
            bid_steps=tuple(BidStep(**step) for step in steps[index]),
            speeds=tuple(
                JobSpeed(**{**speed, "ring_bits_per_s": _number(speed["ring_bits_per_s"])}) for speed in speeds[index]
            ),
            mixed_types=row["mixed_types"],
            sync_open=row["sync_open"],
        )


def _incumbent_rows(tables: Tables) -> dict[int, Incumbent]:
    """Return the incumbents by their job's row."""
    count = tables.rows("incumbents")
    parts, traffic = _children(tables, "incumbent_parts", count), _children(tables, "incumbent_traffic", count)
    locked = _children(tables, "locked_prices", count)
    found = {}
    for index, row in enumerate(_rows(tables, "incumbents")):
        found[row["job"]] = Incumbent(
            configuration=Configuration(
                parts=tuple(Part(pool_id=f"{part['site_id']}/{part['gpu_type']}", **part) for part in parts[index]),
                sync=_plan(row),
                hub_site=row["hub_site"],
                **{name: row[name] for name in _TIMES},
                traffic=tuple(Traffic(**line) for line in traffic[index]),
            ),
            epoch=row["epoch"],
            locked_prices={price["pool_id"]: price["price_micros_per_gpu_hour"] for price in locked[index]},
            term_ends_ms=row["term_ends_ms"],
            restart_cost_micros=row["restart_cost_micros"],
        )
    return found


def _plan(row: dict[str, Any], **further: float | None) -> SyncPlan:
    return SyncPlan.model_validate(
        {
            "strategy": STRATEGIES[row["strategy"]],
            "codec": CODECS[row["codec"]],
            "fragments": row["fragments"],
            **{name: row[name] for name in (*_PLAN, "overlap_steps") if name in row},
            **further,
        }
    )


def _absent(value: int) -> int | None:
    return None if value < 0 else value


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
