"""What a column is worth at given prices, and what a span is worth at most before its pattern is looked at closely.

What bounds a span at a pattern, or at any pattern of a group, from above:

    speed   batch x gpus / (slowest + sync / H); slowest is at least the compute time of the slowest
            kind and the fastest kind's step at ceil(gpus / parts) GPUs, since some part has as many;
            sync is at least size x a + b of the hub's slowest partner (a: seconds per byte up and
            down, b: two round trips) with the most compressed codec that the job may use. An open plan may stream, and
            then nothing waits: it counts no sync, and its least bytes over the longest period that may be chosen
    value   the bid at that speed, and what the hold affords over the shortest term; the longest term
            gives the least restart rate
    toll    what grows with speed (data egress, link egress, link shares at their price) makes every piece
            of the bid less steep; a piece that would then fall counts as flat
    price   a part's GPUs differ from its exact share by less than one, and at most half of the parts
            are above theirs, so a pattern's GPUs cost at least gpus x average - parts // 2 x (dearest
            - cheapest), and never less than gpus x cheapest

Rules as compiled scalars, for `oracle` alone.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from broker.allocation.compiled import inlined
from broker.allocation.instance import Instance, Int, Jobs
from broker.allocation.kernel import CHARGE_MAX, CODECS, EGRESS, PART_FIELDS, PARTS, VALUE, budget_shares, kind_step_s
from training import sync_rule, throughput

_RATIOS: Final = np.array([throughput.CODEC_RATIOS[codec] for codec in CODECS])
_MOST_COMPRESSED: Final = float(max(throughput.CODEC_RATIOS[codec] for codec in throughput.AUTO_CODECS))
_PERIOD_LAST: Final = float(sync_rule.PERIOD_STEPS_LAST)
_BYTES_PER_PARAMETER: Final = throughput.BYTES_PER_PARAMETER
# Bounds are computed in floats: this much is added so that rounding never cuts off the best column.
MARGIN: Final = 1e-9


@inlined
def single_surplus(instance: Instance, y: np.ndarray, job: int, single: int, price: float, out: Int) -> float:
    """Return a single's surplus from `out` of `single_column` and the price of a GPU over its slots."""
    gpus, good = instance.singles.gpus[single], instance.singles.good[single]
    slots = np.int64(instance.goods.end[good] - instance.goods.first[good])
    worth = out[VALUE] + side_surplus(instance, y, job, gpus, slots, out)
    return worth - gpus * price


@inlined
def side_surplus(instance: Instance, y: np.ndarray, job: int, gpus: int, slots: np.int64, out: Int) -> float:
    """Return the credit of a job's fairness floor less the price of its budget, for singles and spans."""
    jobs = instance.jobs
    extra = y[0] * 0
    if jobs.floor_row[job] >= 0:
        extra += gpus * y[jobs.floor_row[job]]
    if jobs.budget_row[job] >= 0:
        rate = max(np.int64(0), out[CHARGE_MAX] + out[EGRESS] // slots)
        extra -= budget_shares(jobs, job, rate) * y[jobs.budget_row[job]]
    return extra


@inlined
def span_surplus(
    instance: Instance, y: np.ndarray, job: int, span: int, pattern: int, prices: np.ndarray, out: Int
) -> float:
    """Return a span's surplus from `out` of `span_column` and the pools' prices over its slots."""
    patterns = instance.patterns
    first_row = instance.links.first_row
    slots = np.int64(instance.spans.slots[span])
    surplus = out[VALUE] + side_surplus(instance, y, job, instance.spans.gpus[span], slots, out)
    for part in range(patterns.parts[pattern]):
        field = PARTS + part * PART_FIELDS
        surplus -= out[field] * prices[patterns.pool[pattern, part]]
        if patterns.up[pattern, part] >= 0:
            surplus -= out[field + 2] * y[first_row + patterns.up[pattern, part]]
            surplus -= out[field + 4] * y[first_row + patterns.down[pattern, part]]
    return surplus


@inlined
def bundle_surplus(instance: Instance, y: np.ndarray, bundle: int) -> float:
    """Return a bundle's value less the price of what it uses."""
    bundles = instance.bundles
    surplus = bundles.value[bundle] + y[0] * 0
    for entry in range(bundles.entry_start[bundle], bundles.entry_start[bundle + 1]):
        surplus -= bundles.entry_use[entry] * y[bundles.entry_row[entry]]
    return surplus


@inlined
def value_bound(instance: Instance, job: int, slots: np.int64, speed: float, afford: float, toll: float) -> float:
    """Return what no span of a job at most this fast is worth over its slots, paying `toll` per sample/s."""
    jobs = instance.jobs
    least = afford * slots
    for piece in range(jobs.value_slope.shape[1]):
        slope = jobs.value_slope[job, piece] * slots - toll * (1 - MARGIN)
        least = min(least, jobs.value_base[job, piece] * slots + max(0.0, slope) * speed)
    return least + 1 + abs(least) * MARGIN


@inlined
def data_prices(jobs: Jobs, job: int, home: int) -> tuple[float, float, float, int]:
    """Return least prices per GB of data read in the home's region, elsewhere in its continent and beyond.

    None is above one further out, so that more GPUs near the home never make a bound dearer. Last, how
    far the job's data may go at all: 1 its region, 2 its continent, 3 anywhere, 0 nowhere.
    """
    region, continent, beyond = np.inf, np.inf, np.inf
    for tier in range(4):
        price = float(jobs.tier_price[job, tier])
        if price < 0 or (home < 0 and tier > 0):
            continue
        if tier <= 1:
            region = min(region, price)
        elif tier == 2:
            continent = price
        else:
            beyond = price
    reach = 0
    for tier, price in ((1, region), (2, continent), (3, beyond)):
        if price < np.inf:
            reach = tier
    continent = min(continent, beyond)
    region = min(region, continent)
    return region, continent if continent < np.inf else 0.0, beyond if beyond < np.inf else 0.0, reach


@inlined
def most_gpus(share: float, gpus: int, parts: int) -> float:
    """Return the most of a span's GPUs that parts with a `share` of its pattern's weight can have."""
    if share == 1.0:
        return float(gpus)
    # Two sets of parts: rounding gives one of them less than one GPU too many, of four parts less than two.
    return min(math.ceil(share * gpus - MARGIN) + (1.0 if parts > 3 else 0.0), gpus - 1.0)


@inlined
def least_sync_bytes(instance: Instance, job: int) -> float:
    """Return the bytes of a job's smallest contribution to a sync round."""
    codec = instance.jobs.codec[job]
    ratio = _RATIOS[codec] if codec >= 0 else _MOST_COMPRESSED
    return instance.jobs.parameters[job] * _BYTES_PER_PARAMETER / ratio


@inlined
def most_period_steps(instance: Instance, job: int) -> float:
    """Return the most inner steps that a job may train between two exchanges of the same parameters."""
    period = instance.jobs.period_steps[job]
    return max(period, _PERIOD_LAST) if instance.jobs.sync_open[job] else period


@inlined
def least_step_s(instance: Instance, job: int, span: int, pattern: int) -> float:
    """Return a lower bound of a span's inner step over the patterns of its family, sync left out."""
    patterns = instance.patterns
    parts = patterns.parts[pattern]
    largest = -(-instance.spans.gpus[span] // parts)
    slowest, fastest_full = 0.0, np.inf
    for part in range(parts):
        kind = instance.pools.kind[patterns.pool[pattern, part]]
        slowest = max(slowest, kind_step_s(instance, job, kind, 1))
        fastest_full = min(fastest_full, kind_step_s(instance, job, kind, largest))
    return max(slowest, fastest_full)
