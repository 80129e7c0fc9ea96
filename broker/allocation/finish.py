"""Small rounds to the optimum: a mixed-integer programme over every column that can still matter.

The dual bound D at the published prices is the sum of all regrets and idle rents above any choice's
welfare. So a choice that holds a column of regret w or more is worth at most D - w: columns that
regret more than the gap left are not looked at, and the result is still proved,

    bound = max(the programme's own bound, D - width of the columns looked at)

A first, narrow look finds a better choice, which makes the width that the proof needs smaller.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.columns import Columns
from broker.allocation.instance import BUNDLE, NONE, Choice, Flag, Instance, Int
from broker.allocation.occupancy import Occupancy, Others, choice_of
from broker.allocation.selection import Problem, select

# Proved when the welfare is this close to the bound, relative to it.
PROVED_GAP: Final = 1e-4
# The programme itself is solved a little closer, so that both errors together stay below PROVED_GAP.
_SEARCH_GAP: Final = 0.5 * PROVED_GAP


class Finish(NamedTuple):
    """The choice (None: no better one), the proved bound, and what it took."""

    choice: Choice | None
    bound: float
    columns: int
    nodes: int


def finish(  # noqa: PLR0917 - what is searched, and by which limits
    instance: Instance,
    others: Others,
    state: Occupancy,
    columns: Columns,
    dual: float,
    width: float,
    *,
    nodes_max: int,
) -> Finish:
    """Choose anew among `columns`, which hold every column that regrets at most `width`.

    `state` is the incumbent; its columns are added where they are missing. `dual` is the dual
    function at the prices of the state.
    """
    holds = choice_of(state, others)
    held = np.flatnonzero(holds.form != NONE)
    key = _key(columns.job, columns.form, columns.item, columns.place)
    wanted = _key(held, holds.form[held], holds.item[held], holds.place[held])
    position = {name: index for index, name in enumerate(key)}
    start = np.zeros(len(key), np.bool_)
    known = [position[name] for name in wanted if name in position]
    start[known] = True
    if len(known) < len(held):
        return Finish(None, dual, len(key), 0)
    stays = staying(instance, state, holds)
    staying_columns = columns.take(np.flatnonzero(stays[columns.job] & start))
    use = np.zeros(instance.row_count, np.int64)
    np.add.at(use, staying_columns.row, staying_columns.use)
    kept = np.flatnonzero(~stays[columns.job])
    columns, start = columns.take(kept), start[kept]
    found = select(problem_of(instance, state, columns, use), nodes_max=nodes_max, gap=_SEARCH_GAP, start=start)
    bound = min(dual, max(found.bound + float(staying_columns.value.sum()), dual - width))
    if found.chosen is None:
        return Finish(None, bound, len(key), found.nodes)
    choice = placed_anew(holds, ~stays, columns.take(np.flatnonzero(found.chosen)))
    return Finish(choice, bound, len(key), found.nodes)


def _key(
    job: NDArray[Any], form: NDArray[Any], item: NDArray[Any], place: NDArray[Any]
) -> list[tuple[int, int, int, int]]:
    return list(zip(job.tolist(), form.tolist(), item.tolist(), place.tolist(), strict=True))


def placed_anew(holds: Choice, freed: Flag, columns: Columns) -> Choice:
    """Return a choice where the freed jobs hold these columns, those without one nothing."""
    form, item, place = (np.where(freed, NONE, part) for part in holds)
    form[columns.job], item[columns.job], place[columns.job] = columns.form, columns.item, columns.place
    return Choice(form.astype(np.int8), item.astype(np.int32), place.astype(np.int32))


def problem_of(instance: Instance, state: Occupancy, columns: Columns, use: Int) -> Problem:
    """Return the choice among columns beside whoever stays and together uses `use` [rows]."""
    rows = instance.rows
    # Who stays where nothing is supplied at the prices may, but nobody else is let in beside it.
    supply = np.maximum(state.supply, use)
    owner = np.repeat(np.arange(len(rows.base)), np.diff(rows.step_start))
    total = np.concatenate([[0], np.cumsum(rows.step_units)])
    before = total[:-1] - total[rows.step_start[owner]]
    units = np.where(
        state.soft[owner], rows.step_units, np.clip(supply[owner] - rows.base[owner] - before, 0, rows.step_units)
    )
    # A floor that no column helps still costs its penalty.
    used = np.union1d(columns.row, np.flatnonzero(state.soft))
    row = np.searchsorted(used, columns.row)
    in_use = np.zeros(len(rows.base), np.bool_)
    in_use[used] = True
    counts = np.diff(rows.step_start)[used]
    jobs, group = np.unique(columns.job, return_inverse=True)
    return Problem(
        job=group.astype(np.int64),
        value=columns.value.astype(np.float64),
        entry_start=columns.start,
        entry_row=row.astype(np.int64),
        entry_use=columns.use.astype(np.float64),
        must=instance.jobs.must[jobs],
        base=(rows.base - use)[used].astype(np.float64),
        step_start=np.concatenate([[0], np.cumsum(counts)]),
        step_units=units[in_use[owner]].astype(np.float64),
        step_cost=rows.step_cost[in_use[owner]].astype(np.float64),
    )


def staying(instance: Instance, state: Occupancy, holds: Choice) -> Flag:
    """Return the incumbents that must stay, since their own place is not supplied at the prices.

    Were they to move, nobody could take their place, and they could not come back.
    """
    stays = np.zeros(instance.job_count, np.bool_)
    for job in np.flatnonzero(instance.jobs.must & (holds.form == BUNDLE) & (holds.item == instance.jobs.own)):
        bundle = instance.jobs.own[job]
        part = slice(instance.bundles.entry_start[bundle], instance.bundles.entry_start[bundle + 1])
        row, use = instance.bundles.entry_row[part], instance.bundles.entry_use[part]
        stays[job] = bool(np.any((use > 0) & ~state.soft[row] & (state.use[row] > state.supply[row])))
    return stays
