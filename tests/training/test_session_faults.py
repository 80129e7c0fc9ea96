"""Sites that die, come late, send garbage or join: what the others keep, and what returns to a carry."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.memory_log import MemoryExchange, MemoryLog
from tests.training.small_job import SAMPLES, Site, run, seats, site
from training.codecs import decode
from training.errors import CodecError, ExchangeError
from training.exchange import MemberSeat, SampleRange, SealedRound
from training.roundlog.errors import ExchangeRefusedError, Reason
from training.session import Session


class SiteKilledError(Exception):
    """Stands for SIGKILL in a site that is a thread."""


def sealed_numbers(log: MemoryLog) -> list[int]:
    return [
        number
        for sealed in log.sealed.values()
        for entry in sealed.entries
        for each in entry.samples
        for number in range(each.start, each.stop)
    ]


def start(each: Site) -> threading.Thread:
    thread = threading.Thread(target=each.run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("moment", ["while training", "after posting"])
def test_a_dead_sites_samples_are_dealt_again_to_the_survivor(tmp_path: Path, moment: str) -> None:
    log = MemoryLog(seats("ams", "oslo"))
    survivor, victim = site(log, tmp_path, "ams"), site(log, tmp_path, "oslo")

    def die(session: Session) -> None:
        if session.rounds == 2:
            raise SiteKilledError

    def die_before_commit(number: int) -> None:
        if number == 3:
            raise SiteKilledError

    if moment == "while training":
        victim.step_hook = die
    else:
        victim.exchange.before_commit = die_before_commit
    threads = [start(survivor), start(victim)]
    threads[1].join(30)
    assert isinstance(victim.error, SiteKilledError)
    log.remove("oslo")
    threads[0].join(30)
    assert survivor.error is None
    assert sorted(sealed_numbers(log)) == list(range(SAMPLES))
    assert survivor.session is not None
    assert survivor.session.samples_done == SAMPLES
    assert [entry.site_id for entry in log.sealed[3].entries] == ["ams"]


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk2"])
def test_a_late_contribution_returns_to_its_carry_and_its_samples_are_not_done(tmp_path: Path, codec: str) -> None:
    log = MemoryLog(seats("ams", "oslo"), excluded=lambda number, name: (number, name) == (2, "oslo"))
    first, late = site(log, tmp_path, "ams", codec=codec), site(log, tmp_path, "oslo", codec=codec)
    seen: list[float] = []

    def look(session: Session) -> None:
        share = session._synchronizer.share
        if session.rounds == 2:
            seen.append(share.carry_norm())

    late.step_hook = look
    run(first, late)
    assert log.hashes_agree()
    assert sorted(sealed_numbers(log)) == list(range(SAMPLES))
    assert seen[0] > 1e-3
    assert late.session is not None
    assert late.session._totals.rounds_missed == 1
    if codec == "fp32":
        assert late.session._synchronizer.share.carry_norm() == 0, "the next round took it along"


def test_what_a_late_site_learned_arrives_with_its_next_contribution(tmp_path: Path) -> None:
    """In fp32: what round 2 left out is in what round 3 posts, to the bit."""
    log = MemoryLog(seats("ams", "oslo"), excluded=lambda number, name: (number, name) == (2, "oslo"))
    late = site(log, tmp_path, "oslo")
    moved: dict[int, np.ndarray] = {}

    def look(session: Session) -> None:
        owned = session._synchronizer.share.owned[0]
        moved[session.rounds + 1] = owned.theta - session._synchronizer.share.parameters.read(owned.fragment)

    def before_commit(number: int) -> None:
        look(late.session)

    late.exchange.before_commit = before_commit
    run(site(log, tmp_path, "ams"), late)

    def posted(number: int) -> np.ndarray:
        return decode(log.contributions[number]["oslo"].fragments[0], moved[number].size)

    assert np.array_equal(posted(2), moved[2])
    assert np.array_equal(posted(3), moved[3] + moved[2])


def test_a_blob_that_does_not_decode_weighs_nothing_at_any_site(tmp_path: Path) -> None:
    def tamper(number: int, name: str, fragment: int, payload: bytes) -> bytes:
        return payload[:-1] if (number, name, fragment) == (2, "oslo", 1) else payload

    log = MemoryLog(seats("ams", "oslo"), tamper=tamper)
    first, second = site(log, tmp_path, "ams"), site(log, tmp_path, "oslo")
    run(first, second)
    assert log.hashes_agree()
    for each in (first, second):
        assert each.session is not None
        assert each.session.samples_done == SAMPLES
        assert each.session.rounds == SAMPLES // 16 + 1, "its samples were dealt once more"


def test_an_entry_that_claims_done_samples_weighs_nothing(tmp_path: Path) -> None:
    class Greedy(MemoryExchange):
        def commit(self, round_number: int, *, samples: tuple[SampleRange, ...], **rest: object) -> None:
            claimed = (SampleRange(0, 8),) if round_number == 2 else samples
            super().commit(round_number, samples=claimed, **rest)

    log = MemoryLog(seats("ams", "oslo"))
    first, greedy = site(log, tmp_path, "ams"), site(log, tmp_path, "oslo")
    greedy.exchange = Greedy(log, "oslo")
    run(first, greedy)
    assert log.hashes_agree()
    assert greedy.session is not None
    assert greedy.session._totals.rounds_missed == 1
    assert greedy.session.samples_done == SAMPLES


def test_a_refused_contribution_is_no_error(tmp_path: Path) -> None:
    """The hub sealed without us just before we posted: the round goes on, the work waits."""
    log = MemoryLog(seats("ams", "oslo"))
    first, late = site(log, tmp_path, "ams"), site(log, tmp_path, "oslo")

    def sealed_without_us(number: int) -> None:
        if number == 2:
            with log.condition:
                log.wait_for(lambda: "ams" in log.contributions.get(2, {}))
                log._seal(2, log.contributions[2])
                log.condition.notify_all()

    late.exchange.before_commit = sealed_without_us
    run(first, late)
    assert [entry.site_id for entry in log.sealed[2].entries] == ["ams"]
    assert log.hashes_agree()
    assert sorted(sealed_numbers(log)) == list(range(SAMPLES))


def test_any_other_refusal_is_an_error(tmp_path: Path) -> None:
    def refuse(number: int) -> None:
        raise ExchangeRefusedError(Reason.TOO_LARGE, "more than the job allows")

    log = MemoryLog(seats("ams"))
    lone = site(log, tmp_path, "ams")
    lone.exchange.before_commit = refuse
    with pytest.raises(ExchangeRefusedError, match="more than the job allows"):
        run(lone)


def test_a_site_that_joins_by_snapshot_agrees_from_its_first_round(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams"))
    first = site(log, tmp_path, "ams", samples=240)
    arrived = threading.Event()

    def wait_for_the_joiner(session: Session) -> None:
        if session.rounds == 3 and not arrived.is_set():
            log.add(MemberSeat("oslo", 1, 1))
            arrived.set()

    first.step_hook = wait_for_the_joiner
    thread = start(first)
    assert arrived.wait(30)
    joiner = site(log, tmp_path, "oslo", samples=240)
    run(joiner)
    thread.join(30)
    assert first.error is None
    assert log.hashes_agree()
    assert min(number for number, by_site in log.applied.items() if "oslo" in by_site) == 4
    assert sorted(sealed_numbers(log)) == list(range(240))
    for mine, theirs in zip(first.module.parameters(), joiner.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_site_whose_state_left_the_chain_comes_back_by_snapshot_with_its_work(tmp_path: Path) -> None:
    class Astray(MemoryExchange):
        sent_away = False

        def await_sealed(self, round_number: int) -> SealedRound:
            sealed = super().await_sealed(round_number)
            if round_number == 2 and not self.sent_away:
                self.sent_away = True
                self.log.joiners.add("oslo")
                self.log.wait_for(lambda: self.log.snapshot is not None and self.log.snapshot[0] >= 2)
                raise ExchangeRefusedError(Reason.SNAPSHOT_NEEDED, "another hash")
            return sealed

    log = MemoryLog(seats("ams", "oslo"), excluded=lambda number, name: (number, name) == (2, "oslo"))
    first, astray = site(log, tmp_path, "ams"), site(log, tmp_path, "oslo")
    astray.exchange = Astray(log, "oslo")
    norms: list[float] = []
    astray.step_hook = lambda session: norms.append(session._synchronizer.share.carry_norm())
    run(first, astray)
    assert astray.exchange.sent_away
    assert log.hashes_agree()
    assert max(norms) > 1e-3, "its unsealed work waited in the carry"
    assert sorted(sealed_numbers(log)) == list(range(SAMPLES))


def test_a_log_that_stays_silent_ends_the_session_with_an_exchange_error(tmp_path: Path) -> None:
    class Silent(MemoryExchange):
        def await_sealed(self, round_number: int) -> SealedRound:
            message = f"the seal of round {round_number} did not come"
            raise ExchangeError(message)

    log = MemoryLog(seats("ams", "oslo"))
    lone = site(log, tmp_path, "ams")
    lone.exchange = Silent(log, "ams")
    with pytest.raises(ExchangeError, match="did not come"):
        run(lone)
    assert not (tmp_path / "ams/output/summary.json").exists()


def test_a_diverged_model_is_refused_before_it_reaches_other_sites(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams"))
    lone = site(log, tmp_path, "ams")

    def diverge(session: Session) -> None:
        with torch.no_grad():
            next(lone.module.parameters()).fill_(float("nan"))

    lone.step_hook = diverge
    with pytest.raises(CodecError, match="NaN, infinite or huge"):
        run(lone)
    assert not log.sealed
