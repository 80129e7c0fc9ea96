"""What incumbents, slots, budgets, floors, data, vetoes and mixed types become in numbers."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from broker.allocation import kernel
from broker.allocation.compile import Compiled, compile_market
from broker.allocation.configuration import Configuration, Part, Traffic
from broker.allocation.generate import generate
from broker.allocation.generate_features import FEATURES
from broker.allocation.instance import BUNDLE, SHARES, SINGLE, SPAN, capacity
from broker.allocation.patterns import WEIGHTS
from broker.allocation.snapshot import (
    AskStep,
    BidStep,
    DataEgress,
    DataState,
    Incumbent,
    JobSpeed,
    JobState,
    Reservation,
    SiteState,
    Snapshot,
    TenantState,
)
from broker.allocation.table_rows import from_snapshot
from tests.broker.allocation.drawn import snapshots
from tests.broker.allocation.instances import CREDIT, NOW_MS, job, market, pool, random_market
from training.spec import GpuRequest, SyncPlan

HOUR_MS = 3_600_000


def compiled(snapshot: Snapshot) -> Compiled:
    return compile_market(from_snapshot(snapshot))


def sold(parts: dict[str, int], *, hub: str | None = None, speed: float = 4.0, sent: int = 1000) -> Configuration:
    others = [site for site in sorted(parts) if site != hub]
    return Configuration(
        parts=tuple(
            Part(pool_id=f"{site}/A100", site_id=site, gpu_type="A100", gpus=gpus)
            for site, gpus in sorted(parts.items())
        ),
        sync=SyncPlan(strategy="diloco" if hub else "local", codec="int8" if hub else "fp32", period_steps=20),
        hub_site=hub,
        samples_per_s=speed,
        compute_s=1000.0,
        intra_site_s=0.0,
        inter_site_s=0.0,
        step_s=1000.0,
        traffic=tuple(
            Traffic(from_site=a, to_site=b, bytes_per_s=sent) for o in others if hub for a, b in ((hub, o), (o, hub))
        ),
    )


def lease(
    parts: dict[str, int], *, ends_h: float = 1.0, price: float = 1.5, restart: int = 0, **more: Any
) -> Incumbent:
    return Incumbent(
        configuration=sold(parts, **more),
        epoch=1,
        locked_prices={f"{site}/A100": round(price * CREDIT) for site in parts},
        term_ends_ms=NOW_MS + round(ends_h * HOUR_MS),
        restart_cost_micros=restart,
    )


def entries(market: Compiled, bundle: int) -> dict[str, int]:
    bundles = market.instance.bundles
    places = range(bundles.entry_start[bundle], bundles.entry_start[bundle + 1])
    return {market.names.row(int(bundles.entry_row[place])): int(bundles.entry_use[place]) for place in places}


def test_lease_inside_its_term_stays_as_it_was_sold() -> None:
    held = job("a", 2.0, 4, incumbent=lease({"ada": 4}), hold_credits=0)
    market_ = compiled(market([pool("ada", 4)], [held]))
    jobs, bundles = market_.instance.jobs, market_.instance.bundles
    value = kernel.value_rate(jobs, 0, 4.0)
    assert value > 0  # although the hold is empty
    assert jobs.must.tolist() == [True]
    assert jobs.own.tolist() == [0]
    assert bundles.value.tolist() == bundles.charge_max.tolist() == [value]
    assert jobs.locked.tolist() == [value - round(1.5 * CREDIT) * 4]
    assert entries(market_, 0) == {"ada/A100": 4}
    assert market_.names.configuration(0, BUNDLE, 0, 0) == held.incumbent.configuration  # type: ignore[union-attr]


def test_oldest_leases_stay_where_a_pool_shrank() -> None:
    book = [job(name, 2.0, 4, submitted_ms=order, incumbent=lease({"ada": 4})) for order, name in enumerate("cab")]
    jobs = compiled(market([pool("ada", 9)], book)).instance.jobs
    assert jobs.must.tolist() == [True, True, False]
    # Past its term it could still renew there, were it not for the others: its place fits the pool alone.
    assert jobs.own.tolist() == [0, 1, 2]


def test_lease_past_its_term_is_predicted_anew_and_pays_no_restart() -> None:
    held = job("a", 3.0, (1, 8), incumbent=lease({"ada": 4}, ends_h=0.0, restart=CREDIT))
    market_ = compiled(market([pool("ada", 8), pool("bob", 8)], [held]))
    instance = market_.instance
    assert instance.jobs.must.tolist() == [False]
    again = market_.names.configuration(0, BUNDLE, 0, 0)
    assert [part.gpus for part in again.parts] == [4]
    same = next(single for single in range(len(instance.singles.gpus)) if instance.singles.gpus[single] == 4)
    assert again.samples_per_s == instance.singles.speed[same]
    term_s = kernel.term_seconds(instance, 0, again.samples_per_s)
    assert instance.bundles.value[0] - instance.singles.value[same] == kernel.restart_rate(instance.jobs, 0, term_s) > 0
    # Its own place is the bundle and nothing else; the same count elsewhere is a move.
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    ada, bob = market_.names.pools.index("ada/A100"), market_.names.pools.index("bob/A100")
    assert not kernel.single_column(instance, 0, same, ada, out)
    assert kernel.single_column(instance, 0, same, bob, out)


def test_spanning_lease_keeps_its_links_and_a_link_carries_what_it_already_does() -> None:
    held = [
        job(
            name,
            3.0,
            4,
            sites_max=2,
            submitted_ms=order,
            incumbent=lease({"ada": 2, "bob": 2}, hub="ada", sent=100_000_000),
        )
        for order, name in enumerate("ab")
    ]
    market_ = compiled(market([pool("ada", 8), pool("bob", 8)], held))
    instance = market_.instance
    # 100 MB/s is 0.8 of a link of 1 Gbit/s; two of them are 1.6 of it.
    assert entries(market_, 0) == {
        "ada/A100": 2, "bob/A100": 2, "link ada to bob": 8000, "link bob to ada": 8000,
    }  # fmt: skip
    assert capacity(instance.rows)[instance.links.first_row :].tolist() == [16_000, 16_000]
    egress = kernel.ceil_rate(100_000_000 * 3600.0 * 20_000 / 1e9)
    assert instance.bundles.value[0] == kernel.value_rate(instance.jobs, 0, 4.0) - 2 * egress


def test_renewed_span_is_what_the_same_span_would_be() -> None:
    fresh = job("a", 3.0, 4, sites_max=2, parameters=10**7, sync=SyncPlan(codec="int8", period_steps=20))
    held = fresh.model_copy(update={"incumbent": lease({"ada": 2, "bob": 2}, hub="ada", ends_h=0.0, restart=CREDIT)})
    pools = [pool("ada", 8), pool("bob", 8)]
    before, after = compiled(market(pools, [fresh])), compiled(market(pools, [held]))
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    speeds = {}
    for pattern in range(len(before.instance.patterns.pool)):
        speeds[pattern] = kernel.span_column(before.instance, 0, 0, pattern, out)
        if before.instance.patterns.weight[pattern, :2].tolist() == [1, 1]:
            value, even = int(out[kernel.VALUE]), pattern
    assert after.names.configuration(0, BUNDLE, 0, 0).samples_per_s == speeds[even]
    assert after.instance.bundles.value[0] == value
    assert kernel.span_column(after.instance, 0, 0, even, out) == 0  # its own place is the bundle
    assert [kernel.span_column(after.instance, 0, 0, other, out) for other in speeds if other != even] == [
        speeds[other] for other in speeds if other != even
    ]


def test_vetoed_places_do_not_exist() -> None:
    barred = ("ada/A100:2", "ada/A100:1+bob/A100:1", "nowhere/A100:2", "none", "ada/A100:x", "+", ":")
    pools = [pool("ada", 8), pool("bob", 8)]
    market_ = compiled(market(pools, [job("a", 3.0, (1, 4), sites_max=2, barred=barred)]))
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    free = compiled(market(pools, [job("a", 3.0, (1, 4), sites_max=2)]))
    assert _columns(free, out) - _columns(market_, out) == {"ada/A100:2", "ada/A100:1+bob/A100:1"}
    past = job("a", 3.0, 4, incumbent=lease({"ada": 4}, ends_h=0.0), barred=("ada/A100:4",))
    assert compiled(market(pools, [past])).instance.jobs.own.tolist() == [-1]


def _columns(market_: Compiled, out: np.ndarray) -> set[str]:
    """Return the keys of all configurations of job 0 that are singles or spans."""
    instance, found = market_.instance, set()
    for single in range(instance.singles.start[0], instance.singles.start[1]):
        good = instance.singles.good[single]
        for offer in range(instance.goods.offer_start[good], instance.goods.offer_start[good + 1]):
            place = int(instance.goods.offer_pool[offer])
            fits = instance.goods.offer_limit[offer] >= instance.singles.gpus[single]
            if fits and kernel.single_column(instance, 0, single, place, out):
                found.add(market_.names.configuration(0, SINGLE, single, place).key)
    for span in range(instance.spans.start[0], instance.spans.start[1]):
        family = instance.spans.family[span]
        for pattern in range(instance.patterns.family_start[family], instance.patterns.family_start[family + 1]):
            if kernel.span_column(instance, 0, span, pattern, out) > 0:
                found.add(market_.names.configuration(0, SPAN, span, pattern).key)
    return found


def test_columns_are_all_that_the_rules_say() -> None:
    for seed in range(4):
        snapshot = random_market(seed, jobs=1, sites=5, types=2)
        free = snapshot.jobs[0].model_copy(
            update={
                "bid_micros_per_million_samples": 10**12,
                "hold_left_micros": 10**15,
                "deadline_ms": None,
                "sites_max": 3,
            }
        )
        snapshot = snapshot.model_copy(
            update={
                "jobs": (free,),
                "links": tuple(row.model_copy(update={"bandwidth_bits_per_s": 1e15}) for row in snapshot.links),
            }
        )
        assert _columns(compiled(snapshot), np.zeros(kernel.SPAN_OUT, np.int64)) == _expected(snapshot, free)


def _expected(snapshot: Snapshot, book: JobState) -> set[str]:
    ladder = {2**i for i in range(13)} | {3 * 2**i for i in range(11)}
    pairs = {(link.from_site, link.to_site) for link in snapshot.links}
    listening = {site.site_id for site in snapshot.sites if site.listens}
    sites = [
        site.site_id for site in snapshot.sites if book.sites_allowed is None or site.site_id in book.sites_allowed
    ]
    found = set()
    for request in book.accelerators:
        rungs = (ladder | {request.count_min, request.count_max}) & set(range(request.count_min, request.count_max + 1))
        room = {row.site_id: row.capacity_gpus for row in snapshot.pools if row.gpu_type == request.gpu_type}
        found |= {f"{site}/{request.gpu_type}:{count}" for site in sites for count in rungs if count <= room[site]}
        for size in range(2, book.sites_max + 1):
            for group in itertools.combinations(sorted(sites), size):
                hubs = [h for h in group if h in listening and all({(h, o), (o, h)} <= pairs for o in group if o != h)]
                gives = tuple(room[site] for site in group)
                for count, weights in itertools.product(sorted(rungs), (*WEIGHTS[size], gives)):
                    exact = [Fraction(count * weight, sum(weights)) for weight in weights]
                    split = [int(share) for share in exact]
                    by_rest = sorted(range(size), key=lambda part: (split[part] - exact[part], part))
                    for part in by_rest[: count - sum(split)]:
                        split[part] += 1
                    if hubs and min(split) >= 1 and all(n <= room[site] for n, site in zip(split, group, strict=True)):
                        found.add(
                            "+".join(f"{site}/{request.gpu_type}:{n}" for site, n in zip(group, split, strict=True))
                        )
    return found


def test_data_may_travel_as_far_as_its_residency_and_pays_for_the_way() -> None:
    snapshot = market([pool(site, 8) for site in ("ada", "bob", "cyd", "dan")], [job("a", 3.0, 2)], links=False)
    where = {"ada": ("north", "europe"), "bob": ("north", "europe"), "cyd": ("south", "europe"), "dan": (None, None)}
    egress = DataEgress(to_region=1_000, to_continent=20_000, beyond=90_000)
    sites = tuple(
        SiteState(site_id=site, listens=True, region=region, continent=continent, egress_micros_per_gb=egress)
        for site, (region, continent) in where.items()
    )
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    for residency, allowed in (("site", 1), ("region", 2), ("continent", 3), ("world", 4)):
        data = DataState(home_site="ada", residency=residency, bytes_per_sample=1e9)
        moved = snapshot.model_copy(
            update={"sites": sites, "jobs": (snapshot.jobs[0].model_copy(update={"data": data}),)}
        )
        instance = compiled(moved).instance
        reach = [place for place in range(4) if kernel.single_column(instance, 0, 0, place, out)]
        assert reach == list(range(allowed))
        assert instance.singles.data_bytes_per_s[0] == int(np.ceil(1e9 * instance.singles.speed[0]))
    hourly = float(instance.singles.data_bytes_per_s[0]) * 3600
    for place, price in enumerate((0, 1_000, 20_000, 90_000)):
        kernel.single_column(instance, 0, 0, place, out)
        assert out[kernel.EGRESS] == int(np.ceil(hourly * price / 1e9))


def test_ask_steps_are_the_last_gpus_and_the_dearest_go_first_when_a_pool_shrinks() -> None:
    steps = (AskStep(gpus=2, ask_micros_per_gpu_hour=2 * CREDIT), AskStep(gpus=3, ask_micros_per_gpu_hour=3 * CREDIT))
    for gpus, units in ((10, [5, 2, 3]), (5, [0, 2, 3]), (4, [0, 2, 2]), (1, [0, 1, 0]), (0, [0, 0, 0])):
        row = pool("ada", gpus).model_copy(update={"ask_steps": steps})
        rows = compiled(market([row], [])).instance.rows
        assert rows.step_units.tolist() == units
        assert rows.step_cost.tolist() == [CREDIT, 2 * CREDIT, 3 * CREDIT]


def test_quota_limits_a_job_but_not_the_pool() -> None:
    instance = compiled(
        market([pool("ada", 16).model_copy(update={"job_gpus_max": 3})], [job("a", 3.0, (1, 16))])
    ).instance
    assert instance.singles.gpus.tolist() == [1, 2, 3]
    assert instance.goods.offer_limit.tolist() == instance.pools.job_max.tolist() == [3]
    assert capacity(instance.rows).tolist() == [16]


def test_slots_are_windows_that_lose_value_by_waiting() -> None:
    row = pool("ada", 8).model_copy(
        update={
            "reserved": (
                Reservation(from_ms=NOW_MS + HOUR_MS, to_ms=NOW_MS + 2 * HOUR_MS, gpus=6),
                Reservation(from_ms=NOW_MS + 3 * HOUR_MS // 2, to_ms=NOW_MS + 9 * HOUR_MS, gpus=1),
            ),
            "drains_at_ms": NOW_MS + 3 * HOUR_MS,
        }
    )
    # Two GPUs for four GPU-hours: two slots and a bit.
    book = [job("a", 3.0, 2, hours=4.1), job("z", 3.0, 4, hours=4000.0, deadline_ms=NOW_MS + 2000 * HOUR_MS)]
    market_ = compiled(market([row], book, slots=4, slot_s=3600, waiting_discount=0.1))
    instance = market_.instance
    assert capacity(instance.rows)[:4].tolist() == [8, 1, 7, 0]
    windows = [market_.names.slots(SINGLE, single) for single in range(instance.singles.start[1])]
    assert windows == []  # slot 3 has nothing and slot 1 one GPU, so no window is whole
    roomy = compiled(market([pool("ada", 8)], book, slots=4, slot_s=3600, waiting_discount=0.1)).instance
    first = roomy.goods.first[roomy.singles.good]
    end = roomy.goods.end[roomy.singles.good]
    assert list(zip(first.tolist(), end.tolist(), strict=True))[:4] == [(0, 3), (1, 4), (2, 4), (3, 4)]
    hourly = kernel.value_rate(roomy.jobs, 0, roomy.singles.speed[0])
    assert roomy.singles.value[:4].tolist() == [
        3 * hourly, 3 * int(hourly * 0.9), 2 * int(hourly * (0.9 * 0.9)), int(hourly * (0.9 * 0.9 * 0.9)),
    ]  # fmt: skip
    assert roomy.singles.start[2] - roomy.singles.start[1] == 4  # as far as the deadline lets it wait


def test_deadline_counts_the_waiting() -> None:
    book = [job("a", 3.0, 2, hours=4.1, deadline_ms=NOW_MS + round(3.2 * HOUR_MS))]
    instance = compiled(market([pool("ada", 8)], book, slots=4, slot_s=3600)).instance
    assert instance.goods.first.tolist() == [0, 1]


def test_kept_lease_holds_its_gpus_in_later_slots_even_through_a_reservation() -> None:
    row = pool("ada", 8).model_copy(
        update={"reserved": (Reservation(from_ms=NOW_MS + HOUR_MS, to_ms=NOW_MS + 9 * HOUR_MS, gpus=7),)}
    )
    held = job("a", 2.0, 4, incumbent=lease({"ada": 4}), hours=1e6)
    market_ = compiled(market([row], [held], slots=3, slot_s=3600))
    assert entries(market_, 0) == {"ada/A100 in slot 0": 4, "ada/A100 in slot 1": 4, "ada/A100 in slot 2": 4}
    assert capacity(market_.instance.rows).tolist() == [8, 4, 4]
    assert market_.instance.bundles.value[0] == 3 * market_.instance.bundles.charge_max[0]


def test_budgets_and_floors_are_rows_of_their_tenants() -> None:
    tenants = (
        TenantState(tenant_id="acme", budget_micros_per_hour=10 * CREDIT, floor_gpus=3),
        TenantState(tenant_id="globex", floor_gpus=2),
        TenantState(tenant_id="initech", budget_micros_per_hour=2 * CREDIT),
    )
    book = [
        job("a", 2.0, 4, submitted_ms=1, tenant_id="acme"),
        job("b", 2.0, 4, submitted_ms=2, tenant_id="initech", incumbent=lease({"ada": 4})),
        job("c", 0.9, 4, submitted_ms=3, tenant_id="globex"),
        job("d", 2.0, 4, submitted_ms=4, tenant_id="umbrella"),
        job("e", 2.0, 4, submitted_ms=5),
    ]
    market_ = compiled(market([pool("ada", 8)], book, tenants=tenants, floor_penalty_micros_per_gpu_hour=CREDIT // 5))
    instance, names = market_.instance, market_.names
    assert [names.row(row) for row in instance.jobs.budget_row[:2]] == ["budget of acme", "budget of initech"]
    assert instance.jobs.budget_row[2:].tolist() == [-1, -1, -1]
    assert instance.jobs.budget.tolist() == [10 * CREDIT, 2 * CREDIT, 0, 0, 0]
    assert [names.row(row) for row in instance.jobs.floor_row[[0, 2]]] == ["floor of acme", "floor of globex"]
    assert instance.jobs.floor_row[[1, 3, 4]].tolist() == [-1, -1, -1]
    # What the running lease of initech pays, 6 credits an hour, is three times its budget: it stays.
    assert entries(market_, 0) == {"ada/A100": 4, "budget of initech": 3 * SHARES}
    first = instance.jobs.budget_row[0]
    assert capacity(instance.rows)[first : first + 2].tolist() == [SHARES, 3 * SHARES]
    assert instance.rows.base[first + 2 :].tolist() == [-3, -2]
    assert capacity(instance.rows)[first + 2 :].tolist() == [0, 0]
    assert instance.rows.step_cost[-2:].tolist() == [CREDIT // 5, CREDIT // 5]
    # Globex bids below the ask, yet its floor makes up for it.
    assert instance.singles.start[3] - instance.singles.start[2] == 1


def test_bid_that_falls_with_speed_is_the_least_of_its_pieces() -> None:
    steps = (
        BidStep(above_samples_per_s=2.0, bid_micros_per_million_samples=400_000_000),
        BidStep(above_samples_per_s=3.0, bid_micros_per_million_samples=0),
    )
    plain = job("a", 1.0, 4)
    book = plain.model_copy(update={"bid_micros_per_million_samples": 1_000_000_000, "bid_steps": steps})
    jobs = compiled(market([pool("ada", 8)], [book, plain.model_copy(update={"job_id": "b"})])).instance.jobs
    rates = [kernel.value_rate(jobs, 0, speed) for speed in (1.0, 2.0, 2.5, 3.0, 9.0)]
    assert rates == [3_600_000, 7_200_000, 7_920_000, 8_640_000, 8_640_000]
    assert kernel.value_rate(jobs, 1, 9.0) == int(plain.bid_micros_per_million_samples * 3600.0 / 1e6 * 9.0)


def test_measured_speed_of_a_job_replaces_the_pools_own() -> None:
    measured = job("a", 1.0, 4, speeds=(JobSpeed(gpu_type="A100", flops_per_s=3e12),), bid_steps=())
    book = [measured, job("b", 5.0, 4)]
    instance = compiled(market([pool("ada", 8)], book)).instance
    assert instance.singles.speed[0] / instance.singles.speed[1] == pytest.approx(3.0, rel=1e-5)


def test_mixed_types_only_for_jobs_that_allow_them_and_within_each_types_count() -> None:
    pools = [pool("ada", 8, gpu_type="A100"), pool("bob", 8, gpu_type="H100"), pool("bob", 8, gpu_type="T4")]
    requests = (
        GpuRequest(gpu_type="A100", count_min=2, count_max=6),
        GpuRequest(gpu_type="H100", count_min=1, count_max=2),
    )
    book = job("a", 3.0, 4, sites_max=2).model_copy(update={"accelerators": requests})
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    assert {key for key in _columns(compiled(market(pools, [book])), out) if "+" in key} == set()
    mixed = compiled(market(pools, [book.model_copy(update={"mixed_types": True})]))
    spans = {key for key in _columns(mixed, out) if "+" in key}
    # Totals 1, 2, 3, 4, 6, divided evenly, three to one and one to three, at most two H100.
    assert spans == {f"ada/A100:{a}+bob/H100:{b}" for a, b in ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (5, 1))}


def test_what_gains_nothing_at_any_ask_is_left_out_but_not_for_a_kept_lease() -> None:
    poor = job("a", 0.5, (1, 4))
    assert len(compiled(market([pool("ada", 8)], [poor])).instance.singles.gpus) == 0
    kept = job("a", 0.5, (1, 4), incumbent=lease({"ada": 4}, speed=4.0))
    assert compiled(market([pool("ada", 8)], [kept])).instance.singles.gpus.tolist() == [1, 2, 3, 4]


def test_market_with_every_feature_compiles_the_same_from_rows_and_columns() -> None:
    tables = generate("B", 150, 12, seed=3, features=FEATURES)
    market_ = compile_market(tables)
    instance = market_.instance
    own = instance.jobs.own[instance.jobs.must]
    assert len(own) > 20
    assert (own >= 0).all()
    assert instance.jobs.must.sum() < (instance.jobs.own >= 0).sum()
    # All own bundles of kept jobs fit together.
    used = np.zeros(instance.row_count, np.int64)
    for bundle in own:
        places = slice(instance.bundles.entry_start[bundle], instance.bundles.entry_start[bundle + 1])
        np.add.at(used, instance.bundles.entry_row[places], instance.bundles.entry_use[places])
    assert (used <= capacity(instance.rows)).all()
    names = [market_.names.row(row) for row in range(instance.row_count)]
    assert len(set(names)) == len(names)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(snapshots())
def test_any_market_that_is_accepted_compiles_within_bounds(snapshot: Snapshot) -> None:
    market_ = compiled(snapshot)
    instance, names = market_.instance, market_.names
    assert np.abs(instance.singles.value).max(initial=0) < 2**60
    assert np.abs(instance.bundles.value).max(initial=0) < 2**60
    assert (instance.singles.speed > 0).all()
    assert (instance.singles.data_bytes_per_s >= 0).all()
    assert (
        np.diff(instance.rows.step_cost)[
            np.diff(np.repeat(np.arange(instance.row_count), np.diff(instance.rows.step_start))) == 0
        ]
        > 0
    ).all()
    used = np.zeros(instance.row_count, np.int64)
    for row in np.flatnonzero(instance.jobs.must):
        bundle = int(instance.jobs.own[row])
        places = slice(instance.bundles.entry_start[bundle], instance.bundles.entry_start[bundle + 1])
        np.add.at(used, instance.bundles.entry_row[places], instance.bundles.entry_use[places])
        assert names.configuration(int(row), BUNDLE, bundle, 0).gpus > 0
    assert (used <= capacity(instance.rows)).all()
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    for row in range(instance.job_count):
        for single in range(
            instance.singles.start[row], min(instance.singles.start[row] + 3, instance.singles.start[row + 1])
        ):
            good = instance.singles.good[single]
            for offer in range(instance.goods.offer_start[good], instance.goods.offer_start[good + 1]):
                place = int(instance.goods.offer_pool[offer])
                if kernel.single_column(instance, row, single, place, out):
                    assert (
                        names.configuration(row, SINGLE, single, place).samples_per_s == instance.singles.speed[single]
                    )
