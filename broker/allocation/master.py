"""The configuration LP on a live solver: resources, market nodes, and columns that come and go.

    minimise    sum_k cost_k supply_k - sum_c value_c x_c
    row r       sum_c use_cr x_c + flows out - supply_r - overdraft_r <= base_r    pools, links, budgets, floors
    node n      sum_c gpus_c x_c + arcs out - flows in    <=  0               market nodes
    job j       sum_c x_c                                  =  1               staying out is a column

Each job's row is gone before the solver sees it: one of its columns, the *reference*, stands at one
less the others, so the others enter as differences from it. A job with one column is a constant, one
with two a column between 0 and 1; only a job with three or more keeps a row, over the others. Of
10,000 jobs some 2,000 keep one, and the LP is about as large as the market has pools and links.

An *overdraft* of a row costs more than any job is worth: the LP has a point before the columns that make it
feasible are found, and prices there that ask for them. A point that uses one counts as infeasible.

Capacities are enlarged by a fixed generic amount in the seventh decimal place, different for each row, so
that the optimal prices are unique (see `posted`). A point of this LP divided by 1 + PERTURBATION is
feasible for the true one.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import pulp
from numpy.typing import NDArray

from broker.allocation.columns import Columns, joined
from broker.allocation.engine import Basis, Engine, Run
from broker.allocation.instance import NONE, Instance, Int, Real
from broker.allocation.nodes import Nodes

# Relative enlargement of a row's capacity: between a quarter of this and all of it.
PERTURBATION: Final = 4e-7
# Money is scaled so that the largest coefficient is this: a solver's tolerances are absolute.
_LARGEST_COEFFICIENT: Final = 1000.0


class LpPoint(NamedTuple):
    """A point of the LP: prices of rows and of nodes (>= 0), the jobs' surplus, and its own objective.

    `violation` is by how much, relative to what a row has, the point breaks one at most, computed from the columns.
    """

    y: Real
    surplus: Real
    objective: float
    violation: float
    run: Run


class Master:
    """The LP of one instance; `add` columns, `solve`, and again."""

    def __init__(self, instance: Instance, nodes: Nodes, engine: Engine, columns: Columns) -> None:
        """Load the skeleton and the first columns: ordered by job, each job's reference first, all jobs present."""
        self._instance, self._engine = instance, engine
        largest = max(float(np.abs(columns.value).max(initial=0)), float(instance.rows.step_cost.max(initial=0)), 1.0)
        self._unit = max(1.0, largest / _LARGEST_COEFFICIENT)
        self._skeleton = _Skeleton(instance, nodes, self._unit, 2.0 * largest)
        engine.load(self._skeleton.problem, self._skeleton.variables)
        self._rows = instance.row_count + nodes.total
        job_count = instance.job_count
        first = np.searchsorted(columns.job, np.arange(job_count)).astype(np.int64)
        assert np.array_equal(columns.job[first], np.arange(job_count)), "every job has a first column"
        self.columns = columns
        self._reference = first
        # The solver's column of each of ours, -1 for references; the solver's row of each job, -1 without one.
        self._place = np.full(len(columns.job), NONE, np.int64)
        self._job_row = np.full(job_count, NONE, np.int64)
        self._solver_columns = self._skeleton.column_count
        self._solver_rows = self._rows
        others = np.ones(len(columns.job), bool)
        others[first] = False
        self._set_capacity()
        self._append(np.flatnonzero(others))

    @property
    def problem(self) -> pulp.LpProblem:
        """The named skeleton, to read or to export."""
        return self._skeleton.problem

    def add(self, columns: Columns) -> None:
        """Append columns of jobs, none of which is there yet."""
        before = len(self.columns.job)
        self.columns = joined(self.columns, columns)
        self._place = np.append(self._place, np.full(len(columns.job), NONE))
        self._append(np.arange(before, len(self.columns.job)))

    def solve(self, method: str) -> LpPoint:
        """Return the point that the engine stops at, optimal or not, with what it breaks."""
        run = self._engine.run(method)
        x, duals = self._engine.point()
        y = np.maximum(0.0, -duals[: self._rows]) * self._unit
        surplus = np.full(self._instance.job_count, -np.inf)
        np.maximum.at(surplus, self.columns.job, self.columns.surplus(y))
        weights, objective = self._weights(x)
        supply = x[: self._skeleton.column_count]
        activity = np.bincount(
            self.columns.row,
            np.repeat(weights, np.diff(self.columns.start)) * self.columns.use,
            minlength=self._rows,
        ) + self._skeleton.activity(supply)
        violation = max(
            float(((activity - self._full_capacity) / np.maximum(1.0, self._full_capacity)).max(initial=0.0)),
            float((-weights).max(initial=0.0)),
            float((-supply).max(initial=0.0)),
            float((supply - self._skeleton.upper).max(initial=0.0)),
            float(supply[self._skeleton.overdraft].max(initial=0.0)),
        )
        # Perturbed supply beyond the base is free of charge in the LP: here it costs as much as the dearest step.
        unpaid = np.maximum(0.0, activity - self._skeleton.base) @ self._skeleton.dearest
        return LpPoint(y, surplus, objective - float(self._skeleton.cost @ supply + unpaid), violation, run)

    def basis(self) -> Basis:
        """Return the engine's basis."""
        return self._engine.basis()

    def _weights(self, x: Real) -> tuple[Real, float]:
        weights = np.zeros(len(self.columns.job))
        placed = self._place >= 0
        weights[placed] = x[self._place[placed]]
        rest = 1.0 - np.bincount(self.columns.job, weights, minlength=self._instance.job_count)
        weights[self._reference] += rest
        return weights, float(self.columns.value @ weights)

    def _set_capacity(self) -> None:
        """Tell the engine what is left of each row once every reference has its uses, perturbed."""
        reference = self.columns.take(self._reference)
        used = np.bincount(reference.row, reference.use.astype(np.float64), minlength=self._rows)
        self._full_capacity = self._skeleton.capacity
        self._engine.set_row_upper(np.arange(self._rows, dtype=np.int32), self._full_capacity - used)

    def _append(self, chosen: Int) -> None:
        """Give the engine the columns `chosen` as differences from their references, and rows where needed."""
        if not len(chosen):
            return
        columns = self.columns.take(chosen)
        reference = self.columns.take(self._reference[columns.job])
        old = np.bincount(self.columns.job[self._place >= 0], minlength=self._instance.job_count)
        all_count = old + np.bincount(columns.job, minlength=self._instance.job_count)
        fresh = np.flatnonzero((all_count > 1) & (self._job_row < 0))
        self._job_row[fresh] = self._solver_rows + np.arange(len(fresh))
        self._solver_rows += len(fresh)
        lone = np.flatnonzero((self._place >= 0) & np.isin(self.columns.job, fresh))
        lone = lone[np.argsort(self.columns.job[lone], kind="stable")]
        start = np.concatenate(
            [[0], np.cumsum(np.bincount(np.searchsorted(fresh, self.columns.job[lone]), minlength=len(fresh)))]
        )
        if len(fresh):
            self._engine.add_rows(
                np.ones(len(fresh)), start.astype(np.int64), self._place[lone].astype(np.int32), np.ones(len(lone))
            )
        count = len(chosen)
        owner = np.arange(count)
        with_row = self._job_row[columns.job] >= 0
        column = np.concatenate(
            [
                np.repeat(owner, np.diff(columns.start)),
                np.repeat(owner, np.diff(reference.start)),
                owner[with_row],
            ]
        )
        row = np.concatenate([columns.row, reference.row, self._job_row[columns.job[with_row]]]).astype(np.int64)
        use = np.concatenate([columns.use, -reference.use, np.ones(int(with_row.sum()))]).astype(np.float64)
        key = column * np.int64(self._solver_rows) + row
        order = np.argsort(key, kind="stable")
        key, use = key[order], use[order]
        heads = np.flatnonzero(np.diff(key, prepend=-1))
        use, key = np.add.reduceat(use, heads), key[heads]
        key, use = key[use != 0], use[use != 0]
        column, row = key // self._solver_rows, key % self._solver_rows
        start = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=count))]).astype(np.int64)
        cost = (reference.value - columns.value) / self._unit
        self._engine.add_columns(cost, np.ones(count), start, row.astype(np.int32), use)
        self._place[chosen] = self._solver_columns + owner
        self._solver_columns += count


