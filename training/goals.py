"""Choose a configuration for a goal, among those whose speed is predicted: in time, within a budget, or best value.

Speeds are samples that count (`training.goodput`). A goal is held against the careful end of a prediction: a deadline
must be met with a stated chance, a budget at the speed that the market values. Pure; `broker.advice` lists the options.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

from training.speeds import VALUED_QUANTILE, chance_within

# A configuration meets a deadline if it does so for as many runs as the market's valued quantile says.
CHANCE_MIN: Final = 1 - VALUED_QUANTILE
_SECONDS_PER_HOUR: Final = 3600
_NINE_OF_TEN: Final = NormalDist().inv_cdf(0.95)


class Goal(enum.StrEnum):
    """What a tenant wants of its job."""

    DEADLINE = "deadline"
    BUDGET = "budget"
    VALUE = "value"


@dataclass(frozen=True, slots=True)
class Option:
    """One configuration: samples that count per second (the middle of its interval), and its price."""

    name: str
    samples_per_s: float
    half_width_log: float
    price_micros_per_hour: int

    @property
    def careful_samples_per_s(self) -> float:
        """The speed at the quantile that the market values."""
        return self.samples_per_s * math.exp(NormalDist().inv_cdf(VALUED_QUANTILE) * self.half_width_log / _NINE_OF_TEN)

    def total_micros(self, samples: float, speed: float | None = None) -> float:
        """Return what the samples cost at the middle speed, or at another."""
        return self.price_micros_per_hour * samples / (speed or self.samples_per_s) / _SECONDS_PER_HOUR


@dataclass(frozen=True, slots=True)
class Wanted:
    """A goal and its figure: the time left, the credits, or what a million samples are worth."""

    goal: Goal
    samples: float
    seconds: float | None = None
    budget_micros: int | None = None
    bid_micros_per_million: int | None = None

    def __post_init__(self) -> None:
        """Require the goal's own figure."""
        needed = {Goal.DEADLINE: self.seconds, Goal.BUDGET: self.budget_micros, Goal.VALUE: self.bid_micros_per_million}
        if needed[self.goal] is None:
            message = f"the goal {self.goal} needs its figure: a deadline, a budget or a bid"
            raise ValueError(message)

    def chance(self, option: Option) -> float:
        """Return the probability that an option is done in time; 1 without a time."""
        if self.seconds is None:
            return 1.0
        return chance_within(self.samples / option.samples_per_s, self.seconds, option.half_width_log)

    def surplus_micros_per_hour(self, option: Option) -> float:
        """Return what an hour of an option is worth by the bid beyond its price, at the speed that the market values."""
        worth = option.careful_samples_per_s * _SECONDS_PER_HOUR * (self.bid_micros_per_million or 0) / 1e6
        return worth - option.price_micros_per_hour


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen option's place among those given, whether it reaches the goal, and why it, in a sentence."""

    place: int
    reached: bool
    why: str


def choose(options: Sequence[Option], wanted: Wanted) -> Choice | None:
    """Return the best option for a goal; None without any.

    In time: the cheapest of those that are in time with the chance CHANCE_MIN, else the one with the best chance. Within a budget:
    the fastest whose cost at its careful speed fits, else the cheapest. Best value: the most surplus an hour. Ties
    go to the cheaper, then to the first by name.
    """
    if not options:
        return None
    rule = {Goal.DEADLINE: _in_time, Goal.BUDGET: _within_budget, Goal.VALUE: _best_value}[wanted.goal]
    return rule(options, wanted)


def _least(options: Sequence[Option], key: list[tuple[float, ...]]) -> int:
    return min(range(len(options)), key=lambda place: (key[place], options[place].name))


def _in_time(options: Sequence[Option], wanted: Wanted) -> Choice:
    chances = [wanted.chance(option) for option in options]
    costs = [option.total_micros(wanted.samples) for option in options]
    timely = [place for place, chance in enumerate(chances) if chance >= CHANCE_MIN]
    if not timely:
        best = _least(options, [(-chance, cost) for chance, cost in zip(chances, costs, strict=True)])
        why = f"none is in time with a chance of {CHANCE_MIN:.0%}; this one has the best, {chances[best]:.0%}"
        return Choice(best, reached=False, why=why)
    late = [(math.inf, 0.0)] * len(options)
    best = _least(options, [(costs[p], -chances[p]) if p in set(timely) else late[p] for p in range(len(options))])
    cheaper = [place for place in range(len(options)) if costs[place] < costs[best]]
    why = f"the cheapest of {len(timely)} that are in time with a chance of {CHANCE_MIN:.0%}; its own is {chances[best]:.0%}"
    if cheaper:
        nearest = max(cheaper, key=lambda place: chances[place])
        why += f". {options[nearest].name} would cost {_share(costs[nearest], costs[best])} less, with a chance of {chances[nearest]:.0%}"
    return Choice(best, reached=True, why=why)


def _within_budget(options: Sequence[Option], wanted: Wanted) -> Choice:
    assert wanted.budget_micros is not None
    careful = [option.total_micros(wanted.samples, option.careful_samples_per_s) for option in options]
    fits = [cost <= wanted.budget_micros for cost in careful]
    if not any(fits):
        best = _least(options, [(cost,) for cost in careful])
        short = careful[best] / wanted.budget_micros
        return Choice(best, reached=False, why=f"none fits; this one costs least, {short:.2f} times the budget")
    best = _least(
        options,
        [(-o.samples_per_s, c) if fit else (math.inf, c) for o, c, fit in zip(options, careful, fits, strict=True)],
    )
    faster = [place for place, option in enumerate(options) if option.samples_per_s > options[best].samples_per_s]
    why = f"the fastest of {sum(fits)} that fit; it takes {careful[best] / wanted.budget_micros:.0%} of the budget"
    if faster:
        nearest = min(faster, key=lambda place: careful[place])
        why += (
            f". {options[nearest].name} would be faster, at {careful[nearest] / wanted.budget_micros:.0%} of the budget"
        )
    return Choice(best, reached=True, why=why)


def _best_value(options: Sequence[Option], wanted: Wanted) -> Choice:
    surplus = [wanted.surplus_micros_per_hour(option) for option in options]
    costs = [option.total_micros(wanted.samples, option.careful_samples_per_s) for option in options]
    if max(surplus) <= 0:
        best = _least(options, [(cost,) for cost in costs])
        return Choice(best, reached=False, why="the bid is worth less than any price; this one costs least a sample")
    best = _least(options, [(-each, cost) for each, cost in zip(surplus, costs, strict=True)])
    others = [place for place in range(len(options)) if place != best]
    why = f"an hour of it is worth {surplus[best] / 1e6:.4g} credits more than its price"
    if others:
        second = max(others, key=lambda place: surplus[place])
        why += f"; of {options[second].name}, the next, {surplus[second] / 1e6:.4g}"
    return Choice(best, reached=True, why=why)


def _share(less: float, more: float) -> str:
    return f"{1 - less / more:.0%}"
