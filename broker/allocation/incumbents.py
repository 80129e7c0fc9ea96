"""Incumbents: which leases stay, and what the place that a job has is worth to it.

Inside its term a lease stays as it was sold: its value is the bid at the sold speed, whatever the
hold has left. After its term it is predicted anew with the plan it was sold with, and competes like
any other column, without the restart that every other place costs.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from broker.allocation import kernel
from broker.allocation.compiled import compiled, compiled_loop, inlined
from broker.allocation.instance import SHARES, Flag, Index, Instance, Int, Real
from broker.allocation.singles import DATA_BYTES_PER_S_MAX, LEFT_S_MAX, slots_held
from training import throughput

_RATIOS: Final = np.array([throughput.CODEC_RATIOS[codec] for codec in kernel.CODECS])
_ROUND_TRIPS: Final = throughput.ROUND_TRIPS_PER_SYNC
_contribution_bytes = compiled(throughput.contribution_size_bytes)
_transfer_s = compiled(throughput.link_transfer_s)
_stall_s = compiled(throughput.stall_s)


class Leases(NamedTuple):
    """What incumbents hold, by incumbent in the order of their jobs.

    A part's pool is -1 where it is no longer offered; hub_part is -1 where no part is the hub;
    up and down are the links of each part to and from the hub, -1 where there is none; codec is
    -1 where the sold plan left it open; groups of fragments take turns, each beside overlap_steps. Traffic is as sold, link -1 where it is gone.
    """

    job: Index
    part_start: Int
    part_pool: Index
    part_gpus: Int
    part_up: Index
    part_down: Index
    hub_part: Index
    codec: Index
    period_steps: Int
    groups: Int
    overlap_steps: Int
    speed: Real
    traffic_start: Int
    traffic_link: Index
    traffic_bytes_per_s: Int
    paid: Int


class Own(NamedTuple):
    """The bundle of each incumbent, where it has one; rates per hour.

    `spends` is what it takes of its tenant's budget: what it pays inside its term, the most that
    it may be charged after. Its traffic is use_start[i] up to use_start[i] + used[i].
    """

    stands: Flag
    value: Int
    charge_max: Int
    spends: Int
    locked: Int
    slots: Int
    use_start: Int
    used: Int
    use_link: Index
    use_shares: Int


def own_places(instance: Instance, leases: Leases, kept: Flag, barred: Flag, slot_s: float) -> Own:
    """Return what each incumbent's own place is worth and uses."""
    count = len(leases.job)
    parts, sold = np.diff(leases.part_start), np.diff(leases.traffic_start)
    use_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(sold, 2 * parts))])
    uses = int(use_start[-1])
    own = Own(
        stands=np.zeros(count, np.bool_),
        value=np.zeros(count, np.int64),
        charge_max=np.zeros(count, np.int64),
        spends=np.zeros(count, np.int64),
        locked=np.zeros(count, np.int64),
        slots=np.ones(count, np.int64),
        use_start=use_start,
        used=np.zeros(count, np.int64),
        use_link=np.zeros(uses, np.int32),
        use_shares=np.zeros(uses, np.int64),
    )
    _fill(instance, leases, kept, barred, slot_s, own)
    return own


def kept_leases(leases: Leases, inside: Flag, capacity: Int) -> Flag:
    """Return which leases inside their term stay: the oldest first where a pool shrank below what is held."""
    kept = np.zeros(len(leases.job), np.bool_)
    _keep(leases, inside, capacity.copy(), kept)
    return kept


@compiled_loop
def _keep(leases: Leases, inside: Flag, free: Int, kept: Flag) -> None:
    for lease in range(len(leases.job)):
        fits = inside[lease]
        for part in range(leases.part_start[lease], leases.part_start[lease + 1]):
            pool = leases.part_pool[part]
            if pool < 0 or free[pool] < leases.part_gpus[part]:
                fits = False
        if fits:
            kept[lease] = True
            for part in range(leases.part_start[lease], leases.part_start[lease + 1]):
                free[leases.part_pool[part]] -= leases.part_gpus[part]


@compiled_loop
def _fill(instance: Instance, leases: Leases, kept: Flag, barred: Flag, slot_s: float, own: Own) -> None:
    for lease in range(len(leases.job)):
        if kept[lease]:
            _as_sold(instance, leases, lease, slot_s, own)
        elif not barred[lease]:
            _predicted_anew(instance, leases, lease, slot_s, own)


@inlined
def _as_sold(instance: Instance, leases: Leases, lease: int, slot_s: float, own: Own) -> None:
    """State a lease inside its term: value by the bid at the sold speed, prices as locked."""
    jobs, links = instance.jobs, instance.links
    job = leases.job[lease]
    speed = leases.speed[lease]
    egress = _reading(instance, leases, lease, speed)
    used = own.use_start[lease]
    for row in range(leases.traffic_start[lease], leases.traffic_start[lease + 1]):
        link = leases.traffic_link[row]
        if link >= 0:
            sent = leases.traffic_bytes_per_s[row]
            egress += _egress_rate(sent, links.egress_micros_per_gb[link])
            own.use_link[used] = link
            own.use_shares[used] = kernel.link_shares(links.bits_per_s[link], sent)
            used += 1
    value = kernel.value_rate(jobs, job, speed)
    left_s = jobs.samples_left[job] / speed
    held = slots_held(left_s, slot_s, instance.slots)
    own.stands[lease] = True
    own.value[lease] = (value - egress) * held
    own.charge_max[lease] = value - egress
    own.spends[lease] = leases.paid[lease] + egress
    own.locked[lease] = max(0, value - egress - leases.paid[lease])
    own.slots[lease] = held
    own.used[lease] = used - own.use_start[lease]


