"""An independent reference of every strategy: plain numpy in float64, from the papers' formulas, driven by a tape.

The tape is what the round log sealed: for each round the sites and their samples. From it alone, the data and the
first parameters, each function here computes the whole trajectory anew. It shares no code with training/ but the
numbering of samples. The model is linear, its loss the mean squared error, the inner optimizer plain SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
# Round number, then (site, its samples) in site order; a site without samples left has none.
Tape = list[list[tuple[str, list[int]]]]
INPUTS, OUTPUTS = 6, 3


@dataclass(frozen=True)
class Problem:
    """The data by sample number, and the knobs."""

    inputs: npt.NDArray[np.float64]
    targets: npt.NDArray[np.float64]
    start: Vector
    rate: float
    batch: int
    eta: float
    mu: float

    def gradient(self, x: Vector, samples: list[int]) -> Vector:
        weights, bias = x[: INPUTS * OUTPUTS].reshape(OUTPUTS, INPUTS), x[INPUTS * OUTPUTS :]
        inputs, targets = self.inputs[samples], self.targets[samples]
        error = 2 * (inputs @ weights.T + bias - targets) / (len(samples) * OUTPUTS)
        return np.concatenate([(error.T @ inputs).reshape(-1), error.sum(axis=0)])

    def batches(self, samples: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(samples), self.batch):
            yield samples[start : start + self.batch]

    def trained(self, x: Vector, samples: list[int]) -> Vector:
        for batch in self.batches(samples):
            x = x - self.rate * self.gradient(x, batch)
        return x


def every_step(problem: Problem, tape: Tape) -> list[Vector]:
    theta, path = problem.start, []
    for entries in tape:
        counts = sum(len(samples) for _, samples in entries)
        gradients = [len(samples) * problem.gradient(theta, samples) for _, samples in entries if samples]
        theta = theta - problem.rate * sum(gradients) / counts
        path.append(theta)
    return path


Mean = Callable[[list[tuple[int, Vector]]], Vector]


def plain_mean(parts: list[tuple[int, Vector]]) -> Vector:
    return sum(weight * moved for weight, moved in parts) / sum(weight for weight, _ in parts)


def radial_mean(parts: list[tuple[int, Vector]]) -> Vector:
    cut = INPUTS * OUTPUTS
    merged = []
    for tensor in (slice(0, cut), slice(cut, None)):
        total = sum(weight for weight, _ in parts)
        length = sum(weight * np.linalg.norm(moved[tensor]) for weight, moved in parts) / total
        direction = sum(weight * moved[tensor] / np.linalg.norm(moved[tensor]) for weight, moved in parts)
        merged.append(length * direction / np.linalg.norm(direction))
    return np.concatenate(merged)


def diloco(problem: Problem, tape: Tape, mean: Mean = plain_mean) -> list[Vector]:
    theta, velocity, path = problem.start, np.zeros_like(problem.start), []
    for entries in tape:
        parts = [(len(samples), theta - problem.trained(theta, samples)) for _, samples in entries if samples]
        if len(parts) == 1:  # adopted whole
            theta = theta - parts[0][1]
        else:
            moved = mean(parts)
            velocity = problem.mu * velocity + moved
            theta = theta - problem.eta * (moved + problem.mu * velocity)
        path.append(theta)
    return path


def sparse(problem: Problem, tape: Tape) -> list[Vector]:
    """Of 21 values one is kept, in 32nds of the power of two above it, at most 31; the carry decays by 0.95."""
    theta, path = problem.start, []
    carries: dict[str, Vector] = {}
    for entries in tape:
        parts = []
        for site, samples in entries:
            if not samples:
                continue
            carry = 0.95 * carries.get(site, np.zeros_like(theta)) + theta - problem.trained(theta, samples)
            sent = np.zeros_like(theta)
            place = int(np.argmax(np.abs(carry)))
            unit = 2.0 ** np.ceil(np.log2(abs(carry[place])))
            sent[place] = np.sign(carry[place]) * min(round(32 * abs(carry[place]) / unit), 31) / 32 * unit
            carries[site] = carry - sent
            parts.append((len(samples), sent))
        theta = theta - plain_mean(parts)
        path.append(theta)
    return path


def streaming(problem: Problem, tape: Tape, *, groups: int, fragment: int, overlap: int, mixing: float) -> list[Vector]:
    """Every site's inner parameters are followed; a round is applied `overlap` steps into the next block."""
    theta, velocity, path = problem.start.copy(), np.zeros_like(problem.start), []
    sites = sorted({site for entries in tape for site, _ in entries})
    inner = {site: problem.start.copy() for site in sites}
    flight: tuple[npt.NDArray[np.bool_], list[tuple[int, Vector]]] | None = None
    weight: dict[str, int] = {}
    turn = (np.arange(theta.size) // fragment) % groups

    def land() -> None:
        nonlocal theta, velocity, flight
        if flight is None:
            return
        mask, parts = flight
        flight = None
        theta, velocity = landed(problem, theta, velocity, mask, parts)
        inner.update({site: np.where(mask, mixing * x + (1 - mixing) * theta, x) for site, x in inner.items()})
        path.append(theta.copy())

    for number, entries in enumerate(tape):
        steps = {site: list(problem.batches(samples)) for site, samples in entries}
        for step in range(max(map(len, steps.values()))):
            working = {site: batches[step] for site, batches in steps.items() if step < len(batches)}
            inner.update({site: problem.trained(inner[site], batch) for site, batch in working.items()})
            if step + 1 == overlap:
                land()
        land()
        mask = turn == number % groups
        for site, samples in entries:
            weight[site] = len(samples) or weight[site]
        flight = mask, [(weight[site], np.where(mask, theta - inner[site], 0)) for site, _ in entries]
        if overlap == 0:
            land()
    land()
    return path


def landed(
    problem: Problem, theta: Vector, velocity: Vector, mask: npt.NDArray[np.bool_], parts: list[tuple[int, Vector]]
) -> tuple[Vector, Vector]:
    """One fragment's outer step; a lone contribution is adopted whole."""
    if len(parts) == 1:
        return theta - np.where(mask, parts[0][1], 0), velocity
    moved = plain_mean(parts)
    velocity = np.where(mask, problem.mu * velocity + moved, velocity)
    return np.where(mask, theta - problem.eta * (moved + problem.mu * velocity), theta), velocity


def neighbour(problem: Problem, tape: Tape, sites: list[str]) -> dict[str, list[Vector]]:
    """On a ring; returns each site's own trajectory."""
    x = dict.fromkeys(sites, problem.start)
    paths: dict[str, list[Vector]] = {site: [] for site in sites}
    for entries in tape:
        here = [site for site, samples in entries if samples]
        moved = {site: problem.trained(x[site], samples) for site, samples in entries if samples}
        for place, site in enumerate(here):
            around = {here[place - 1], here[(place + 1) % len(here)]} - {site}
            share = 1 / (len(around) + 1)
            x[site] = moved[site] + share * sum(moved[other] - moved[site] for other in sorted(around))
        for site, _ in entries:
            paths[site].append(x[site])
    return paths


def delayed_nesterov(problem: Problem, tape: Tape, *, delay: int) -> list[Vector]:
    """One entry a round. A site starts from the state after its own last entry, however many rounds ago."""
    theta, velocity, buffer = problem.start, np.zeros_like(problem.start), np.zeros_like(problem.start)
    path = [theta]
    began: dict[str, int] = {}
    for number, entries in enumerate(tape, start=1):
        for site, samples in entries:
            started = path[began.get(site, 0)]
            arrival = started - problem.trained(started, samples)
            began[site] = number
            theta = theta - problem.eta * arrival / delay
            buffer = buffer + arrival
        if number % delay == 0:
            velocity = problem.mu * velocity + buffer / delay
            theta = theta - problem.eta * problem.mu * velocity
            buffer = np.zeros_like(buffer)
        path.append(theta)
    return path[1:]
