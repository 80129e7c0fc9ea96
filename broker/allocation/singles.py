"""Candidates on one site and across sites: which counts a job could be given, and what they are worth.

Counts are those of a ladder (1, 2, 3, 4, 6, 8, 12, 16, 24, ...) within the job's request, and the
request's two ends. A count that gains nothing even at the lowest ask is left out, but not for a
job inside its term, whose losses compete with one another.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from broker.allocation import kernel
from broker.allocation.compiled import compiled, compiled_loop
from broker.allocation.instance import Flag, Index, Instance, Int, Real
from broker.allocation.patterns import Families

# Beyond this a round's memory is gone: pools whose measured speeds all differ are all kinds of their own.
CANDIDATES_MAX: Final = 20_000_000
# A job slower than this (three thousand years to the end) does not run; sums of seconds stay exact.
LEFT_S_MAX: Final = 1e11
# What a job reads per second stays a whole number far below 2^63.
DATA_BYTES_PER_S_MAX: Final = 1e15


class Requests(NamedTuple):
    """What jobs ask for: requests of job j are start[j] up to start[j + 1].

    `active` jobs have something left to do, `spanning` ones may use several sites, `mixed` ones
    several types. `penalty` is what one GPU is worth at most to its tenant's floor.
    """

    start: Int
    gpu_type: Index
    count_min: Int
    count_max: Int
    active: Flag
    spanning: Flag
    mixed: Flag
    sites_max: Index
    penalty: Int


class Offered(NamedTuple):
    """What kinds have: kinds of a type are first[t] up to first[t + 1].

    most     [kind, first slot, last slot] the most GPUs that one pool gives one job over the window
    ask_low  the lowest flat ask of the kind
    quota    [pool] the most GPUs that the pool gives one job
    waiting  what is left of a value after waiting for each slot
    """

    first: Int
    most: Int
    ask_low: Int
    quota: Int
    waiting: Real
    slot_s: float


@compiled
def next_count(count: int) -> int:
    """Return the ladder's next count: 2^i and 3 x 2^i in rising order."""
    power = 1
    while power * 2 <= count:
        power *= 2
    if power > 1 and count < power + power // 2:
        return power + power // 2
    return power * 2


@compiled
def ladder_length(low: int, high: int) -> int:
    """Return how many counts lie from `low` to `high`, both included."""
    length, count = 1, low
    while count < high:
        count = min(high, next_count(count))
        length += 1
    return length


@compiled_loop
def singles_bound(requests: Requests, first: Int, slots: int) -> int:
    """Return how many candidates on one site there could be."""
    total = 0
    for job in range(len(requests.active)):
        for request in range(requests.start[job], requests.start[job + 1]):
            kind = requests.gpu_type[request]
            counts = ladder_length(requests.count_min[request], requests.count_max[request])
            total += counts * (first[kind + 1] - first[kind]) * slots
    return total


@compiled
def slots_held(left_s: float, slot_s: float, slots: int) -> int:
    """Return for how many slots a job with `left_s` seconds to go holds its GPUs."""
    return int(max(1.0, min(float(slots), math.ceil(left_s / slot_s))))


