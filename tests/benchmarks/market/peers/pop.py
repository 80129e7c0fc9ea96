"""POP's random split (Narayanan et al., SOSP'21) around Gavel's LPs.

Jobs are dealt at random into k sub-problems of equal size, the workers of each type as well; each
sub-problem is solved alone and the allocations are united. Workers that k does not divide are dealt
to random sub-problems rather than left idle. `seconds` is the sum, `longest_s` what k machines take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from broker.allocation.instance import Int
from tests.benchmarks.market.instances import SharedWorkers, TimeShares
from tests.benchmarks.market.peers import gavel

Problem = TypeVar("Problem", TimeShares, SharedWorkers)


class SplitAnswer(NamedTuple):
    """The united answer of the sub-problems: their objectives, CPU seconds of all and of the longest."""

    objectives: tuple[float, ...]
    seconds: float
    longest_s: float


def max_sum(problem: TimeShares, parts: int, solver: str, seed: int) -> SplitAnswer:
    """Split Gavel's max-sum LP; the objective of the whole is the sum of `objectives`."""
    return _solved(split(problem, parts, seed), lambda part: gavel.max_sum(part, solver))


def max_min_shared(problem: SharedWorkers, parts: int, solver: str, seed: int) -> SplitAnswer:
    """Split the space-sharing LP; the objective of the whole is the least of `objectives`."""
    return _solved(split(problem, parts, seed), lambda part: gavel.max_min_shared(part, solver))


def split(problem: Problem, parts: int, seed: int) -> list[Problem]:
    """Deal jobs and workers into sub-problems."""
    rng = np.random.default_rng((seed, 5))
    jobs = len(problem.gpus) if isinstance(problem, TimeShares) else len(problem.job_type)
    order = rng.permutation(jobs)
    workers = np.tile(problem.workers // parts, (parts, 1))
    for worker_type, left in enumerate(problem.workers % parts):
        workers[rng.permutation(parts)[:left], worker_type] += 1
    return [_part(problem, np.sort(order[part::parts]), workers[part]) for part in range(parts)]


def _part(problem: Problem, jobs: Int, workers: Int) -> Problem:
    if isinstance(problem, TimeShares):
        return problem._replace(throughput=problem.throughput[jobs], gpus=problem.gpus[jobs], workers=workers)
    return problem._replace(job_type=problem.job_type[jobs], workers=workers)


def _solved(problems: list[Problem], solve: Callable[[Problem], gavel.Answer]) -> SplitAnswer:
    answers = [solve(problem) for problem in problems]
    seconds = [answer.seconds for answer in answers]
    return SplitAnswer(tuple(answer.objective for answer in answers), sum(seconds), max(seconds))