class _Skeleton:
    """Rows, supply and flows as a PuLP problem, and as arrays to check points with."""

    def __init__(self, instance: Instance, nodes: Nodes, unit: float, overdraft: float) -> None:
        rows, goods = instance.rows, instance.goods
        row_count, pool_count = instance.row_count, instance.pool_count
        step_row = np.repeat(np.arange(row_count), np.diff(rows.step_start))
        free = rows.step_cost <= 0
        base = rows.base + np.bincount(step_row[free], rows.step_units[free], minlength=row_count)
        paid = np.flatnonzero(~free & (rows.step_units > 0))
        # Entries of the skeleton's columns: supply steps, then flows, then arcs.
        good = np.searchsorted(goods.offer_start, nodes.flow_offer, side="right") - 1
        entry_row: list[NDArray[Any]] = [step_row[paid]]
        entry_column, entry_factor = [np.arange(len(paid))], [np.full(len(paid), -1.0)]
        flows = len(paid) + np.arange(len(nodes.flow_offer))
        for slot in range(instance.slots):
            inside = (goods.first[good] <= slot) & (slot < goods.end[good])
            entry_row.append(slot * pool_count + goods.offer_pool[nodes.flow_offer[inside]])
            entry_column.append(flows[inside])
            entry_factor.append(np.ones(int(inside.sum())))
        arcs = len(paid) + len(flows) + np.arange(len(nodes.arc_from))
        for end, column, factor in (
            (nodes.flow_node, flows, -1.0),
            (nodes.arc_from, arcs, 1.0),
            (nodes.arc_to, arcs, -1.0),
        ):
            entry_row.append(row_count + end)
            entry_column.append(column)
            entry_factor.append(np.full(len(column), factor))
        first = len(paid) + len(flows) + len(arcs)
        self.overdraft = slice(first, first + row_count)
        entry_row.append(np.arange(row_count))
        entry_column.append(first + np.arange(row_count))
        entry_factor.append(np.full(row_count, -1.0))
        self.column_count = first + row_count
        self._row, self._column = np.concatenate(entry_row), np.concatenate(entry_column)
        self._factor = np.concatenate(entry_factor)
        self.cost = np.zeros(self.column_count)
        self.cost[self.overdraft] = overdraft
        self.cost[: len(paid)] = rows.step_cost[paid]
        self.upper = np.full(self.column_count, np.inf)
        self.upper[: len(paid)] = rows.step_units[paid]
        size = base + np.bincount(step_row[paid], rows.step_units[paid], minlength=row_count)
        generic = 0.25 + 0.75 * _generic(row_count + len(paid))
        # What a row gives for nothing and each of its steps is enlarged: a price may settle at any edge.
        self.base = np.concatenate([base, np.zeros(nodes.total)]).astype(np.float64)
        self.dearest = np.zeros(len(self.base))
        np.maximum.at(self.dearest, step_row, rows.step_cost)
        self.capacity = self.base.copy()
        self.row_count = row_count
        self.capacity[:row_count] += PERTURBATION * generic[:row_count] * np.maximum(1, np.abs(size)) / 2
        self.upper[: len(paid)] *= 1.0 + PERTURBATION * generic[row_count:] / 2
        self.problem, self.variables = self._model(instance, nodes, step_row[paid], unit)

    def activity(self, supply: Real) -> Real:
        """Return what the skeleton's columns use of every row and node."""
        amounts = (self._factor * supply[self._column]).astype(np.float64)
        return np.bincount(self._row, amounts, minlength=len(self.capacity)).astype(np.float64)

    def _model(
        self, instance: Instance, nodes: Nodes, supply_row: Int, unit: float
    ) -> tuple[pulp.LpProblem, list[pulp.LpVariable]]:
        problem = pulp.LpProblem("allocation", pulp.LpMinimize)
        names = [_row_name(instance, row) for row in range(instance.row_count)]
        kinds = ("site", "region", "continent", "world")
        node_names = [
            f"node_{kinds[level]}_{scope}_good_{good}_size_{size}" for level, scope, good, size in nodes.names
        ]
        titles = [f"supply_{names[row]}_{index}" for index, row in enumerate(supply_row)]
        titles += [f"flow_{index}" for index in range(len(nodes.flow_offer))]
        titles += [f"arc_{index}" for index in range(len(nodes.arc_from))]
        titles += [f"overdraft_{name}" for name in names]
        variables = [
            problem.add_variable(title, lowBound=0, upBound=None if np.isinf(upper) else upper)
            for title, upper in zip(titles, self.upper.tolist(), strict=True)
        ]
        problem += _sum((v, cost / unit) for v, cost in zip(variables, self.cost.tolist(), strict=True) if cost)
        entries: list[list[tuple[pulp.LpVariable, float]]] = [[] for _ in self.capacity]
        for row, column, factor in zip(self._row.tolist(), self._column.tolist(), self._factor.tolist(), strict=True):
            entries[row].append((variables[column], factor))
        for name, row_entries, capacity in zip(names + node_names, entries, self.capacity.tolist(), strict=True):
            problem.addConstraint(pulp.LpConstraint(_sum(row_entries), pulp.LpConstraintLE, name, capacity))
        return problem, variables


def _sum(pairs: object) -> pulp.LpAffineExpression:
    return pulp.LpAffineExpression(pairs)


def _row_name(instance: Instance, row: int) -> str:
    """Return a row's name: pool by slot, link, then budgets and floors as limits."""
    if row < instance.links.first_row:
        slot, pool = divmod(row, instance.pool_count)
        return f"pool_{pool}" if instance.slots == 1 else f"pool_{pool}_slot_{slot}"
    link = row - instance.links.first_row
    return f"link_{link}" if link < len(instance.links.from_site) else f"limit_{row}"


def _generic(count: int) -> Real:
    """Return `count` numbers in [0, 1) without any pattern: a 64-bit mix of their indices."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).astype(np.float64) / 2.0**64