@compiled_loop
def fill_singles(
    instance: Instance,
    requests: Requests,
    offered: Offered,
    start: Int,
    good: Index,
    gpus: Int,
    value: Int,
    speed: Real,
    data: Int,
) -> int:
    """Fill the arrays of Singles, goods still by window ((kind x slots + first) x slots + last); return how many."""
    jobs, slots = instance.jobs, instance.slots
    found = 0
    for job in range(len(jobs.must)):
        start[job] = found
        if not requests.active[job]:
            continue
        for request in range(requests.start[job], requests.start[job + 1]):
            kind_type = requests.gpu_type[request]
            for kind in range(offered.first[kind_type], offered.first[kind_type + 1]):
                count = requests.count_min[request]
                most = offered.most[kind, 0, 0]
                for slot in range(1, slots):
                    most = max(most, offered.most[kind, slot, slot])
                while count <= most:
                    rate = jobs.batch_per_gpu[job] * count / kernel.kind_step_s(instance, job, kind, count)
                    left_s = jobs.samples_left[job] / rate
                    if rate > 0.0 and left_s <= min(jobs.deadline_s[job], LEFT_S_MAX):
                        read = int(math.ceil(min(jobs.data_bytes_per_sample[job] * rate, DATA_BYTES_PER_S_MAX)))
                        term_s = kernel.term_seconds(instance, job, rate)
                        worth = min(
                            kernel.value_rate(jobs, job, rate),
                            kernel.affordable_rate(jobs, job, term_s, 2 if read > 0 else 1),
                        )
                        if jobs.own[job] >= 0:
                            worth -= kernel.restart_rate(jobs, job, term_s)
                        held = slots_held(left_s, offered.slot_s, slots) if slots > 1 else 1
                        least = count * (offered.ask_low[kind] - requests.penalty[job])
                        for slot in range(slots):
                            last = min(slot + held, slots) - 1
                            # A job that runs is not put off: it stays, moves or ends.
                            late = slot * offered.slot_s + left_s > jobs.deadline_s[job]
                            if slot > 0 and (late or jobs.own[job] >= 0):
                                break
                            hourly = worth
                            if slot > 0:
                                hourly = int(math.floor(worth * offered.waiting[slot]))
                            if offered.most[kind, slot, last] >= count and (jobs.must[job] or hourly > least):
                                good[found] = (kind * slots + slot) * slots + last
                                gpus[found] = count
                                value[found] = hourly * (last + 1 - slot)
                                speed[found] = rate
                                data[found] = read
                                found += 1
                    if count >= requests.count_max[request]:
                        break
                    count = min(requests.count_max[request], next_count(count))
    start[len(jobs.must)] = found
    return found


@compiled_loop
def spans_of(
    instance: Instance,
    requests: Requests,
    families: Families,
    offered: Offered,
    parts: Int,
    start: Int,
    family_out: Index,
    gpus: Int,
    sites_max: Index,
    slots_out: Index,
) -> int:
    """Fill the arrays of Spans where they have room; return how many there are.

    `parts` is room for the two parts of a mix.
    """
    jobs, kinds = instance.jobs, instance.kinds
    found = 0
    for job in range(len(jobs.must)):
        start[job] = found
        if not (requests.active[job] and requests.spanning[job]):
            continue
        for family in range(len(families.mixed)):
            if families.parts_min[family] > requests.sites_max[job]:
                continue
            lowest = kinds.gpu_type[families.kinds[family, 0]]
            first = -1
            second = -1
            for request in range(requests.start[job], requests.start[job + 1]):
                if requests.gpu_type[request] == lowest:
                    first = request
                if families.mixed[family] and requests.gpu_type[request] == kinds.gpu_type[families.kinds[family, 1]]:
                    second = request
            if first < 0 or (families.mixed[family] and (second < 0 or not requests.mixed[job])):
                continue
            low, high = requests.count_min[first], requests.count_max[first]
            if second >= 0:
                low, high = min(low, requests.count_min[second]), max(high, requests.count_max[second])
            slowest = 0.0
            for place in range(families.kinds.shape[1]):
                if families.kinds[family, place] >= 0:
                    slowest = max(slowest, kernel.kind_step_s(instance, job, families.kinds[family, place], 1))
            count = low
            while True:
                fits = count >= families.parts_min[family]
                if second >= 0:
                    fits &= kernel.split(count, families.weight[family], 2, parts)
                    one, other = (1, 0) if families.swapped[family] else (0, 1)
                    fits &= parts[one] <= requests.count_max[first] and parts[other] <= requests.count_max[second]
                rate = jobs.batch_per_gpu[job] * count / slowest
                left_s = jobs.samples_left[job] / rate
                if fits and rate > 0.0 and left_s <= min(jobs.deadline_s[job], LEFT_S_MAX):
                    # No pattern is faster, so none is worth more or has a shorter term.
                    term_s = kernel.term_seconds(instance, job, rate)
                    worth = min(kernel.value_rate(jobs, job, rate), kernel.affordable_rate(jobs, job, term_s, 1))
                    if jobs.must[job] or worth > count * (families.ask_low[family] - requests.penalty[job]):
                        if found < len(gpus):
                            family_out[found] = family
                            gpus[found] = count
                            sites_max[found] = requests.sites_max[job]
                            slots_out[found] = slots_held(left_s, offered.slot_s, instance.slots)
                        found += 1
                if count >= high:
                    break
                count = min(high, next_count(count))
    start[len(jobs.must)] = found
    return found
