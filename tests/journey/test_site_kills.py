"""Sites lose their power, their agents, their gateways or their network: jobs go on, and nothing counts twice."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.journey.market import LIVENESS_S, Chain, RunningMarket, samples_in
from tests.journey.rows import content_of
from tests.sites.waiting import lives, wait_until
from training.roundlog.manifest import Manifest
from training.roundlog.view import View

pytestmark = pytest.mark.timeout(300)

WARDEN_S = 2.0 + 1.0
"""What a warden may take at expiry to end what it watches (sites.drivers.warden), and a second for a busy machine."""
HUB_MOVES_S_MAX = 3.0
"""From the cut of the hub's power to the first seal under the next, on a machine with a core for each process that runs."""


def pace() -> float:
    """Return by how much this machine's load slows down what is measured in seconds."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def contributors(chain: Chain, number: int) -> set[str]:
    """Return the sites whose contributions a sealed round holds."""
    manifest = Manifest.model_validate_json(next(iter(chain.rounds[number].values())))
    return {json.loads(content_of(entry.contribution))["site_id"] for entry in manifest.entries}


def members(market: RunningMarket, job_id: str) -> tuple[str, list[str]]:
    """Return the hub and the other sites of a job's newest issued view."""
    view: View = market.issued(job_id)[-1]
    return view.hub, [member.site_id for member in view.members if member.site_id != view.hub]


@pytest.mark.soak  # `tests/sites/test_recovery.py` has the agent alone
def test_killed_agent_adopts_its_attempt_and_restarts_a_killed_gateway(market: RunningMarket) -> None:
    chain = Chain()
    job_id = market.submit(slots=2, seconds=24)
    market.await_rounds(job_id, 2, chain)
    _, (site_id,) = members(market, job_id)
    ranks = market.ranks(site_id)
    killed_s = time.monotonic()
    market.kill(site_id)
    market.await_rounds_of_others(job_id, 3, site_id, chain)
    market.restart(site_id)
    heard_ms = market.heard_ms(site_id)
    market.await_true(job_id, lambda: market.heard_ms(site_id) > heard_ms)
    market.tell(f"the agent of {site_id} killed and heard again", since_s=killed_s)

    gateways = market.pids_running(site_id, "training.roundlog.gateway")
    killed_s = time.monotonic()
    for pid in gateways:
        os.kill(pid, signal.SIGKILL)
    market.await_rounds(job_id, market.rounds_sealed(job_id) + 2, chain)
    market.tell(f"the gateway of {site_id} killed and two rounds sealed since", since_s=killed_s)
    assert gateways
    assert not gateways & market.pids_running(site_id, "training.roundlog.gateway")
    assert ranks
    assert market.ranks(site_id) == ranks

    market.await_finished(job_id, chain)
    market.assert_trained_once(job_id, chain, samples_in(24, 2))
    market.assert_sound(job_id)
    assert market.job(job_id).epoch == 1
    assert len(market.issued(job_id)) == 1


@pytest.mark.soak
def test_survivor_goes_on_without_the_site_that_lost_its_power(market: RunningMarket) -> None:
    chain = Chain()
    job_id = market.submit(slots=2, seconds=24)
    market.await_rounds(job_id, 3, chain)
    hub, (lost,) = members(market, job_id)
    survivors = market.ranks(hub)
    cut_s = time.monotonic()
    market.cut_power(lost)
    market.await_true(job_id, lambda: len(market.issued(job_id)) > 1)
    market.tell(f"power of {lost} cut: a view without it", since_s=cut_s)
    reduced = market.issued(job_id)[-1]
    assert [member.site_id for member in reduced.members] == [hub]
    market.await_rounds_of_others(job_id, reduced.base_round + 1, lost, chain)
    market.tell("and the next round sealed", since_s=cut_s)
    assert market.ranks(hub) == survivors
    lease = next(lease for lease in market.leases(job_id) if lease.site_id == lost)
    paid_until_then = lease.delivered_gpu_milliseconds

    # Its own clock alone ends its lease; when the host is back after that, there is nothing to come back to.
    market.await_true(job_id, lambda: market.look(chain, job_id) or market.lease(job_id, lost).state == "ended")
    market.tell("and its lease ended", since_s=cut_s)
    market.restart(lost)
    market.await_forgotten(lost)
    market.await_finished(job_id, chain)
    market.assert_trained_once(job_id, chain, samples_in(24, 2))
    market.assert_sound(job_id)
    lease = next(lease for lease in market.leases(job_id) if lease.site_id == lost)
    assert lease.end_cause == "expired"
    assert lease.delivered_gpu_milliseconds == paid_until_then
    assert market.job(job_id).epoch == 1


