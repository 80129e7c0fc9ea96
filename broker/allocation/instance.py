"""A round's market in numbers: what `compile` makes of a snapshot and every solver module reads.

Everything is a numpy array in a NamedTuple, so that compiled loops take the parts as they are.
Money is whole micro-credits per hour. Order is canonical: sites, pools and links by name, jobs by
(submitted, id), so the order of a snapshot's rows cannot matter.

*Rows* are what is scarce. In this order: pools in slot 0, the same pools in slot 1, ...; links;
tenants' budgets; fairness floors. A row supplies `base` units for nothing (below 0 for a floor)
and further ones by *steps* of rising cost: a pool's ask curve, a link's one free step, a floor's
penalty. With prices y >= 0 a row earns

    base y + sum_k max(0, y - cost_k) units_k

*Goods* are what a job on one site asks for: GPUs of one *kind* (pools whose GPUs run every job
equally fast) from slot `first` up to, not including, slot `end`. Without a horizon there is one
slot, and a good is a kind.

A *column* is one way to place one job, named by (form, item, place):

    form 0  single   item of Singles, place a pool: `gpus` of the good's rows of that pool
    form 1  span     item of Spans, place a pattern: GPUs in several pools now, and link shares
    form 2  bundle   item of Bundles, place 0: any uses of any rows, written out: incumbents,
                     and whatever no good or pattern describes
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Index = NDArray[np.int32]
Real = NDArray[np.float64]
Flag = NDArray[np.bool_]

SINGLE: Final = 0
SPAN: Final = 1
BUNDLE: Final = 2
NONE: Final = -1

# Sites of one span that the patterns describe; a job that may span more is given up to this many.
SPAN_SITES_MAX: Final = 4
# How far a job's data may travel from its home: the same site, its region, its continent, anywhere.
TIERS: Final = 4
# Shares of a link's bandwidth, or of a tenant's budget: ten-thousandths, so that prices times
# uses are whole numbers whatever the scale.
SHARES: Final = 10_000
# Above this no hourly rate is accepted: 200,000 jobs at it still sum below 2^63.
RATE_MICROS_PER_HOUR_MAX: Final = 2**45


class Rows(NamedTuple):
    """What is scarce: `steps` of row r are step_start[r] up to step_start[r + 1], costs rising."""

    base: Int
    step_start: Int
    step_units: Int
    step_cost: Int


class Sites(NamedTuple):
    """Sites by index: which region and continent each lies in; -1 is nowhere in particular."""

    region: Index
    continent: Index


class Pools(NamedTuple):
    """Pools by index. `job_max` is the most GPUs that one job may take in each."""

    site: Index
    kind: Index
    job_max: Int


class Kinds(NamedTuple):
    """Kinds of GPU: the catalogue's type by index, FLOP/s achieved, bits/s of a ring in a site."""

    gpu_type: Index
    flops_per_s: Real
    ring_bits_per_s: Real


class Links(NamedTuple):
    """Directed links. The row of link l is `first_row + l`, its capacity in SHARES of bandwidth."""

    first_row: int
    from_site: Index
    to_site: Index
    bits_per_s: Real
    delay_s: Real
    loss: Real
    egress_micros_per_gb: Int


class Goods(NamedTuple):
    """Goods and who offers them: pools offer_start[g] up to offer_start[g + 1].

    `offer_limit` is the most GPUs that one job may take of the good there: the pool's `job_max`,
    and no more than the pool has in every slot of the good.
    """

    kind: Index
    first: Index
    end: Index
    offer_start: Int
    offer_pool: Index
    offer_limit: Int


