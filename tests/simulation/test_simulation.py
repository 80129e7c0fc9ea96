"""Some seeds of the fault simulator, and the proof that a seed replays exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from broker import attempts, views
from broker.database.tables import Lease
from broker.market import Market
from tests.simulation.founding import make_template
from tests.simulation.seeds import run_seed
from tests.simulation.world import Faults, World
from training.roundlog.view import GENESIS_HASH, ViewReport

# As many as take about a minute of one core: the same on every machine, however busy. New ones are `make soak`'s.
SEEDS = 8
SEEDS_PER_TEST = 2
STEPS = 250


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(1, SEEDS + 1, SEEDS_PER_TEST))
def test_no_seed_breaks_an_invariant(template: Path, first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        outcome = run_seed(seed, STEPS, template)
        assert not outcome.failure, f"replay with: python -m tests.simulation --seed {seed} --trace\n{outcome.failure}"


@pytest.mark.timeout(240)
def test_a_seed_replays_exactly(template: Path) -> None:
    first = run_seed(7, STEPS, template, tell=True)
    second = run_seed(7, STEPS, template, tell=True)
    assert first.story == second.story
    assert len(first.story) > 20


@pytest.mark.timeout(240)
def test_without_faults_every_job_ends_without_a_lost_attempt(template: Path, tmp_path: Path) -> None:
    world = World(3, tmp_path, template, Faults(0, 0, 0, 0, 0, 0, 0, 0, 0.0001, 0), tell=True)
    world.run(400)
    world.close()
    assert not [line for line in world.story.lines if "crashed" in line]
    assert [line for line in world.story.lines if "starts lease" in line]


@pytest.mark.timeout(240)
def test_the_simulator_sees_a_view_that_forgets_a_sealed_round(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Break the promise that the highest report is the base of the next view.
    def forgetful(session: Session, market: Market, lease: Lease, report: ViewReport) -> list[str]:
        nothing = report.model_copy(update={"sealed_round": 0, "chain_hash": GENESIS_HASH})
        return views.take_promise(session, market, lease, nothing)

    monkeypatch.setattr(attempts, "take_promise", forgetful)
    with pytest.raises(AssertionError, match="forgets round"):
        _run_seeds(range(1, 40), template, tmp_path)


def _run_seeds(seeds: range, template: Path, tmp_path: Path) -> None:
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        world = World(seed, folder, template)
        try:
            for _ in range(600):
                world.step()
        finally:
            world.close()
