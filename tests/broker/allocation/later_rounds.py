"""The same market a round later: who won holds a lease, some jobs have gone and others have come."""

from __future__ import annotations

import numpy as np

from broker.allocation.instance import NONE, Bundles, Choice, Instance, Int
from broker.allocation.listing import Names, described
from broker.allocation.solver import Outcome, solve
from tests.broker.allocation.large_instances import large


def with_jobs(instance: Instance, order: Int) -> Instance:
    """Return the market with only the jobs of `order`, in that order. Vetoes are left out."""
    jobs, count = instance.jobs, len(order)

    def parts(start: Int) -> tuple[Int, Int]:
        sizes = np.diff(start)[order]
        fresh = np.concatenate([[0], np.cumsum(sizes)])
        return fresh, np.repeat(start[order] - fresh[:-1], sizes) + np.arange(fresh[-1])

    fields = {name: value[order] for name, value in jobs._asdict().items() if not name.startswith("barred")}
    moved = jobs._replace(**fields, barred_start=np.zeros(count + 1, np.int64), barred=np.zeros(0, np.int64))
    single_start, single = parts(instance.singles.start)
    span_start, span = parts(instance.spans.start)
    start, bundle = parts(instance.bundles.start)
    where = np.zeros(len(instance.bundles.value), np.int64)
    where[bundle] = np.arange(len(bundle))
    own = np.where(moved.own >= 0, where[np.maximum(moved.own, 0)] if len(where) else NONE, NONE).astype(np.int32)
    sizes = np.diff(instance.bundles.entry_start)[bundle]
    entry_start = np.concatenate([[0], np.cumsum(sizes)])
    entry = np.repeat(instance.bundles.entry_start[bundle] - entry_start[:-1], sizes) + np.arange(entry_start[-1])
    return instance._replace(
        jobs=moved._replace(own=own),
        singles=type(instance.singles)(single_start, *(part[single] for part in instance.singles[1:])),
        spans=type(instance.spans)(span_start, *(part[span] for part in instance.spans[1:])),
        bundles=Bundles(
            start,
            instance.bundles.value[bundle],
            instance.bundles.charge_max[bundle],
            entry_start,
            instance.bundles.entry_row[entry],
            instance.bundles.entry_use[entry],
        ),
    )


def with_leases(instance: Instance, held: Choice, restart_micros: int, *, past_term: Int | None = None) -> Instance:
    """Return the market where every job that holds a column has it as a lease, inside its term but for `past_term`.

    Any other place costs it the restart. The market has no leases yet.
    """
    jobs = np.flatnonzero(held.form != NONE)
    columns = described(
        instance, Names(*(part.astype(np.int32) for part in (jobs, held.form[jobs], held.item[jobs], held.place[jobs])))
    )
    running = np.zeros(instance.job_count, bool)
    running[jobs] = True
    own = np.where(running, np.cumsum(running) - 1, NONE).astype(np.int32)
    must = running.copy()
    must[[] if past_term is None else past_term] = False
    bundles = Bundles(
        np.concatenate([[0], np.cumsum(running)]).astype(np.int64),
        columns.columns.value,
        columns.charge_max,
        columns.columns.start,
        columns.columns.row,
        columns.columns.use,
    )
    restart = np.where(running, restart_micros, 0)
    owner = np.repeat(np.arange(instance.job_count), np.diff(instance.singles.start))
    # A move costs the restart, spread over the hour that a term lasts.
    singles = instance.singles._replace(value=instance.singles.value - restart[owner])
    return instance._replace(
        jobs=instance.jobs._replace(own=own, must=must, restart=restart), bundles=bundles, singles=singles
    )


def a_round_later(
    job_count: int, site_count: int, family: str, seed: int, *, changed: int, restart_micros: int = 20_000
) -> tuple[Instance, Outcome]:
    """Return a large market after `changed` of its jobs have gone and as many have come, and the round before.

    Every third lease is past its term.
    """
    everyone = large(job_count + changed, site_count, family, seed)
    first = solve(with_jobs(everyone, np.arange(job_count)), equity_micros=10**15)
    none = np.full(changed, NONE)
    held = Choice(*(np.concatenate([part, none.astype(part.dtype)]) for part in first.choice))
    leased = with_leases(everyone, held, restart_micros, past_term=np.arange(0, job_count, 3))
    return with_jobs(leased, np.arange(changed, job_count + changed)), first
