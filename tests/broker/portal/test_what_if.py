"""Other asks tried on stored rounds: what comes out is what the solver gives, and nothing of the market changes."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

from broker import what_if as what_if_module
from broker.allocation.clearing import Clearing
from broker.allocation.snapshot import Snapshot
from broker.allocation.solve import clear
from broker.database.tables import Round
from broker.errors import BusyError, NotFoundError, RefusedError
from broker.what_if import sold_by, what_if, with_asks
from pricing.money import format_credits
from tests.broker.portal.conftest import Client
from tests.broker.portal.scene import Scene

pytestmark = pytest.mark.xdist_group("portal")


def first_round(scene: Scene) -> tuple[Snapshot, Clearing]:
    row = scene.market.database.read(lambda session: session.get(Round, 1))
    assert row is not None
    read = scene.market.artifacts.get_bytes
    return Snapshot.from_json(read(row.snapshot_digest)), Clearing.from_json(read(row.clearing_digest))


def test_the_same_asks_sell_what_was_sold(scene: Scene) -> None:
    tried = what_if(scene.market, "bremen", {"cpu-slot": 900_000})
    assert [row.round_number for row in tried.rounds] == sorted(
        (row.round_number for row in tried.rounds), reverse=True
    )
    assert all(row.would_be == row.was for row in tried.rounds)
    _, clearing = first_round(scene)
    assert tried.rounds[-1].was == sold_by(clearing, "bremen")
    assert tried.rounds[-1].was.gpus == 4


def test_an_ask_beyond_every_bid_sells_nothing_new(scene: Scene) -> None:
    tried = what_if(scene.market, "bremen", {"cpu-slot": 10**12})
    assert tried.rounds[-1].round_number == 1
    assert tried.rounds[-1].would_be.gpus == 0
    assert tried.rounds[-1].was.gpus == 4
    assert tried.would_be.gpus < tried.was.gpus


def test_what_comes_out_is_what_the_solver_says_of_the_changed_snapshot(scene: Scene) -> None:
    snapshot, _ = first_round(scene)
    changed = with_asks(snapshot, "bremen", {"cpu-slot": 1_050_000})
    assert [pool.ask_micros_per_gpu_hour for pool in changed.pools if pool.site_id == "bremen"] == [1_050_000]
    assert [pool for pool in changed.pools if pool.site_id != "bremen"] == [
        pool for pool in snapshot.pools if pool.site_id != "bremen"
    ]
    tried = what_if(scene.market, "bremen", {"cpu-slot": 1_050_000})
    assert tried.rounds[-1].would_be == sold_by(clear(changed), "bremen")


def test_a_curve_keeps_its_shape(scene: Scene) -> None:
    snapshot, _ = first_round(scene)
    pool = next(pool for pool in snapshot.pools if pool.site_id == "bremen")
    steps = ({"gpus": 1, "ask_micros_per_gpu_hour": 1_000_000},)
    curved = snapshot.model_copy(
        update={"pools": (type(pool).model_validate(pool.model_dump() | {"ask_steps": steps}),)}
    )
    changed = with_asks(curved, "bremen", {"cpu-slot": 1_400_000}).pools[0]
    assert [step.ask_micros_per_gpu_hour for step in changed.ask_steps] == [1_500_000]
    type(pool).model_validate(changed.model_dump())


def test_time_is_bounded_and_what_was_left_out_is_said(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    row = scene.market.database.read(lambda session: session.get(Round, 1))
    assert row is not None
    asks = {"cpu-slot": 911_111}
    whole = what_if_module._solved(scene.market, "bremen", asks, [row, row])
    assert (len(whole.rounds), whole.skipped, whole.cut) == (2, 0, False)
    monkeypatch.setattr(what_if_module, "SECONDS_MAX", 0.0)
    short = what_if_module._solved(scene.market, "bremen", asks, [row, row])
    assert (len(short.rounds), short.skipped, short.cut) == (1, 0, True)
    monkeypatch.setattr(what_if_module, "JOBS_MAX", 0)
    none = what_if_module._solved(scene.market, "bremen", asks, [row, row])
    assert (none.rounds, none.skipped, none.cut) == ((), 2, False)


def test_an_answer_holds_the_sites_own_sales_and_nothing_of_its_buyers(
    scene: Scene, client_of: dict[str, Client]
) -> None:
    tried = what_if(scene.market, "bremen", {"cpu-slot": 1_050_000})
    assert set(asdict(tried)) == {"asks", "rounds", "skipped", "cut"}
    for row in asdict(tried)["rounds"]:
        assert set(row) == {"round_number", "was", "would_be"}
        assert set(row["was"]) == set(row["would_be"]) == {"gpus", "payout_micros_per_hour"}
    olga = client_of["olga"]
    answer = olga.client.post("/site/ask", data={"form_token": olga.form_token, "step": "try", "ask-cpu-slot": "1.05"})
    assert answer.status_code == 200
    told = answer.text.split('aria-label="At these asks"')[1].split("</section>")[0]
    assert "Round by round" in told
    snapshot, _ = first_round(scene)
    assert snapshot.jobs
    secrets = {job.job_id for job in snapshot.jobs} | set(scene.jobs.values()) | set(scene.jobs) - {"queued"}
    secrets |= {site.site_id for site in snapshot.sites} - {"bremen"} | {"ada@", "bob@"}
    for job in snapshot.jobs:
        secrets |= {format_credits(job.bid_micros_per_million_samples), format_credits(job.hold_left_micros)}
        secrets |= {str(job.bid_micros_per_million_samples), str(job.hold_left_micros)}
    figures = {format_credits(sold.payout_micros_per_hour) for row in tried.rounds for sold in (row.was, row.would_be)}
    figures |= {format_credits(tried.was.payout_micros_per_hour), format_credits(tried.would_be.payout_micros_per_hour)}
    words = set(re.split(r"[\s<>,;]+", told))
    assert not {secret for secret in secrets if secret in words} - figures


def test_one_question_at_a_time(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(what_if_module, "WAIT_S", 0.01)
    with what_if_module._solving, pytest.raises(BusyError, match="ask again"):
        what_if(scene.market, "bremen", {"cpu-slot": 922_222})


def test_what_makes_no_sense_is_refused(scene: Scene) -> None:
    with pytest.raises(NotFoundError):
        what_if(scene.market, "atlantis", {"cpu-slot": 1})
    with pytest.raises(RefusedError, match="offers no H100"):
        what_if(scene.market, "bremen", {"H100": 1})
    with pytest.raises(RefusedError, match="below nought"):
        what_if(scene.market, "bremen", {"cpu-slot": -1})
