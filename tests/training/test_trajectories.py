"""Golden trajectories: every strategy, with one site killed on the way, against tests/training/reference.py.

The runtime works in float32 and in fragments, with real sessions, codecs and rounds; the reference in float64 from the formulas. They
must agree after every round. `GOLDEN` are the norms of the last state, so that a change of both is seen too.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.training import reference
from tests.training.memory_log import MemoryLog
from tests.training.reference import Problem, Tape, Vector
from tests.training.small_job import Points, Site, seats, site
from training.dealing import items
from training.session import Session

SITES = ("ams", "bern", "oslo")
# 21 blocks of 12 samples: 9 before the crash, and the rest shared evenly by two, so that no block is done twice.
SAMPLES, RATE, BATCH = 252, 0.1, 4
PLAN = {"samples": SAMPLES, "outer_learning_rate": 0.6, "outer_momentum": 0.5}
GOLDEN = {
    "every_step": 4.467180350769843,
    "diloco": 4.718220996988766,
    "sparse": 3.6394070540604053,
    "quorum": 4.835668881760596,
    "streaming": 4.503292789281101,
}


def linear() -> nn.Module:
    module = nn.Linear(reference.INPUTS, reference.OUTPUTS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in module.parameters():
            each.copy_(torch.randn(each.shape, generator=generator) / 4)
    return module


def problem() -> Problem:
    points = Points()
    order = items(range(SAMPLES), length=len(points), seed=5)
    return Problem(
        inputs=points.inputs[order].double().numpy(),
        targets=points.targets[order].double().numpy(),
        start=flat(linear()),
        rate=RATE,
        batch=BATCH,
        eta=0.6,
        mu=0.5,
    )


def flat(module: nn.Module) -> Vector:
    return np.concatenate([each.detach().double().numpy().reshape(-1) for each in module.parameters()])


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=RATE)


def outer(session: Session, name: str = "theta") -> Vector:
    assert session._synchronizer is not None
    owned = session._synchronizer.share.owned
    return np.concatenate([getattr(owned[number], name) for number in sorted(owned)]).astype(np.float64)


class Run:
    """Three sites over a log in memory, of which `oslo` dies in its third block; and the theta of `ams` by round."""

    def __init__(
        self,
        folder: Path,
        names: tuple[str, ...] = SITES,
        *,
        fragment_elements: int = 32,
        quorum: int | None = None,
        in_turn: bool = False,
        killed: bool = True,
        **plan: Any,
    ) -> None:
        """Run; `in_turn` lets one after the other enter a block, once all have one, so that each begins the next where
        the reference says: with its own last entry, not with what a busy machine let the others enter meanwhile.
        """
        self.log = MemoryLog(seats(*names), quorum=quorum)
        self.seen: dict[str, dict[int, Vector]] = {name: {} for name in names}
        self.sites = {name: site(self.log, folder, name, **{**PLAN, **plan}) for name in names}
        for name, each in self.sites.items():
            each.module, each.optimizer, each.fragment_elements = linear(), sgd, fragment_elements
            each.step_hook = self._hook(name)
        self.waiting: set[str] = set()
        self.killed = killed
        self.threads = threads = {
            name: threading.Thread(target=each.run, daemon=True) for name, each in self.sites.items()
        }
        if in_turn:
            for name, each in self.sites.items():
                each.exchange.before_commit = lambda _, name=name: self._await_turn(name)
        for thread in threads.values():
            thread.start()
        if killed:
            threads["oslo"].join(30)
            self.log.remove("oslo")
        for name in sorted({*names} - ({"oslo"} if killed else set())):
            threads[name].join(30)
            assert self.sites[name].error is None, self.sites[name].error
            self.seen[name][self.session(name).rounds] = outer(self.session(name))

    def _hook(self, name: str) -> Any:
        def look(session: Session) -> None:
            self.seen[name].setdefault(session.rounds, outer(session))
            if self.killed and name == "oslo" and session.rounds >= 3:
                raise RuntimeError("killed")

        return look

    def _await_turn(self, name: str) -> None:
        """Wait until every other site has a block to enter too, or none left, and then for this one's turn."""
        asked_s = time.monotonic()
        with self.log.condition:
            self.waiting.add(name)
            while not self._is_turn(name, time.monotonic() - asked_s):
                self.log.condition.wait(0.01)  # a thread that ends tells nobody
            self.waiting.remove(name)

    def _is_turn(self, name: str, waited_s: float) -> bool:
        newest = self.log.sealed.get(self.log.newest())
        last = "" if newest is None else newest.entries[0].site_id
        # In the order of names, beginning after the one that entered last.
        order = sorted(self.threads, key=lambda each: (each <= last, each))
        mine = next(each for each in order if each in self.waiting) == name
        return mine and all(self._has_asked(other, waited_s) for other in order if other != name)

    def _has_asked(self, name: str, waited_s: float) -> bool:
        entered = max((n for n, each in self.log.sealed.items() if each.entries[0].site_id == name), default=0)
        if name in self.waiting or not self.threads[name].is_alive() or waited_s > 20:
            return True
        # One that has nothing left to train asks no more.
        return waited_s > 1.5 and name in self.log.applied.get(entered, {})

    def session(self, name: str) -> Session:
        each: Site = self.sites[name]
        assert each.session is not None
        return each.session

    def tape(self) -> Tape:
        def numbers(entry: Any) -> list[int]:
            return [number for each in entry.samples for number in range(each.start, each.stop)]

        return [
            [(entry.site_id, numbers(entry)) for entry in self.log.sealed[number].entries]
            for number in sorted(self.log.sealed)
        ]

    def follows(self, path: list[Vector], name: str = "ams") -> float:
        """Assert that a site began a block after nearly every round, and stood where the reference says."""
        assert len(self.seen[name]) > len(path) // 2, "a site looks at nearly every round"
        return self.agrees(path, name)

    def agrees(self, path: list[Vector], name: str) -> float:
        """Assert that a site stood where the reference says after each round that it began a block after."""
        assert self.log.hashes_agree()
        found = self.seen[name]
        for number, theta in found.items():
            expected = path[number - 1] if number else problem().start
            assert np.allclose(theta, expected, rtol=2e-5, atol=2e-6), f"after round {number}"
        return float(np.linalg.norm(path[-1]))