def test_hub_moves_when_its_site_loses_its_power_and_no_sealed_round_is_lost(market: RunningMarket) -> None:
    chain = Chain()
    job_id = market.submit(slots=3, seconds=24)
    market.await_rounds(job_id, 3, chain)
    hub, others = members(market, job_id)
    ranks = {site_id: market.ranks(site_id) for site_id in others}
    standby = market.issued(job_id)[-1].standby
    cut_s = time.monotonic()
    market.cut_power(hub)
    market.look(chain, job_id)
    held = max(number for number, sites in chain.rounds.items() if set(sites) & set(others))
    market.await_true(job_id, lambda: market.issued(job_id)[-1].hub != hub)
    market.tell(f"power of the hub's site {hub} cut: the hub moves", since_s=cut_s)
    moved = market.issued(job_id)[-1]
    assert moved.hub == standby
    assert moved.base_round >= held
    market.await_rounds_of_others(job_id, moved.base_round + 1, hub, chain)
    sealed_s = time.monotonic() - cut_s
    market.tell("and the next round sealed", since_s=cut_s)
    assert sealed_s <= HUB_MOVES_S_MAX * pace()
    # Nobody waited for the lost site's lease: it stands until its own clock ends it.
    assert market.lease(job_id, hub).state == "active"
    assert {site_id: market.ranks(site_id) for site_id in others} == ranks

    market.await_true(job_id, lambda: market.look(chain, job_id) or market.lease(job_id, hub).state == "ended")
    market.restart(hub)
    market.await_forgotten(hub)
    market.await_finished(job_id, chain)
    market.assert_trained_once(job_id, chain, samples_in(24, 3))
    market.assert_sound(job_id)
    assert market.job(job_id).epoch == 1


@pytest.mark.soak
@pytest.mark.parametrize("role", ["hub", "member"])
def test_site_whose_host_is_back_within_its_lease_trains_on_under_it(market: RunningMarket, role: str) -> None:
    chain = Chain()
    job_id = market.submit(slots=3, seconds=24)
    market.await_rounds(job_id, 3, chain)
    hub, others = members(market, job_id)
    lost = hub if role == "hub" else others[0]
    stayed = {site_id: market.ranks(site_id) for site_id in (hub, *others) if site_id != lost}
    cut_s = time.monotonic()
    market.cut_power(lost)
    if role == "hub":
        market.await_true(job_id, lambda: len(market.issued(job_id)) > 1)
        assert lost not in {member.site_id for member in market.issued(job_id)[-1].members}
    market.restart(lost)
    without = max(chain.rounds)

    def contributes() -> bool:
        market.look(chain, job_id)
        return any(lost in contributors(chain, number) for number in chain.rounds if number > without + 2)

    market.await_true(job_id, contributes)
    market.tell(f"power of {lost} ({role}) cut and back: it contributes again", since_s=cut_s)
    assert {site_id: market.ranks(site_id) for site_id in stayed} == stayed
    back = market.issued(job_id)[-1]
    assert lost in {member.site_id for member in back.members}
    # A member that is back soon enough was never left out.
    assert back.joining == (lost,) or (role == "member" and len(market.issued(job_id)) == 1)
    market.await_finished(job_id, chain)
    market.assert_trained_once(job_id, chain, samples_in(24, 3))
    market.assert_sound(job_id)
    lease = market.lease(job_id, lost)
    assert (lease.epoch, lease.end_cause) == (1, "done")