class Jobs(NamedTuple):
    """Jobs by index, with what their spans' speeds are computed from.

    must                  inside its term: it cannot stay out
    own                   the bundle that is its incumbent place, -1 without one
    locked                micro-credits per hour that a move away from `own` must leave the tenant
    home, tier_price      where its data is, and micro-credits per GB read at each tier; -1: not
                          allowed there. Home -1: every site is tier 0.
    site_set              index into `site_sets`, -1: every site
    budget_row, budget    its tenant's budget row and rate; -1, 0: none
    floor_row             its tenant's fairness floor; -1: none
    value_base/slope      its value is the least of base + slope x samples/s over the pieces
    hold_left, samples_left, deadline_s (from now; inf: none), term_s  bound what it can pay
    restart               micro-credits that leaving `own` destroys; 0 without an incumbent
    batch_per_gpu, parameters, flops_per_sample, data_bytes_per_sample, period_steps
    codec                 index into CODECS, -1: the least lossy that is cheap enough
    sync_open             its plan between sites is chosen for each column (training.sync_rule), of `samples` in all, so that
                          `target` of the time computes and a site sends at most egress_gb_max (inf: any); fragments: P
    flops_per_s, ring_bits_per_s  [job, gpu type] as measured for this job; nan: the kind's
    barred_start, barred  keys of columns (see `column_key`) that a site vetoed
    """

    must: Flag
    own: Index
    locked: Int
    home: Index
    tier_price: Int
    site_set: Index
    budget_row: Index
    budget: Int
    floor_row: Index
    value_base: Real
    value_slope: Real
    hold_left: Int
    samples_left: Real
    deadline_s: Real
    restart: Int
    batch_per_gpu: Real
    parameters: Real
    flops_per_sample: Real
    data_bytes_per_sample: Real
    period_steps: Real
    codec: Index
    sync_open: Flag
    samples: Real
    target: Real
    egress_gb_max: Real
    fragments: Real
    flops_per_s: Real
    ring_bits_per_s: Real
    barred_start: Int
    barred: Int


def stated_plans(jobs: int) -> dict[str, Any]:
    """Return the columns of Jobs that only a choice of plans looks at, for jobs whose plans are not chosen."""
    return {
        "sync_open": np.zeros(jobs, np.bool_),
        "samples": np.ones(jobs),
        "target": np.full(jobs, 0.95),
        "egress_gb_max": np.full(jobs, np.inf),
        "fragments": np.ones(jobs),
    }


class Singles(NamedTuple):
    """Candidates on one site: those of job j are start[j] up to start[j + 1].

    `value` is the sum over the good's slots of the value per hour, after budget and restart,
    before data egress; `speed` samples/s; `data_bytes_per_s` is what the job reads from home.
    """

    start: Int
    good: Index
    gpus: Int
    value: Int
    speed: Real
    data_bytes_per_s: Int


class Patterns(NamedTuple):
    """Ways to join pools: `pool[c, i]` of part i or -1, GPUs split by `weight`, sites in order.

    `hub` is the part that relays; `up` and `down` are the links of every other part to and from
    it, -1 for the hub. Patterns of a family (the same kinds) are family_start[f] up to
    family_start[f + 1].
    """

    pool: Index
    weight: Index
    parts: Index
    hub: Index
    up: Index
    down: Index
    family_start: Int


class Spans(NamedTuple):
    """Candidates across sites: `gpus` in all over any pattern of a `family` that the job may use.

    A span starts now and holds its pools for `slots` slots (1 without a horizon).
    """

    start: Int
    family: Index
    gpus: Int
    sites_max: Index
    slots: Index


class Bundles(NamedTuple):
    """Columns written out: uses of rows from entry_start[b] up to entry_start[b + 1].

    `value` is net of egress, summed over the slots it uses; `charge_max` the most that the buyer
    may be charged per hour. A job's column also uses its budget and its floor row: a bundle's
    entries name them, for singles and spans they follow from Jobs.
    """

    start: Int
    value: Int
    charge_max: Int
    entry_start: Int
    entry_row: Index
    entry_use: Int


class Instance(NamedTuple):
    """One round's market. `slots` of equal length; `term_s` is how long a price is locked."""

    slots: int
    term_s: float
    rows: Rows
    sites: Sites
    pools: Pools
    kinds: Kinds
    links: Links
    goods: Goods
    jobs: Jobs
    site_sets: NDArray[np.uint64]
    singles: Singles
    patterns: Patterns
    spans: Spans
    bundles: Bundles

    @property
    def job_count(self) -> int:
        """Jobs of the round."""
        return len(self.jobs.must)

    @property
    def pool_count(self) -> int:
        """Pools of one slot."""
        return len(self.pools.site)

    @property
    def row_count(self) -> int:
        """Everything scarce, in all slots."""
        return len(self.rows.base)


class Choice(NamedTuple):
    """Which column each job holds: `form` -1 where it has none."""

    form: NDArray[np.int8]
    item: Index
    place: Index


def capacity(rows: Rows) -> Int:
    """Return what each row can supply in all, at any price."""
    totals = np.add.reduceat(np.append(rows.step_units, 0), rows.step_start[:-1]) if len(rows.base) else rows.base
    empty = rows.step_start[:-1] == rows.step_start[1:]
    return rows.base + np.where(empty, 0, totals)
