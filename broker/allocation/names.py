"""From numbers back to names: pools, links, rows, and the configuration that a column stands for.

Sites veto configurations by name ("ada/H100:8+bob/H100:8"); here such names become columns' keys.
"""

from __future__ import annotations

from typing import Any, Final, cast

import numpy as np

from broker.allocation import kernel
from broker.allocation.compiled import compiled_loop
from broker.allocation.configuration import Configuration, Part, Traffic, configuration_of
from broker.allocation.incumbents import Leases, Own
from broker.allocation.instance import BUNDLE, SINGLE, SPAN, SPAN_SITES_MAX, Flag, Instance, Int
from broker.allocation.tables import CODECS, STRATEGIES, Tables, starts
from training.catalogue import GPU_TYPES
from training.spec import Codec, SyncPlan, Workload
from training.sync_choice import choose_sync, completed
from training.sync_rule import WAYS
from training.throughput import Link, SitePart, predict

_TYPES: Final = tuple(GPU_TYPES)
_PLAN: Final = ("period_steps", "outer_learning_rate", "outer_momentum", "checkpoint_rounds", "patience_s")


class Names:
    """What the numbers of an instance are called. Lists are by index."""

    def __init__(self, tables: Tables, instance: Instance, leases: Leases, own: Own) -> None:
        """Read the names once."""
        self.sites = tables.names("sites.site_id")
        self.jobs = tables.names("jobs.job_id")
        self.tenants = tables.names("tenants.tenant_id")
        types = tables.names("pools.gpu_type")
        self.pool_parts = [(self.sites[site], kind) for site, kind in zip(tables["pools.site"], types, strict=True)]
        self.pools = [f"{site}/{kind}" for site, kind in self.pool_parts]
        ends = zip(instance.links.from_site.tolist(), instance.links.to_site.tolist(), strict=True)
        self.links = [(self.sites[a], self.sites[b]) for a, b in ends]
        self._link_index = {pair: index for index, pair in enumerate(self.links)}
        self._tables, self._instance = tables, instance
        self._leases, self._stands = leases, np.flatnonzero(own.stands)
        self._texts = [text.decode() for text in tables["names.text"].tolist()]

    def row(self, row: int) -> str:
        """Return what a row is, for people: a pool and its slot, a link, a budget or a floor."""
        instance = self._instance
        pools = instance.pool_count
        if row < instance.links.first_row:
            slot = f" in slot {row // pools}" if instance.slots > 1 else ""
            return f"{self.pools[row % pools]}{slot}"
        link = row - instance.links.first_row
        if link < len(self.links):
            return "link {} to {}".format(*self.links[link])
        for column, what in ((instance.jobs.budget_row, "budget"), (instance.jobs.floor_row, "floor")):
            jobs = np.flatnonzero(column == row)
            if len(jobs):
                return f"{what} of {self._texts[self._tables['jobs.tenant_id'][jobs[0]]]}"
        return f"row {row}"

    def configuration(self, job: int, form: int, item: int, place: int) -> Configuration:
        """Return the configuration that a column of a job is, with its prediction.

        A bundle is a lease's own place: as sold inside its term, predicted anew after it.
        """
        instance = self._instance
        if form == SINGLE:
            part = self._part(job, place, int(instance.singles.gpus[item]))
            asked = self._plan("jobs", job)
            # On one site a contribution never crosses a link (training.throughput.resolve_sync).
            alone = "fp32" if asked.codec == "auto" else asked.codec
            if asked.strategy == "diloco":
                plan = asked.model_copy(update={"codec": alone})
            else:
                plan = asked.model_copy(update={"strategy": "local", "codec": "fp32"})
            return self._predicted(job, [part], plan, None)
        if form == SPAN:
            return self._span(job, item, place)
        assert form == BUNDLE, "a job without a column has no configuration"
        lease = int(self._stands[item])
        if instance.jobs.must[job]:
            return self._sold(lease)
        first, end = self._leases.part_start[lease], self._leases.part_start[lease + 1]
        parts = [
            self._part(job, int(self._leases.part_pool[part]), int(self._leases.part_gpus[part]))
            for part in range(first, end)
        ]
        hub = self._tables["incumbents.hub_site"][lease]
        return self._predicted(job, parts, self._plan("incumbents", lease), self._texts[hub] if hub >= 0 else None)

    def plan_reasons(self, job: int, sold: Configuration) -> tuple[str, ...]:
        """Return why an open plan became what it is on several sites: a sentence for each way weighed, the last the one taken."""
        tables, places = self._tables, {pool_id: place for place, pool_id in enumerate(self.pools)}
        parts = [self._part(job, places[part.pool_id], part.gpus) for part in sold.parts]
        cap = float(tables["jobs.max_egress_gb"][job]) or None
        target = float(tables["jobs.target_utilisation"][job])
        asked = self._plan("jobs", job).model_copy(update={"target_utilisation": target, "max_egress_gb": cap})
        listening = frozenset({str(sold.hub_site)})
        chosen = choose_sync(self._workload(job), asked, parts, self._speeds(parts, sold.hub_site), listening)
        return () if chosen is None else chosen.reasons

    def slots(self, form: int, item: int) -> tuple[int, int]:
        """Return the first slot of a column and the one after its last."""
        instance = self._instance
        if form == SINGLE:
            good = instance.singles.good[item]
            return int(instance.goods.first[good]), int(instance.goods.end[good])
        if form == SPAN:
            return 0, int(instance.spans.slots[item])
        rows = instance.bundles.entry_row[instance.bundles.entry_start[item] : instance.bundles.entry_start[item + 1]]
        return 0, int(rows[rows < instance.links.first_row].max(initial=0)) // instance.pool_count + 1

    def _span(self, job: int, span: int, pattern: int) -> Configuration:
        out = np.zeros(kernel.SPAN_OUT, np.int64)
        speed = kernel.span_column(self._instance, job, span, pattern, out)
        assert speed > 0, "a chosen span is one that exists"
        patterns = self._instance.patterns
        parts = [
            self._part(job, int(patterns.pool[pattern, part]), int(out[kernel.PARTS + part * kernel.PART_FIELDS]))
            for part in range(patterns.parts[pattern])
        ]
        codec = kernel.CODECS[out[kernel.CODEC]]
        asked, way = self._plan("jobs", job), int(out[kernel.WAY])
        plan = asked.model_copy(update={"strategy": asked.between_sites, "codec": codec})
        if way >= 0:
            taken = WAYS[way]._replace(codec=cast("Codec", codec))
            plan = completed(asked, taken, period=float(out[kernel.PERIOD]), overlap=float(out[kernel.OVERLAP]))
        return self._predicted(job, parts, plan, parts[patterns.hub[pattern]].site_id)

    def _part(self, job: int, pool: int, gpus: int) -> SitePart:
        site, gpu_type = self.pool_parts[pool]
        kind, column = self._instance.pools.kind[pool], _TYPES.index(gpu_type)
        flops = self._instance.jobs.flops_per_s[job, column]
        ring = self._instance.jobs.ring_bits_per_s[job, column]
        return SitePart(
            site,
            gpu_type,
            gpus,
            float(self._instance.kinds.flops_per_s[kind] if np.isnan(flops) else flops),
            float(self._instance.kinds.ring_bits_per_s[kind] if np.isnan(ring) else ring),
        )

    def _predicted(self, job: int, parts: list[SitePart], plan: SyncPlan, hub: str | None) -> Configuration:
        overlapped = bool(self._tables["jobs.sync_open"][job])
        links = self._speeds(parts, hub)
        prediction = predict(self._workload(job), plan, parts, links, hub, overlapped=overlapped)
        return configuration_of(parts, plan, hub, prediction)

    def _workload(self, job: int) -> Workload:
        tables = self._tables
        return Workload(
            samples=int(tables["jobs.samples"][job]),
            batch_per_gpu=int(tables["jobs.batch_per_gpu"][job]),
            parameters=int(tables["jobs.parameters"][job]),
            flops_per_sample=float(tables["jobs.flops_per_sample"][job]),
        )

    def _speeds(self, parts: list[SitePart], hub: str | None) -> dict[tuple[str, str], Link]:
        """Return the links between the hub and the other parts."""
        links = self._instance.links
        found = {}
        for part in parts:
            for pair in () if hub in (None, part.site_id) else ((part.site_id, str(hub)), (str(hub), part.site_id)):
                link = self._link_index[pair]
                found[pair] = Link(
                    float(links.bits_per_s[link]),
                    float(links.delay_s[link]),
                    float(links.loss[link]),
                    int(links.egress_micros_per_gb[link]),
                )
        return found

    def _plan(self, group: str, row: int) -> SyncPlan:
        fields: dict[str, Any] = {name: self._tables[f"{group}.{name}"][row].item() for name in _PLAN}
        fields["strategy"] = STRATEGIES[self._tables[f"{group}.strategy"][row]]
        fields["codec"] = CODECS[self._tables[f"{group}.codec"][row]]
        for name in ("fragments", "overlap_steps") if group == "incumbents" else ("fragments",):
            fields[name] = self._tables[f"{group}.{name}"][row].item()
        return SyncPlan(**fields)

    def _sold(self, lease: int) -> Configuration:
        tables = self._tables
        first, end = self._leases.part_start[lease], self._leases.part_start[lease + 1]
        sent, last = self._leases.traffic_start[lease], self._leases.traffic_start[lease + 1]
        hub = tables["incumbents.hub_site"][lease]
        return Configuration(
            parts=tuple(
                Part(
                    pool_id=f"{self._texts[site]}/{self._texts[kind]}",
                    site_id=self._texts[site],
                    gpu_type=self._texts[kind],
                    gpus=int(gpus),
                )
                for site, kind, gpus in zip(
                    tables["incumbent_parts.site_id"][first:end],
                    tables["incumbent_parts.gpu_type"][first:end],
                    tables["incumbent_parts.gpus"][first:end],
                    strict=True,
                )
            ),
            sync=self._plan("incumbents", lease),
            hub_site=self._texts[hub] if hub >= 0 else None,
            **{
                name: float(tables[f"incumbents.{name}"][lease])
                for name in ("samples_per_s", "compute_s", "intra_site_s", "inter_site_s", "step_s")
            },
            traffic=tuple(
                Traffic(from_site=self._texts[a], to_site=self._texts[b], bytes_per_s=int(size))
                for a, b, size in zip(
                    tables["incumbent_traffic.from_site"][sent:last],
                    tables["incumbent_traffic.to_site"][sent:last],
                    tables["incumbent_traffic.bytes_per_s"][sent:last],
                    strict=True,
                )
            ),
        )