def test_every_step(tmp_path: Path) -> None:
    found = Run(tmp_path, strategy="every_step", period_steps=1, codec="fp32")
    assert {site_id for site_id, _ in found.tape()[2]} == set(SITES)
    assert {site_id for site_id, _ in found.tape()[3]} == {"ams", "bern"}, "the crash is in the tape"
    path = reference.every_step(problem(), found.tape())
    assert np.allclose(flat(found.sites["ams"].module), path[-1], rtol=2e-5, atol=2e-6)
    assert found.follows(path) == pytest.approx(GOLDEN["every_step"], rel=1e-9)


def test_diloco(tmp_path: Path) -> None:
    found = Run(tmp_path, strategy="diloco", period_steps=3, codec="fp32")
    assert found.follows(reference.diloco(problem(), found.tape())) == pytest.approx(GOLDEN["diloco"], rel=1e-9)


def test_sparse(tmp_path: Path) -> None:
    plan = {"outer_learning_rate": 0.7, "outer_momentum": 0.9}  # the plan's defaults mean a plain step
    found = Run(tmp_path, strategy="sparse", period_steps=3, codec="topk2", **plan)
    assert found.follows(reference.sparse(problem(), found.tape())) == pytest.approx(GOLDEN["sparse"], rel=1e-9)


def test_quorum(tmp_path: Path) -> None:
    found = Run(tmp_path, strategy="quorum", period_steps=3, codec="fp32")
    path = reference.diloco(problem(), found.tape(), reference.radial_mean)
    assert found.follows(path) == pytest.approx(GOLDEN["quorum"], rel=1e-9)


@pytest.mark.parametrize(("overlap", "mixing"), [(0, 0.0), (1, 0.0), (2, 0.5)])
def test_streaming(tmp_path: Path, overlap: int, mixing: float) -> None:
    plan = {"period_steps": 6, "fragments": 2, "overlap_steps": overlap, "mixing": mixing, "codec": "fp32"}
    found = Run(tmp_path, strategy="streaming", fragment_elements=8, **plan)
    path = reference.streaming(problem(), found.tape(), groups=2, fragment=8, overlap=overlap, mixing=mixing)
    last = found.follows(path)
    if overlap == 1:
        assert last == pytest.approx(GOLDEN["streaming"], rel=1e-9)


def test_neighbour(tmp_path: Path) -> None:
    names = (*SITES, "paris", "rome")
    found = Run(tmp_path, names, strategy="neighbour", period_steps=3, codec="fp32", topology="ring")
    paths = reference.neighbour(problem(), found.tape(), list(names))
    for name in ("ams", "bern", "paris", "rome"):
        found.follows(paths[name], name)
    assert len(paths["oslo"]) == 3
    assert not np.allclose(paths["ams"][2], paths["bern"][2], rtol=1e-3), "each site has parameters of its own"


def test_async(tmp_path: Path) -> None:
    """Arrivals in turn. Nobody is killed here: what is dealt anew while a block is under way depends on the moment."""
    found = Run(
        tmp_path, strategy="async", period_steps=3, codec="fp32", quorum=1, nesterov_delay=3, in_turn=True, killed=False
    )
    tape = found.tape()
    assert all(len(entries) == 1 for entries in tape)
    assert {site_id for entries in tape for site_id, _ in entries} == {"ams", "bern", "oslo"}
    done: set[int] = set()
    for entries in tape:
        for _, samples in entries:
            assert samples
            assert not done & set(samples), "this run has no overlap at its end; the reference knows of none"
            done |= set(samples)
    assert len(found.seen["ams"]) > len(tape) // 4, "of three sites, each begins about a third of the blocks"
    found.agrees(reference.delayed_nesterov(problem(), tape, delay=3), "ams")


def test_alone_no_strategy_changes_what_the_optimizer_does(tmp_path: Path) -> None:
    """M = 1 is a no-op: one site's outer parameters are those of the plain loop, bit for bit where nothing is scaled."""
    module, points = linear(), Points()
    optimizer = sgd(module)
    for start in range(0, SAMPLES, BATCH):
        batch = items(range(start, start + BATCH), length=len(points), seed=5)
        torch.nn.functional.mse_loss(module(points.inputs[batch]), points.targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for strategy, steps in (("every_step", 1), ("diloco", 3), ("quorum", 3), ("neighbour", 3)):
        log = MemoryLog(seats("ams"))
        lone = site(log, tmp_path / strategy, "ams", **PLAN, strategy=strategy, period_steps=steps, codec="fp32")
        lone.module, lone.optimizer = linear(), sgd
        lone.run()
        assert lone.error is None
        difference = float(np.abs(flat(lone.module) - flat(module)).max())
        # theta - (theta - theta_m) is rounded twice a round; gradients are not touched at all.
        assert difference == 0.0 if strategy == "every_step" else difference < 1e-6, strategy
