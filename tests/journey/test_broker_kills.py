"""Processes of the broker are killed with SIGKILL in mid-journey: the journey is delayed, and nothing else changes."""

from __future__ import annotations

import socket
import time

import pytest

from broker.demo.processes import HOST
from tests.journey.market import LIVENESS_S, Chain, RunningMarket, samples_in
from tests.sites.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

SECONDS = 24.0
ROUNDS_WITHOUT = 3
"""Sync rounds that a job must seal while a process is dead."""


def test_kills_of_workers_and_valkey_delay_the_journey_and_change_nothing_else(market: RunningMarket) -> None:
    chain = Chain()
    training = market.submit(slots=2, seconds=SECONDS)
    market.await_rounds(training, 1, chain)
    waiting = [die_while_one_trains_and_one_waits(market, name, training, chain) for name in ("rounds", "valkey")]
    market.kill("upkeep")
    market.await_rounds(training, market.rounds_sealed(training) + ROUNDS_WITHOUT, chain)
    market.restart("upkeep")
    market.await_finished(training, chain)
    market.assert_trained_once(training, chain, samples_in(SECONDS, 2))
    market.assert_sound(training)
    assert market.job(training).epoch == 1
    for job_id in waiting:
        market.assert_released(job_id)


def die_while_one_trains_and_one_waits(market: RunningMarket, name: str, training: str, chain: Chain) -> str:
    market.kill(name)
    waiting = market.submit(slots=1, seconds=1)
    market.await_rounds(training, market.rounds_sealed(training) + ROUNDS_WITHOUT, chain)
    assert market.job(waiting).state == "queued"
    restarted_s = time.monotonic()
    market.restart(name)
    market.await_true(waiting, lambda: market.job(waiting).state != "queued")
    market.tell(f"{name} started again: the waiting job is placed", since_s=restarted_s)
    market.tenant.cancel(waiting)
    return waiting


def test_killed_api_delays_the_journey_and_changes_nothing_else(market: RunningMarket) -> None:
    chain = Chain()
    training = market.submit(slots=2, seconds=8)
    market.await_rounds(training, 1, chain)
    waiting = market.submit(slots=1, seconds=1)
    killed_s = time.monotonic()
    market.kill("api")
    # The kernel ends gunicorn's worker with its master.
    wait_until(lambda: not _port_accepts(market.places.api_port), 1.0)
    market.tell("the API killed: its port is free", since_s=killed_s)
    market.restart("api")
    outage_s = time.monotonic() - killed_s
    market.tell("the API killed and back", since_s=killed_s)
    market.await_true(waiting, lambda: market.job(waiting).state in {"running", "finished"})
    market.await_finished(training, chain)
    market.await_finished(waiting)
    market.assert_sound(training)
    market.assert_sound(waiting)
    # A gang's leases outlive every outage that is shorter than their liveness.
    assert outage_s < LIVENESS_S - 1
    assert market.job(training).epoch == 1
    market.assert_trained_once(training, chain, samples_in(8, 2))


@pytest.mark.soak
def test_without_the_wake_process_jobs_start_and_end_at_the_pace_of_heartbeats(market: RunningMarket) -> None:
    chain = Chain()
    training = market.submit(slots=2, seconds=6)
    market.await_rounds(training, 1, chain)
    market.kill("wake")
    waiting = market.submit(slots=1, seconds=1)
    submitted_s = time.monotonic()
    market.await_true(waiting, lambda: market.job(waiting).state in {"running", "finished"})
    market.tell("wake is dead, and a job submitted then runs", since_s=submitted_s)
    market.await_finished(training, chain)
    market.await_finished(waiting)
    market.restart("wake")
    for job_id in (training, waiting):
        market.assert_sound(job_id)
        assert market.job(job_id).epoch == 1
    market.assert_trained_once(training, chain, samples_in(6, 2))


@pytest.mark.soak
def test_valkey_may_be_dead_for_a_minute(market: RunningMarket) -> None:
    chain = Chain()
    market.kill("valkey")
    killed_s = time.monotonic()
    waiting = market.submit(slots=2, seconds=6)
    wait_until(lambda: time.monotonic() - killed_s > 60, 70)
    assert market.job(waiting).state == "queued"
    restarted_s = time.monotonic()
    market.restart("valkey")
    market.await_true(waiting, lambda: market.job(waiting).state != "queued")
    market.tell("Valkey started after a minute: the waiting job is placed", since_s=restarted_s)
    assert time.monotonic() - restarted_s < 10
    market.await_finished(waiting, chain)
    market.assert_sound(waiting)


def _port_accepts(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1.0):
            return True
    except OSError:
        return False