def vetoed_leases(tables: Tables) -> Flag:
    """Return which incumbents hold a place that a site vetoed lately: it is not offered to them again."""
    vetoed = np.zeros(tables.rows("incumbents"), np.bool_)
    if tables.rows("barred") == 0 or len(vetoed) == 0:
        return vetoed
    lease_of = {job: lease for lease, job in enumerate(tables["incumbents.job"].tolist())}
    start = starts(tables["incumbent_parts.incumbent"], len(vetoed))
    sites, types = tables.names("incumbent_parts.site_id"), tables.names("incumbent_parts.gpu_type")
    gpus = tables["incumbent_parts.gpus"]
    for job, key in zip(tables["barred.job"].tolist(), tables.names("barred.key"), strict=True):
        lease = lease_of.get(job)
        if lease is not None:
            parts = range(start[lease], start[lease + 1])
            vetoed[lease] |= key == "+".join(f"{sites[part]}/{types[part]}:{gpus[part]}" for part in parts)
    return vetoed


def barred_keys(tables: Tables, instance: Instance, leases: Leases, own: Own) -> tuple[Int, Int]:
    """Return the keys of the columns that jobs may not have: vetoed ones, and the incumbent's own place.

    A lease's own place is its bundle; as a single or a span it would cost a restart that nobody makes.
    """
    jobs, pools, gpus = [], [], []
    pool_index = {text: index for index, text in enumerate(_pool_names(tables))} if tables.rows("barred") else {}
    for job, key in zip(tables["barred.job"].tolist(), tables.names("barred.key"), strict=True):
        parts = [part.rpartition(":") for part in key.split("+")]
        if len(parts) > SPAN_SITES_MAX or any(not count.isdecimal() for _, _, count in parts):
            continue
        found = [pool_index.get(name, -1) for name, _, _ in parts]
        if min(found) >= 0:
            jobs.append(job)
            pools.append(found)
            gpus.append([min(int(count), 1 << 40) for _, _, count in parts])
    count = len(jobs)
    holding = np.flatnonzero(own.stands & (np.diff(leases.part_start) <= SPAN_SITES_MAX))
    held = np.full((count + len(holding), 1 + 2 * SPAN_SITES_MAX), -1, np.int64)
    for place in range(count):
        held[place, 0] = jobs[place]
        held[place, 1 : 1 + len(pools[place])] = pools[place]
        held[place, 1 + SPAN_SITES_MAX : 1 + SPAN_SITES_MAX + len(gpus[place])] = gpus[place]
    size = np.diff(leases.part_start)[holding]
    held[count:, 0] = leases.job[holding]
    for part in range(SPAN_SITES_MAX):
        rows = np.flatnonzero(size > part)
        held[count + rows, 1 + part] = leases.part_pool[leases.part_start[holding[rows]] + part]
        held[count + rows, 1 + SPAN_SITES_MAX + part] = leases.part_gpus[leases.part_start[holding[rows]] + part]
    return _keys(tables, instance, held)


