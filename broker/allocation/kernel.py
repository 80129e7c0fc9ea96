"""What a column is worth, and what it uses: the rules of the market as compiled scalar functions.

Everything that prices columns (oracle, window, repair, the written clearing) calls these, so that
no two parts of the solver can disagree by a bit. The speed of a span is `training.throughput`'s
own closed form, compiled as it stands. `broker.allocation.rules` says the same a second time, in
other code, for `verify`.

Floats are used in a stated order without fused operations, and every rate is rounded down (values)
or up (costs) to whole micro-credits right away.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from broker.allocation.compiled import compiled, inlined
from broker.allocation.configuration import TERM_MARGIN, TERM_S_MIN
from broker.allocation.instance import (
    RATE_MICROS_PER_HOUR_MAX,
    SHARES,
    SPAN_SITES_MAX,
    Instance,
    Int,
    Jobs,
)
from training import sync_rule, throughput

# Index of Jobs.codec; `auto` (-1) takes the first of AUTO_CODECS that is cheap enough.
CODECS: Final = tuple(throughput.CODEC_RATIOS)
_CODEC_RATIOS: Final = np.array([throughput.CODEC_RATIOS[codec] for codec in CODECS])
_AUTO: Final = np.array([CODECS.index(codec) for codec in throughput.AUTO_CODECS])
# The ways between which a job with an open plan has the choice, from the least lossy on.
_WAY_CODEC: Final = np.array([CODECS.index(way.codec) for way in sync_rule.WAYS])
_WAY_PERIOD_MAX: Final = np.array([float(way.period_steps_max) for way in sync_rule.WAYS])
_WAY_STREAMS: Final = np.array([way.strategy == "streaming" for way in sync_rule.WAYS])
_WAY_EVERY_STEP: Final = np.array([way.strategy == "every_step" for way in sync_rule.WAYS])
_PERIOD_OPEN: Final = float(sync_rule.PERIOD_STEPS_OPEN)
_SYNC_SHARE_MAX: Final = throughput.SYNC_SHARE_MAX
_ROUND_TRIPS: Final = throughput.ROUND_TRIPS_PER_SYNC

_compute_s = compiled(throughput.compute_s)
_all_reduce_s = compiled(throughput.all_reduce_s)
_contribution_bytes = compiled(throughput.contribution_size_bytes)
_transfer_s = compiled(throughput.link_transfer_s)
_stall_s = compiled(throughput.stall_s)
_overlap_steps = compiled(sync_rule.overlap_steps)
_overlap_within = compiled(sync_rule.overlap_within)
_period_steps = compiled(sync_rule.period_steps)
_stated_period_steps = compiled(sync_rule.stated_period_steps)
_utilisation = compiled(sync_rule.utilisation)
_sent_gb = compiled(sync_rule.sent_gb)
_comes_closer = compiled(sync_rule.comes_closer)


@inlined
def column_key(form: int, item: int, place: int) -> int:
    """Return the one number that names a column."""
    return (np.int64(form) << 61) | (np.int64(item) << 30) | np.int64(place)  # type: ignore[return-value]  # an int64 is an int to every caller


@inlined
def ceil_rate(amount: float) -> int:
    """Return an hourly rate rounded up, bounded so that sums never overflow."""
    return int(min(float(math.ceil(amount)), float(RATE_MICROS_PER_HOUR_MAX)))


@inlined
def value_rate(jobs: Jobs, job: int, speed: float) -> int:
    """Return what an hour at `speed` samples/s is worth to a job by its bid, rounded down."""
    least = np.inf
    for piece in range(jobs.value_slope.shape[1]):
        least = min(least, jobs.value_base[job, piece] + jobs.value_slope[job, piece] * speed)
    return int(min(max(0.0, math.floor(least)), float(RATE_MICROS_PER_HOUR_MAX)))


@inlined
def term_seconds(instance: Instance, job: int, speed: float) -> float:
    """Return the term that a job at `speed` is offered: whole seconds, shorter near its end."""
    left = math.ceil(TERM_MARGIN * instance.jobs.samples_left[job] / speed)
    return min(instance.term_s, max(float(TERM_S_MIN), left))


@inlined
def affordable_rate(jobs: Jobs, job: int, term_s: float, rounded_amounts: int) -> int:
    """Return the highest hourly rate that a job's hold can reserve for a whole term."""
    return max(0, jobs.hold_left[job] - rounded_amounts) * 3600 // np.int64(term_s)