@inlined
def _predicted_anew(instance: Instance, leases: Leases, lease: int, slot_s: float, own: Own) -> None:
    """State a lease after its term, unless it no longer fits, would be late or may no longer be there."""
    jobs, pools, links = instance.jobs, instance.pools, instance.links
    job = leases.job[lease]
    first, end = leases.part_start[lease], leases.part_start[lease + 1]
    if jobs.samples_left[job] <= 0.0:
        return
    slowest_s, gpus = 0.0, 0
    for part in range(first, end):
        pool = leases.part_pool[part]
        if pool < 0 or pools.job_max[pool] < leases.part_gpus[part]:
            return
        if not kernel.site_allowed(instance, job, pools.site[pool]):
            return
        slowest_s = max(slowest_s, kernel.site_step_s(instance, job, pool, leases.part_gpus[part]))
        gpus += leases.part_gpus[part]
    sync_s, contribution, sites = 0.0, 0.0, end - first
    period, groups_of = float(leases.period_steps[lease]), float(leases.groups[lease])
    if sites > 1:
        hub = leases.hub_part[lease]
        if leases.codec[lease] < 0 or hub < 0:
            return
        travelling = float(math.ceil(jobs.parameters[job] / groups_of))
        contribution = _contribution_bytes(travelling, _RATIOS[leases.codec[lease]])
        for part in range(first, end):
            if part == first + hub:
                continue
            up, down = leases.part_up[part], leases.part_down[part]
            if up < 0 or down < 0:
                return
            transfer_s = _transfer_s(contribution, links.bits_per_s[up], links.loss[up]) + _transfer_s(
                contribution * (sites - 1), links.bits_per_s[down], links.loss[down]
            )
            sync_s = max(sync_s, transfer_s + _ROUND_TRIPS * (links.delay_s[up] + links.delay_s[down]))
    step_s = slowest_s + _stall_s(sync_s, leases.overlap_steps[lease] * slowest_s) * groups_of / period
    speed = jobs.batch_per_gpu[job] * gpus / step_s
    left_s = jobs.samples_left[job] / speed
    if not (speed > 0.0 and left_s <= min(jobs.deadline_s[job], LEFT_S_MAX)):
        return
    egress = _reading(instance, leases, lease, speed)
    rounded = 1 + (end - first if jobs.data_bytes_per_sample[job] > 0.0 else 0)
    used = own.use_start[lease]
    if sites > 1:
        for part in range(first, end):
            if part == first + leases.hub_part[lease]:
                continue
            for direction in range(2):
                link = leases.part_up[part] if direction == 0 else leases.part_down[part]
                sent_bytes = contribution * groups_of
                size = sent_bytes if direction == 0 else sent_bytes * (sites - 1)
                sent = int(math.ceil(size / (step_s * period)))
                shares = kernel.link_shares(links.bits_per_s[link], sent)
                if shares > SHARES:
                    return
                egress += _egress_rate(sent, links.egress_micros_per_gb[link])
                rounded += 1
                own.use_link[used] = link
                own.use_shares[used] = shares
                used += 1
    term_s = kernel.term_seconds(instance, job, speed)
    value = min(kernel.value_rate(jobs, job, speed), kernel.affordable_rate(jobs, job, term_s, rounded))
    held = slots_held(left_s, slot_s, instance.slots)
    own.stands[lease] = True
    own.value[lease] = (value - egress) * held
    own.charge_max[lease] = value - egress
    own.spends[lease] = value
    own.slots[lease] = held
    own.used[lease] = used - own.use_start[lease]


@compiled
def _egress_rate(sent: int, micros_per_gb: int) -> int:
    """Return what a link's traffic costs per hour, rounded up, as for a span."""
    return kernel.ceil_rate(float(sent) * 3600.0 * float(micros_per_gb) / 1e9)


@inlined
def _reading(instance: Instance, leases: Leases, lease: int, speed: float) -> int:
    """Return what reading the job's data at its sites costs per hour."""
    jobs = instance.jobs
    job = leases.job[lease]
    first, end = leases.part_start[lease], leases.part_start[lease + 1]
    gpus, total = 0, 0
    for part in range(first, end):
        gpus += leases.part_gpus[part]
    for part in range(first, end):
        site = instance.pools.site[leases.part_pool[part]]
        rate = jobs.data_bytes_per_sample[job] * speed * leases.part_gpus[part] / gpus
        read = int(math.ceil(min(rate, DATA_BYTES_PER_S_MAX)))
        # A lease that stays although its data may no longer travel there pays nothing for it.
        if read > 0 and jobs.tier_price[job, kernel.tier_of(instance, job, site)] > 0:
            total += kernel.data_egress_rate(instance, job, site, read)
    return total