def _pool_names(tables: Tables) -> list[str]:
    sites = tables.names("sites.site_id")
    types = tables.names("pools.gpu_type")
    return [f"{sites[site]}/{kind}" for site, kind in zip(tables["pools.site"].tolist(), types, strict=True)]


def _keys(tables: Tables, instance: Instance, held: Int) -> tuple[Int, Int]:
    """Return the keys by job of every column that is one of the `held` places: job, pools, GPUs."""
    order: Int = np.lexsort(instance.patterns.pool.T[::-1]) if (held[:, 2] >= 0).any() else np.zeros(0, np.int64)
    room = max(16, 16 * len(held))
    while True:
        owner, key = np.zeros(room, np.int64), np.zeros(room, np.int64)
        count = int(_matching(instance, held, order, np.zeros(SPAN_SITES_MAX, np.int64), owner, key))
        if count <= room:
            break
        room = count
    pairs = np.unique(np.stack([owner[:count], key[:count]]), axis=1) if count else np.zeros((2, 0), np.int64)
    return starts(pairs[0], tables.rows("jobs")), np.ascontiguousarray(pairs[1])


@compiled_loop
def _matching(instance: Instance, held: Int, order: Int, counts: Int, owner: Int, key: Int) -> int:
    """Fill owner and key with the columns that are a held place, where there is room; return how many there are."""
    singles, spans, patterns, goods = instance.singles, instance.spans, instance.patterns, instance.goods
    found = 0
    for row in range(len(held)):
        job, pool = held[row, 0], held[row, 1]
        if held[row, 2] < 0:
            for single in range(singles.start[job], singles.start[job + 1]):
                if (
                    singles.gpus[single] == held[row, 5]
                    and goods.kind[singles.good[single]] == instance.pools.kind[pool]
                ):
                    if found < len(key):
                        owner[found], key[found] = job, kernel.column_key(0, single, pool)
                    found += 1
            continue
        total = 0
        for part in range(4):
            total += max(0, held[row, 5 + part])
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            smaller = False
            for part in range(4):
                if patterns.pool[order[middle], part] != held[row, 1 + part]:
                    smaller = patterns.pool[order[middle], part] < held[row, 1 + part]
                    break
            if smaller:
                low = middle + 1
            else:
                high = middle
        while low < len(order):
            pattern = order[low]
            same = True
            for part in range(4):
                same &= patterns.pool[pattern, part] == held[row, 1 + part]
            if not same:
                break
            low += 1
            if not kernel.split(total, patterns.weight[pattern], patterns.parts[pattern], counts):
                continue
            for part in range(patterns.parts[pattern]):
                same &= counts[part] == held[row, 5 + part]
            for span in range(spans.start[job], spans.start[job + 1]):
                first = patterns.family_start[spans.family[span]]
                inside = first <= pattern < patterns.family_start[spans.family[span] + 1]
                if same and inside and spans.gpus[span] == total:
                    if found < len(key):
                        owner[found], key[found] = job, kernel.column_key(1, span, pattern)
                    found += 1
    return found