@inlined
def restart_rate(jobs: Jobs, job: int, term_s: float) -> int:
    """Return what a move destroys, spread over the term, rounded up."""
    return -((-jobs.restart[job] * 3600) // np.int64(term_s))


@inlined
def site_step_s(instance: Instance, job: int, pool: int, gpus: int) -> float:
    """Return one inner step of a job on `gpus` GPUs of a pool: compute and all-reduce."""
    return kind_step_s(instance, job, instance.pools.kind[pool], gpus)


@inlined
def kind_step_s(instance: Instance, job: int, kind: int, gpus: int) -> float:
    """Return one inner step of a job on `gpus` GPUs of a kind."""
    jobs, kinds = instance.jobs, instance.kinds
    gpu_type = kinds.gpu_type[kind]
    flops_per_s = jobs.flops_per_s[job, gpu_type]
    if np.isnan(flops_per_s):
        flops_per_s = kinds.flops_per_s[kind]
    ring = jobs.ring_bits_per_s[job, gpu_type]
    if np.isnan(ring):
        ring = kinds.ring_bits_per_s[kind]
    computing_s = _compute_s(jobs.batch_per_gpu[job], jobs.flops_per_sample[job], flops_per_s)
    return computing_s + _all_reduce_s(jobs.parameters[job], gpus, ring)


@inlined
def tier_of(instance: Instance, job: int, site: int) -> int:
    """Return how far a site is from a job's data: 0 the same site, 1 region, 2 continent, 3 beyond."""
    home = instance.jobs.home[job]
    sites = instance.sites
    if home < 0 or home == site:
        return 0
    if sites.region[home] >= 0 and sites.region[home] == sites.region[site]:
        return 1
    if sites.continent[home] >= 0 and sites.continent[home] == sites.continent[site]:
        return 2
    return 3


@inlined
def site_allowed(instance: Instance, job: int, site: int) -> bool:
    """Return whether a job may be at a site, by its site list and by where its data may travel."""
    chosen = instance.jobs.site_set[job]
    if chosen >= 0:
        word = instance.site_sets[chosen, site >> 6]
        if (word >> np.uint64(site & 63)) & np.uint64(1) == 0:
            return False
    return instance.jobs.tier_price[job, tier_of(instance, job, site)] >= 0


@inlined
def data_egress_rate(instance: Instance, job: int, site: int, bytes_per_s: int) -> int:
    """Return what reading `bytes_per_s` of a job's data at a site costs per hour, rounded up."""
    price = instance.jobs.tier_price[job, tier_of(instance, job, site)]
    return ceil_rate(float(bytes_per_s) * 3600.0 * float(price) / 1e9)


@inlined
def is_barred(jobs: Jobs, job: int, key: int) -> bool:
    """Return whether a site vetoed this column of the job a short while ago."""
    for place in range(jobs.barred_start[job], jobs.barred_start[job + 1]):
        if jobs.barred[place] == key:
            return True
    return False


@inlined
def split(gpus: int, weight: np.ndarray, parts: int, counts: np.ndarray) -> bool:
    """Divide `gpus` by weight into `counts`, largest remainders first, ties to the earlier part.

    Returns False where a part would have none.
    """
    whole = 0
    for part in range(parts):
        whole += weight[part]
    left = gpus
    for part in range(parts):
        counts[part] = gpus * weight[part] // whole
        left -= counts[part]
    for _ in range(left):
        best = -1
        for part in range(parts):
            # A part that has had its extra GPU is past its exact share: its remainder is below 0.
            remainder = gpus * weight[part] - counts[part] * whole
            if best < 0 or remainder > gpus * weight[best] - counts[best] * whole:
                best = part
        counts[best] += 1
    for part in range(parts):
        if counts[part] < 1:
            return False
    return True


@inlined
def span_ceiling(instance: Instance, job: int, span: int, pattern: int) -> float:
    """Return a speed in samples/s that no pattern of this span's family exceeds, sync left out.

    `pattern` is any pattern of the family: the kinds and so the fastest parts are the same.
    """
    patterns = instance.patterns
    gpus = instance.spans.gpus[span]
    slowest = 0.0
    for part in range(patterns.parts[pattern]):
        slowest = max(slowest, site_step_s(instance, job, patterns.pool[pattern, part], 1))
    return instance.jobs.batch_per_gpu[job] * gpus / slowest


# Positions in the `out` array of `single_column` and `span_column`.
VALUE: Final = 0
EGRESS: Final = 1
CHARGE_MAX: Final = 2
TERM_S: Final = 3
CODEC: Final = 4
# What was chosen for an open plan: index into sync_rule.WAYS (-1: the job's own strategy), period and overlap in steps.
WAY: Final = 5
PERIOD: Final = 6
OVERLAP: Final = 7
# Then, by part: GPUs, bytes/s up, shares up, bytes/s down, shares down, bytes/s of data read.
PARTS: Final = 8
PART_FIELDS: Final = 6
SPAN_OUT: Final = PARTS + PART_FIELDS * SPAN_SITES_MAX


@inlined
def span_column(instance: Instance, job: int, span: int, pattern: int, out: Int) -> float:
    """Fill `out` (SPAN_OUT integers) with a span's value and uses; return its samples/s, 0 if none.

    VALUE is net of EGRESS, both summed over the span's slots; CHARGE_MAX is for an hour.

    None where a site is not allowed, a part is too large or empty, the job would be late, its own
    traffic exceeds a link, or a site vetoed it.
    """
    jobs, pools, links, patterns = instance.jobs, instance.pools, instance.links, instance.patterns
    parts = patterns.parts[pattern]
    if parts > instance.spans.sites_max[span] or is_barred(jobs, job, column_key(1, span, pattern)):
        return 0.0
    counts = out[PARTS : PARTS + SPAN_SITES_MAX * PART_FIELDS : PART_FIELDS]
    if not split(instance.spans.gpus[span], patterns.weight[pattern], parts, counts):
        return 0.0
    slowest_s = 0.0
    for part in range(parts):
        pool = patterns.pool[pattern, part]
        if counts[part] > pools.job_max[pool] or not site_allowed(instance, job, pools.site[pool]):
            return 0.0
        slowest_s = max(slowest_s, site_step_s(instance, job, pool, counts[part]))
    way, codec, period, overlap, groups, sync_s = -1, int(jobs.codec[job]), jobs.period_steps[job], 0.0, 1.0, 0.0
    if jobs.sync_open[job]:
        way, codec, period, overlap, groups, sync_s = chosen_way(
            instance, job, pattern, instance.spans.gpus[span], slowest_s
        )
    elif codec >= 0:
        sync_s = _sync_round_s(instance, job, pattern, codec, 1.0)
    else:
        for choice in _AUTO:
            codec = choice
            sync_s = _sync_round_s(instance, job, pattern, codec, 1.0)
            if sync_s / (period * slowest_s) <= _SYNC_SHARE_MAX:
                break
    step_s = slowest_s + _stall_s(sync_s, overlap * slowest_s) * groups / period
    speed = jobs.batch_per_gpu[job] * instance.spans.gpus[span] / step_s
    if jobs.samples_left[job] / speed > jobs.deadline_s[job]:
        return 0.0
    contribution = _contribution_bytes(float(math.ceil(jobs.parameters[job] / groups)), _CODEC_RATIOS[codec]) * groups
    interval_s = step_s * period
    egress, rounded = np.int64(0), 1
    for part in range(parts):
        field = PARTS + part * PART_FIELDS
        data = int(math.ceil(jobs.data_bytes_per_sample[job] * speed * counts[part] / instance.spans.gpus[span]))
        out[field + 5] = data
        if data > 0:
            egress += data_egress_rate(instance, job, pools.site[patterns.pool[pattern, part]], data)
            rounded += 1
        for direction in range(2):
            link = patterns.up[pattern, part] if direction == 0 else patterns.down[pattern, part]
            out[field + 1 + 2 * direction] = 0
            out[field + 2 + 2 * direction] = 0
            if link < 0:
                continue
            size = contribution if direction == 0 else contribution * (parts - 1)
            sent = int(math.ceil(size / interval_s))
            shares = link_shares(links.bits_per_s[link], sent)
            if shares > SHARES:
                return 0.0
            out[field + 1 + 2 * direction] = sent
            out[field + 2 + 2 * direction] = shares
            egress += ceil_rate(float(sent) * 3600.0 * float(links.egress_micros_per_gb[link]) / 1e9)
            rounded += 1
    term_s = term_seconds(instance, job, speed)
    value = min(value_rate(jobs, job, speed), affordable_rate(jobs, job, term_s, rounded))
    if jobs.own[job] >= 0:
        value -= restart_rate(jobs, job, term_s)
    slots = np.int64(instance.spans.slots[span])
    out[VALUE] = (value - egress) * slots
    out[EGRESS] = egress * slots
    out[CHARGE_MAX] = value - egress - (jobs.locked[job] if jobs.must[job] else 0)
    out[TERM_S] = np.int64(term_s)
    out[CODEC] = codec
    out[WAY], out[PERIOD], out[OVERLAP] = way, np.int64(period), np.int64(overlap)
    return speed


@inlined
def chosen_way(
    instance: Instance, job: int, pattern: int, gpus: int, step_s: float
) -> tuple[int, int, float, float, float, float]:
    """Return what an open plan becomes on a pattern: way, codec, period, overlap, groups and the seconds of a round.

    The first way that leaves the target's share of the time to computing and sends no more than the cap, else the one that
    comes closest, as `training.sync_choice` says it.
    """
    jobs = instance.jobs
    steps = max(1.0, float(math.floor(jobs.samples[job] / (jobs.batch_per_gpu[job] * gpus))))
    target, cap = jobs.target[job], jobs.egress_gb_max[job]
    best, best_codec, best_period, best_overlap, best_groups, best_round_s = -1, -1, 1.0, 0.0, 1.0, 0.0
    best_over, best_share = 0.0, 0.0
    for way in range(len(_WAY_CODEC)):
        codec = int(jobs.codec[job])
        if codec < 0:
            codec = int(_WAY_CODEC[way])
        groups = jobs.fragments[job] if _WAY_STREAMS[way] else 1.0
        round_s = _sync_round_s(instance, job, pattern, codec, groups)
        overlap = _overlap_steps(round_s, step_s) if _WAY_STREAMS[way] else 0.0
        waits_s = _stall_s(round_s, overlap * step_s)
        period = 1.0
        if not _WAY_EVERY_STEP[way]:
            if jobs.period_steps[job] != _PERIOD_OPEN:
                period = _stated_period_steps(jobs.period_steps[job], groups)
            else:
                period = _period_steps(waits_s / step_s, groups, target, _WAY_PERIOD_MAX[way], steps)
        if _WAY_STREAMS[way]:
            overlap = _overlap_within(overlap, period, groups)
            waits_s = _stall_s(round_s, overlap * step_s)
        share = _utilisation(period, groups, step_s, waits_s)
        sent = _sent_gb(steps, period, jobs.parameters[job], _CODEC_RATIOS[codec])
        does = share >= target and sent <= cap
        over = max(sent, cap)
        if does or best < 0 or _comes_closer(over, share, best_over, best_share):
            best, best_codec, best_period, best_overlap = way, codec, period, overlap
            best_groups, best_round_s, best_over, best_share = groups, round_s, over, share
        if does:
            break
    return best, best_codec, best_period, best_overlap, best_groups, best_round_s


@inlined
def link_shares(bits_per_s: float, bytes_per_s: int) -> int:
    """Return what traffic uses of a link in SHARES, rounded up; above SHARES where it does not fit."""
    return int(min(math.ceil(float(bytes_per_s) * 8.0 * SHARES / bits_per_s), 2.0**40))


@inlined
def _sync_round_s(instance: Instance, job: int, pattern: int, codec: int, groups: float) -> float:
    """Return the seconds of one sync round through the pattern's hub, which carries one of `groups` of fragments."""
    links, patterns = instance.links, instance.patterns
    travelling = float(math.ceil(instance.jobs.parameters[job] / groups))
    contribution = _contribution_bytes(travelling, _CODEC_RATIOS[codec])
    slowest_s = 0.0
    for part in range(patterns.parts[pattern]):
        up, down = patterns.up[pattern, part], patterns.down[pattern, part]
        if up < 0:
            continue
        others = patterns.parts[pattern] - 1
        transfer_s = _transfer_s(contribution, links.bits_per_s[up], links.loss[up]) + _transfer_s(
            contribution * others, links.bits_per_s[down], links.loss[down]
        )
        slowest_s = max(slowest_s, transfer_s + _ROUND_TRIPS * (links.delay_s[up] + links.delay_s[down]))
    return slowest_s


@inlined
def budget_shares(jobs: Jobs, job: int, rate: int) -> int:
    """Return what a placement that may cost `rate` per hour uses of its tenant's budget, in SHARES."""
    if jobs.budget_row[job] < 0 or rate <= 0:
        return 0
    return int(math.ceil(float(rate) * SHARES / float(jobs.budget[job])))


@inlined
def single_column(instance: Instance, job: int, single: int, pool: int, out: Int) -> bool:
    """Fill out[VALUE], [EGRESS] and [CHARGE_MAX] for a candidate at one of its good's pools.

    VALUE is net of EGRESS, both summed over the good's slots; CHARGE_MAX is for an hour.

    Returns False where the job may not be at that pool's site or the site vetoed it. That the
    pool offers enough GPUs (Goods.offer_limit) is the caller's to know.
    """
    jobs, singles = instance.jobs, instance.singles
    site = instance.pools.site[pool]
    if not site_allowed(instance, job, site) or is_barred(jobs, job, column_key(0, single, pool)):
        return False
    egress = data_egress_rate(instance, job, site, singles.data_bytes_per_s[single])
    goods, good = instance.goods, singles.good[single]
    slots = np.int64(goods.end[good] - goods.first[good])
    out[VALUE] = singles.value[single] - egress * slots
    out[EGRESS] = egress * slots
    out[CHARGE_MAX] = singles.value[single] // slots - egress - (jobs.locked[job] if jobs.must[job] else 0)
    return True