@pytest.mark.soak
def test_site_with_two_ranks_is_lost_and_its_survivors_go_on(market: RunningMarket) -> None:
    chain = Chain()
    job_id = market.submit(slots=4, seconds=24, sites=3)
    market.await_rounds(job_id, 3, chain)
    lost = "danzig"
    hub, others = members(market, job_id)
    stayed = {site_id: market.ranks(site_id) for site_id in (hub, *others) if site_id != lost}
    assert len(stayed) == 2
    assert all(2 * len(ranks) == len(market.ranks(lost)) for ranks in stayed.values())
    cut_s = time.monotonic()
    market.cut_power(lost)
    market.await_true(job_id, lambda: len(market.issued(job_id)) > 1)
    reduced = market.issued(job_id)[-1]
    assert [member.site_id for member in reduced.members] == sorted(stayed)
    market.await_rounds_of_others(job_id, reduced.base_round + 1, lost, chain)
    market.tell(f"power of {lost} with two ranks cut: the next round sealed", since_s=cut_s)
    assert {site_id: market.ranks(site_id) for site_id in stayed} == stayed
    market.await_true(job_id, lambda: market.look(chain, job_id) or market.lease(job_id, lost).state == "ended")
    market.restart(lost)
    market.await_forgotten(lost)
    market.await_finished(job_id, chain)
    market.assert_trained_once(job_id, chain, samples_in(24, 4))
    market.assert_sound(job_id)


@pytest.mark.soak  # the simulator loses whole gangs in `make test`
def test_gang_lost_whole_resumes_from_its_checkpoint_under_a_higher_epoch(market: RunningMarket) -> None:
    chain = Chain()
    job_id = market.submit(slots=2, seconds=10, checkpoint_rounds=2)
    market.await_true(job_id, lambda: market.look(chain, job_id) or market.checkpoints(job_id))
    hub, (other,) = members(market, job_id)
    cut_s = time.monotonic()
    for site_id in (hub, other):
        market.cut_power(site_id)
    market.look(chain, job_id)
    kept = market.checkpoints(job_id)[0]
    market.await_true(job_id, lambda: market.job(job_id).state == "queued")
    market.tell("power of both sites cut: the job waits again", since_s=cut_s)
    chain.resume_after(kept.round_number, epoch=2)
    back_s = time.monotonic()
    for site_id in (hub, other):
        market.restart(site_id)
    market.await_rounds(job_id, kept.round_number + 1, chain)
    market.tell("power back: the round after the checkpoint sealed", since_s=back_s)

    market.await_finished(job_id, chain)
    first, *_, last = market.placements(job_id)
    assert (first.epoch, first.end_cause) == (1, "lost")
    assert last.epoch > 1
    assert last.base_round == kept.round_number >= 2
    assert last.base_hash == kept.chain_hash
    market.assert_trained_once(job_id, chain, samples_in(10, 2))
    market.assert_sound(job_id)


@pytest.mark.soak
def test_silenced_agents_warden_ends_the_ranks_in_time_and_the_agent_accepts_it(market: RunningMarket) -> None:
    chain = Chain()
    job_id = market.submit(slots=2, seconds=30)
    market.await_rounds(job_id, 2, chain)
    hub, (silent,) = members(market, job_id)
    ranks = market.ranks(silent)
    assert ranks
    stopped_s = time.monotonic()
    market.supervisor.kill(silent, signal.SIGSTOP)
    wait_until(lambda: market.look(chain, job_id) or not any(map(lives, ranks)), LIVENESS_S + WARDEN_S)
    market.tell(f"agent of {silent} silenced: its ranks are dead", since_s=stopped_s)
    # The ranks died by the site's own clock, before the broker counted them as dead.
    lease = next(lease for lease in market.leases(job_id) if lease.site_id == silent)
    assert lease.state == "active"
    market.await_true(job_id, lambda: market.look(chain, job_id) or len(market.issued(job_id)) > 1)
    market.tell("and a view without it", since_s=stopped_s)
    market.supervisor.kill(silent, signal.SIGCONT)
    market.await_forgotten(silent)
    assert [member.site_id for member in market.issued(job_id)[-1].members] == [hub]
    market.await_finished(job_id, chain)
    market.assert_trained_once(job_id, chain, samples_in(30, 2))
    market.assert_sound(job_id)
    assert not market.ranks(silent)
