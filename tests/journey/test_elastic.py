"""Real processes, real moves: a job grows when its competitor ends, and loses one of its sites without stopping."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import pytest
from sqlalchemy import select

from broker.database.moves import Move
from broker.demo.world import DemoSite
from tests.journey.market import SETTINGS, Chain, RunningMarket, running_market, samples_in

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

# Terms so short that a price may matter to a job of a minute, and a restart that they pay for.
ELASTIC: Final = {**SETTINGS, "HANSA_TERM_S": "60", "HANSA_RESTART_S": "1"}
SITES: Final = (
    DemoSite("bergen", slots=2, ask_micros_per_slot_hour=600_000, listens=True),
    DemoSite("lubeck", slots=1, ask_micros_per_slot_hour=600_000, listens=True),
    DemoSite("visby", slots=1, ask_micros_per_slot_hour=900_000, listens=True),
    DemoSite("danzig", slots=1, ask_micros_per_slot_hour=2_400_000, listens=True),
)
START_S: Final = 240.0
"""Until the workers of a market that has just started hold their first round, on a busy machine."""


@pytest.fixture(scope="module")
def market(request: pytest.FixtureRequest) -> Iterator[RunningMarket]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HANSA_")]:
            patch.delenv(name)
        with running_market(lambda: request.session.testsfailed > 0, SITES, ELASTIC) as running:
            yield running


def moves(market: RunningMarket, job_id: str) -> list[Move]:
    return market.read(lambda session: list(session.scalars(select(Move).where(Move.job_id == job_id))))


def losses(market: RunningMarket, job_id: str) -> list[tuple[int, int, float]]:
    """Return epoch, sync round and loss of everything that was measured, in order."""
    rows: list[tuple[int, int, float]] = []
    since = None
    while True:
        piece = market.tenant.stream(job_id, "metrics", since=since)
        if not piece["items"]:
            return rows
        rows += [
            (row["epoch"], int(row["round"]), row["loss"]) for row in piece["items"] if row.get("loss") is not None
        ]
        since = piece["next_since"]


def assert_goes_on(market: RunningMarket, job_id: str, epoch: int, left: int) -> None:
    """Assert that the first losses under `epoch` are those of a model at round `left`, not of a fresh one."""
    measured = losses(market, job_id)
    fresh = [loss for at, number, loss in measured if at == 1 and number == 0]
    before = [loss for at, number, loss in measured if at < epoch and left - 4 <= number < left]
    after = [loss for at, number, loss in measured if at == epoch and number <= left + 4]
    assert fresh
    assert before
    assert after
    mean = sum(before) / len(before)
    print(f"loss {fresh[0]:.3f} at first, {mean:.3f} before round {left}, {sum(after) / len(after):.3f} after")  # noqa: T201
    assert sum(after) / len(after) < (mean + fresh[0]) / 2
    assert mean < fresh[0] / 2


def test_a_job_grows_from_one_slot_to_two_when_its_competitor_ends(market: RunningMarket) -> None:
    chain, seconds = Chain(), 90
    rival = market.submit(slots=1, seconds=14, where=["bergen"])
    market.await_true(rival, lambda: market.job(rival).state == "running", START_S)
    market.await_rounds(rival, 1)
    job_id = market.submit(slots=1, most=2, seconds=seconds, sites=1, where=["bergen"], checkpoint_rounds=1000)
    market.await_rounds(job_id, 2, chain)
    assert [lease.gpus for lease in market.leases(job_id)] == [1]
    ranks = market.ranks("bergen")
    market.await_finished(rival, chain)
    market.await_true(job_id, lambda: market.look(chain, job_id) or market.job(job_id).epoch == 2)
    market.await_true(job_id, lambda: market.look(chain, job_id) or len(market.leases(job_id)) > 1)
    first, second = market.leases(job_id)[:2]
    assert (first.gpus, second.gpus) == (1, 2)
    assert second.checkpoint_digest is not None
    market.await_true(job_id, lambda: market.look(chain, job_id) or market.lease(job_id, "bergen").phase == "running")
    assert ranks
    market.await_finished(job_id, chain)
    (move, *_) = moves(market, job_id)
    assert (move.state, move.in_place) == ("done", False)
    # The last checkpoint is of the very round at which it was asked to stop: nothing was done again.
    assert market.placements(job_id)[1].base_round > 0
    assert market.job(job_id).failures == 0
    assert_goes_on(market, job_id, epoch=2, left=market.placements(job_id)[1].base_round)
    print(market.story(job_id))  # noqa: T201
    market.assert_trained_once(job_id, chain, samples_in(seconds, 1))
    market.assert_sound(job_id)


def test_one_site_of_a_spanning_job_is_replaced_while_the_other_trains_on(market: RunningMarket) -> None:
    chain, seconds = Chain(), 90
    job_id = market.submit(slots=2, seconds=seconds, where=["lubeck", "visby", "danzig"], checkpoint_rounds=1000)
    market.await_true(job_id, lambda: market.job(job_id).state == "running", START_S)
    market.await_rounds(job_id, 3, chain)
    assert sorted(lease.site_id for lease in market.leases(job_id)) == ["lubeck", "visby"]
    stayed = market.ranks("visby")
    drained = market.places.home / "sites" / "lubeck" / "draining"
    drained.touch()
    try:
        market.await_true(job_id, lambda: market.look(chain, job_id) or moves(market, job_id))
        market.await_true(job_id, lambda: market.look(chain, job_id) or market.job(job_id).epoch == 2)
        market.await_true(
            job_id,
            lambda: (
                market.look(chain, job_id)
                or [member.site_id for member in market.issued(job_id)[-1].members] == ["danzig", "visby"]
            ),
        )
        joined = market.issued(job_id)[-1]
        assert joined.joining == ("danzig",)
        assert {member.site_id: member.epoch for member in joined.members} == {"danzig": 2, "visby": 1}
        assert market.ranks("visby") == stayed, "the site that stays never stopped"
        lease = market.lease(job_id, "danzig")
        assert lease.heir_of == "lubeck"
        market.await_rounds(job_id, joined.base_round + 3, chain)
        assert market.ranks("visby") == stayed
        # Drained to the end: else the job would move back to the cheaper site once its term is over.
        market.await_finished(job_id, chain)
    finally:
        drained.unlink()
    (move, *_) = moves(market, job_id)
    assert (move.state, move.in_place, move.leaving) == ("done", True, '["lubeck"]')
    assert len(market.placements(job_id)) == 1
    assert market.job(job_id).failures == 0
    assert_goes_on(market, job_id, epoch=2, left=joined.base_round)
    print(market.story(job_id))  # noqa: T201
    market.assert_trained_once(job_id, chain, samples_in(seconds, 2))
    market.assert_sound(job_id)
