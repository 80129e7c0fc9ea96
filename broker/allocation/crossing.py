"""Jobs across sites first: a small mixed-integer programme chooses among their spans and bundles.

What they compete for between themselves, links above all, is a hard limit here. What they share
with everyone else is priced: a pool's GPU costs its price, and a job's alternative is its best
single at prices. So a link that only they use gives its bandwidth to whom it helps most, at no
price, and pools are not filled with spans that others would pay more for.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from broker.allocation.columns import Columns
from broker.allocation.instance import NONE, SINGLE, Choice, Instance, Int, Real
from broker.allocation.occupancy import Occupancy
from broker.allocation.selection import Problem, select

# The best so many spans and bundles of a job take part.
COLUMNS_PER_JOB: Final = 8


class Crossing(NamedTuple):
    """Who takes which span or bundle (form -1: none), and what it took to find out."""

    choice: Choice
    columns: int
    nodes: int


def choose_crossing(
    instance: Instance, state: Occupancy, columns: Columns, alternative: Real, *, nodes_max: int
) -> Crossing:
    """Choose spans and bundles out of `columns` for jobs that hold nothing in `state`.

    `alternative` [jobs] is what each job would have otherwise: its best single's surplus, or 0.
    """
    count = instance.job_count
    choice = Choice(np.full(count, NONE, np.int8), np.full(count, NONE, np.int32), np.full(count, NONE, np.int32))
    candidates = _candidates(instance, state, columns, alternative)
    if not len(candidates.column):
        return Crossing(choice, 0, 0)
    index = candidates.column
    jobs, group = np.unique(columns.job[index], return_inverse=True)
    rows, row = np.unique(candidates.row, return_inverse=True)
    free = (state.supply - state.use)[rows]
    problem = Problem(
        job=group.astype(np.int64),
        value=candidates.gain,
        entry_start=candidates.entry_start,
        entry_row=row.astype(np.int64),
        entry_use=candidates.use,
        must=np.zeros(len(jobs), np.bool_),
        base=np.maximum(0, free).astype(np.float64),
        step_start=np.zeros(len(rows) + 1, np.int64),
        step_units=np.zeros(0),
        step_cost=np.zeros(0),
    )
    found = select(problem, nodes_max=nodes_max)
    if found.chosen is not None:
        taken = index[found.chosen]
        owner = columns.job[taken]
        choice.form[owner], choice.item[owner], choice.place[owner] = (
            columns.form[taken],
            columns.item[taken],
            columns.place[taken],
        )
    return Crossing(choice, len(index), found.nodes)


class _Candidates(NamedTuple):
    """Columns that take part, what each gains over the alternative, and its hard rows (CSR)."""

    column: Int
    gain: Real
    entry_start: Int
    row: Int
    use: Real


def _candidates(instance: Instance, state: Occupancy, columns: Columns, alternative: Real) -> _Candidates:
    entry_column = np.repeat(np.arange(len(columns.job)), np.diff(columns.start))
    links = np.zeros(len(state.use), np.bool_)
    links[instance.links.first_row : instance.links.first_row + len(instance.links.from_site)] = True
    hard = (columns.use > 0) & ~state.soft[columns.row]
    lacking = hard & (columns.use > (state.supply - state.use)[columns.row])
    fits = np.bincount(entry_column[lacking], minlength=len(columns.job)) == 0
    # Bandwidth is priced by the limit itself, everything else at its price.
    priced = np.where(links[columns.row], 0.0, state.price[columns.row]) * columns.use
    surplus = columns.value - np.bincount(entry_column, priced, minlength=len(columns.job))
    gain = surplus - alternative[columns.job]
    at_prices = gain - np.bincount(
        entry_column,
        np.where(links[columns.row], state.price[columns.row], 0.0) * columns.use,
        minlength=len(columns.job),
    )
    able = np.flatnonzero((columns.form != SINGLE) & (state.item[columns.job] < 0) & fits & (gain > 0))
    order = able[
        np.lexsort((columns.place[able], columns.item[able], columns.form[able], -at_prices[able], columns.job[able]))
    ]
    first = np.searchsorted(columns.job[order], columns.job[order])
    index = order[np.arange(len(order)) - first < COLUMNS_PER_JOB]
    counts = np.diff(columns.start)[index]
    start = np.concatenate([[0], np.cumsum(counts)])
    entries = np.repeat(columns.start[index] - start[:-1], counts) + np.arange(start[-1])
    kept = hard[entries]
    owner = np.repeat(np.arange(len(index)), counts)[kept]
    return _Candidates(
        column=index,
        gain=gain[index],
        entry_start=np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(index)))]),
        row=columns.row[entries][kept].astype(np.int64),
        use=columns.use[entries][kept].astype(np.float64),
    )
