"""The simulated world: one seed decides what happens, in which order, and what goes wrong.

Events stand in a queue by simulated time. The broker under test is the product's own code over a
real SQLite file; a crash at a commit is an exception that the dispatcher swallows, as the network
swallows a request whose server died. Nothing here reads a real clock or draws a number outside
the seed's generator.
"""

from __future__ import annotations

import heapq
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.artifacts import ArtifactStore
from broker.cancel import request_cancel
from broker.database.engine import CommitHook, Database
from broker.database.tables import Artifact, Job, Placement
from broker.database.uploads import SiteUpload
from broker.errors import ConflictError
from broker.heartbeat import receive
from broker.identity.authority import Authority
from broker.ids import SequentialIds
from broker.market import Market
from broker.reconcile import reconcile
from broker.rounds.clear import hold_round
from broker.settings import Settings
from broker.settle import settle
from broker.transitions import JobState, PlacementState
from sites.protocol import ExitCause, Heartbeat, HeartbeatAnswer, LeaseOrder
from tests.simulation.founding import TENANT_ID, found
from tests.simulation.invariants import InvariantError, check_ended, check_tables, check_truth
from tests.simulation.people import mischief, tenant
from tests.simulation.simulated_log import History
from tests.simulation.simulated_site import SAMPLES_PER_ROUND, Attempt, SimulatedSite
from training.attempt import NewestCheckpoint
from training.clock import ManualClock

HEARTBEAT_S = 1.0
REQUEST_TIMEOUT_S = 3.0
ROUND_TRIP_S_MAX = 0.4
CHECK_TABLES_EVERY = 20


class CrashError(BaseException):
    """The broker's process died at a commit. Not an Exception: no code under test may catch it."""


@dataclass(slots=True)
class Faults:
    """How likely each fault is, per occasion. `none()` is a world in which nothing goes wrong."""

    lose: float = 0.05
    double: float = 0.05
    late: float = 0.05
    crash: float = 0.01
    lose_ring: float = 0.3
    break_site: float = 0.02
    break_script: float = 0.002
    step_utc: float = 0.01
    meddle: float = 0.05
    isolate: float = 0.02

    @classmethod
    def none(cls) -> Faults:
        """Return a world without faults."""
        return cls(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(slots=True)
class Story:
    """What happened, told line by line when asked."""

    tell: bool = False
    lines: list[str] = field(default_factory=list)

    def add(self, at_s: float, line: str) -> None:
        """Add a line."""
        if self.tell:
            self.lines.append(f"{at_s:9.2f}  {line}")


class World:
    """One run of one seed."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        template: Path,
        faults: Faults | None = None,
        *,
        tell: bool = False,
        open_database: Callable[[CommitHook], Database] | None = None,
    ) -> None:
        """Make a market with three to five sites in `folder`; `template` comes from `make_template`.

        `open_database` opens another database than the template's SQLite file, empty but for its schema.
        """
        self.rng = random.Random(seed)  # noqa: S311  a seed that replays is the point
        self.seed = seed
        self.faults = faults or Faults()
        self.story = Story(tell)
        self.clock = ManualClock()
        self.true_s = 0.0
        self.steps = 0
        self.history = History()
        self.busy: dict[tuple[str, str], LeaseOrder] = {}
        self.forgotten: set[str] = set()
        self.started_s: dict[str, float] = {}
        self.really_ran_ms: dict[str, float] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self.jobs = 0
        self._sequences: dict[str, int] = {}
        self._parted_until_s: dict[frozenset[str], float] = {}
        shutil.copy(template / "market.sqlite3", folder / "market.sqlite3")
        settings = Settings(
            home=template,
            heartbeat_s=HEARTBEAT_S,
            liveness_s=6,
            liveness_margin_s=3,
            proposal_s=8,
            term_s=30,
            round_s=2,
            reconcile_s=1,
            settle_s=20,
            hub_lost_s=3,
            absent_s=1,
            handover_s=10,
            restart_s=3,
            attempts_max=8,
            # So that faults meet rounds that let the last prices stand too; a real market's are far larger.
            follow_jobs_min=2,
            follow_changed_share_max=0.5,
        )
        self.market = Market(
            settings=settings,
            database=open_database(self._at_commit)
            if open_database
            else Database(f"sqlite:///{folder / 'market.sqlite3'}", at_commit=self._at_commit),
            clock=self.clock,
            ids=SequentialIds(),
            authority=Authority(template, self.clock),
            artifacts=ArtifactStore(folder / "artifacts"),
            doorbell=self,
        )
        count = self.rng.randrange(3, 6)
        self.site_ids = [f"site-{letter}" for letter in "abcde"[:count]]
        self.sites = {
            site_id: SimulatedSite(self, site_id, self.rng.randrange(1, 4), listens=index < 2)
            for index, site_id in enumerate(self.site_ids)
        }
        self._crashing = False
        found(self)
        self._crashing = True
        for site_id in self.site_ids:
            self.after(self.rng.random(), lambda site_id=site_id: self._beat(site_id))
        self.after(1.0, self._every_reconcile)
        self.after(2.0, self._every_round)
        self.after(0.5, self._every_log)
        self.after(self.rng.random() * 3, lambda: tenant(self))
        self.after(3.0, lambda: mischief(self))

    # --- Running ----------------------------------------------------------------------------------

    def after(self, delay_s: float, happen: Callable[[], None]) -> None:
        """Let something happen `delay_s` from now."""
        self._order += 1
        heapq.heappush(self._queue, (self.true_s + delay_s, self._order, happen))

    def step(self) -> None:
        """Let the next event happen, and look at the invariants."""
        at_s, _, happen = heapq.heappop(self._queue)
        self.clock.advance_s(max(0.0, at_s - self.true_s))
        self.true_s = max(at_s, self.true_s)
        for site in self.sites.values():
            site.enforce_deadlines()
        try:
            happen()
        except CrashError as crash:
            self.story.add(self.true_s, f"the broker crashed {crash}")
        self.steps += 1
        if self.steps % CHECK_TABLES_EVERY == 0:
            check_tables(self)
            check_truth(self)

    def run(self, steps: int) -> None:
        """Run with faults, then without until every job has ended; raise InvariantError at the first wrong."""
        for _ in range(steps):
            self.step()
        self.quiesce()

    def quiesce(self, seconds: float = 900.0) -> None:
        """Switch the faults off and wait for the end of every job, then check that all is settled."""
        self.faults = Faults.none()
        self.story.add(self.true_s, "--- faults off ---")
        self._parted_until_s = {}
        for site in self.sites.values():
            site.draining = site.vetoing = False
            site.isolate(0.0)
            site.start_agent()
        until_s = self.true_s + seconds
        while self.true_s < until_s and not self._all_settled():
            self.step()
        check_tables(self)
        check_truth(self)
        check_ended(self)

    def close(self) -> None:
        """Close the database."""
        self.market.database.close()

    def _all_settled(self) -> bool:
        if self.steps % 20:
            return False
        try:
            check_ended(self)
        except InvariantError:
            self._cancel_unplaceable()
            return False
        return True

    def _cancel_unplaceable(self) -> None:
        # A job that nobody outbids but whose bid is too low would wait for ever: its tenant gives up.
        def work(session: Session) -> list[str]:
            live = session.scalar(select(Placement.job_id).where(Placement.state != PlacementState.ENDED).limit(1))
            if live is not None:
                return []
            return list(
                session.scalars(
                    select(Job.job_id).where(
                        Job.state == JobState.QUEUED,
                        Job.reason_code.in_(["bid_below_ask", "budget_short", "fragmented"]),
                    )
                )
            )

        for job_id in self.market.database.read(work):
            request_cancel(self.market, TENANT_ID, job_id)

    # --- The broker's surroundings ----------------------------------------------------------------

    def _at_commit(self, point: str) -> None:
        if self._crashing and self.rng.random() < self.faults.crash:
            raise CrashError(point)

    def ring_round(self) -> None:
        """Ring for a round; the ring may be lost."""
        if self.rng.random() >= self.faults.lose_ring:
            self.after(0.05 + self.rng.random() * 0.2, self._round)

    def wake_site(self, site_id: str) -> None:
        """Wake an agent; the word may be lost."""
        if self.rng.random() >= self.faults.lose_ring:
            self.after(0.02, lambda: self._send(site_id))

    def wake_watchers(self, job_id: str) -> None:
        """Nobody watches here."""

    def _every_round(self) -> None:
        self.after(self.market.settings.round_s, self._every_round)
        self._round()

    def _every_reconcile(self) -> None:
        self.after(self.market.settings.reconcile_s, self._every_reconcile)
        self._reconcile()

    def _round(self) -> None:
        done = hold_round(self.market)
        if done is not None:
            self.story.add(self.true_s, f"round {done.round_number}: {done.placements_made} placed, {done.dropped}")

    def _reconcile(self) -> None:
        reconcile(self.market)
        settle(self.market)

    # --- Sites and the network --------------------------------------------------------------------

    def _beat(self, site_id: str) -> None:
        self.after(HEARTBEAT_S * (0.8 + 0.4 * self.rng.random()), lambda: self._beat(site_id))
        self._send(site_id)

    def _send(self, site_id: str) -> None:
        site = self.sites[site_id]
        if not site.agent_up:
            return
        heartbeat = site.heartbeat()
        self._sequences[site_id] = sequence = self._sequences.get(site_id, 0) + 1
        sent_s, boot = self.true_s, site.boots
        copies = 2 if self.rng.random() < self.faults.double else 1
        for _ in range(copies):
            if self.rng.random() < self.faults.lose or site.is_isolated:
                continue
            delay_s = self.rng.random() * ROUND_TRIP_S_MAX / 2
            if self.rng.random() < self.faults.late:
                delay_s += self.rng.random() * 10
            self.after(delay_s, lambda: self._arrive(site_id, heartbeat, sequence, sent_s, boot))

    def _arrive(self, site_id: str, heartbeat: Heartbeat, sequence: int, sent_s: float, boot: int) -> None:
        try:
            answer = receive(self.market, site_id, heartbeat, sequence=sequence)
        except ConflictError as refusal:
            self.story.add(self.true_s, f"{site_id}: {refusal}")
            return
        if self.rng.random() < self.faults.lose:
            return
        delay_s = self.rng.random() * ROUND_TRIP_S_MAX / 2
        self.after(delay_s, lambda: self._answered(site_id, answer, sequence, sent_s, boot))

    def _answered(self, site_id: str, answer: HeartbeatAnswer, sequence: int, sent_s: float, boot: int) -> None:
        site = self.sites[site_id]
        # An agent takes the answer to its newest request only, and none after its time-out.
        if not site.agent_up or site.is_isolated or site.boots != boot or sequence != self._sequences[site_id]:
            return
        if self.true_s - sent_s > REQUEST_TIMEOUT_S:
            return
        site.take_answer(answer, sent_s)

    def occupy(self, site_id: str, gpu_id: str, order: LeaseOrder) -> None:
        """Start a process on a GPU: the truth that no table can hide."""
        holder = self.busy.get((site_id, gpu_id))
        if holder is not None:
            raise InvariantError(f"GPU {site_id}/{gpu_id} serves {holder.lease_id} and {order.lease_id} at once")
        self.busy[site_id, gpu_id] = order
        self.started_s.setdefault(order.lease_id, self.true_s)
        self.story.add(self.true_s, f"{site_id}/{gpu_id} starts {order.lease_id} epoch {order.epoch}")

    def vacate(self, site_id: str, gpu_id: str, order: LeaseOrder) -> None:
        """End a process on a GPU."""
        del self.busy[site_id, gpu_id]
        ran_ms = (self.true_s - self.started_s[order.lease_id]) * 1000
        self.really_ran_ms[order.lease_id] = self.really_ran_ms.get(order.lease_id, 0.0) + ran_ms
        self.story.add(self.true_s, f"{site_id}/{gpu_id} ends {order.lease_id}")

    def running_ms(self, lease_id: str) -> float:
        """Return the GPU-milliseconds of a lease's processes that still run."""
        running = sum(1 for order in self.busy.values() if order.lease_id == lease_id)
        return running * (self.true_s - self.started_s.get(lease_id, self.true_s)) * 1000

    # --- Training ---------------------------------------------------------------------------------

    def _every_log(self) -> None:
        self.after(0.5, self._every_log)
        attempts: dict[str, list[tuple[SimulatedSite, Attempt]]] = {}
        for site in self.sites.values():
            for attempt in site.attempts.values():
                if attempt.running or attempt.lingers:
                    attempts.setdefault(attempt.order.job_id, []).append((site, attempt))
        for job_id, group in attempts.items():
            self._train(job_id, group)

    def _train(self, job_id: str, group: list[tuple[SimulatedSite, Attempt]]) -> None:
        for site, attempt in group:
            self._feel(site, attempt, group)
        for site, attempt in group:
            view = attempt.gateway.view
            if view is None or view.hub != site.site_id:
                continue
            seats = {(member.site_id, member.epoch) for member in view.members}
            members = [(other, theirs) for other, theirs in group if (other.site_id, theirs.order.epoch) in seats]
            near = [theirs for other, theirs in members if self.reach(site.site_id, other.site_id)]
            for theirs in near:
                if theirs.cause is None and theirs.gateway.chain_hash == attempt.gateway.chain_hash:
                    theirs.gateway.deliver(theirs.leaving)
            if attempt.gateway.may_seal() and self._is_complete(attempt, members, seats):
                self._seal(job_id, attempt, members)
            for theirs in near:
                if self.rng.random() >= self.faults.lose:
                    theirs.gateway.learn(attempt.gateway.chain_hash, view.number)
        for site, attempt in group:
            self._advance(site, attempt)

    @staticmethod
    def _is_complete(hub: Attempt, members: list[tuple[SimulatedSite, Attempt]], seats: set[tuple[str, int]]) -> bool:
        """Say whether the hub holds everyone's contribution: what was delivered stays with it, whatever comes after."""
        view = hub.gateway.view
        assert view is not None, "a hub has a view"
        delivered = {
            (other.site_id, theirs.order.epoch)
            for other, theirs in members
            if theirs.gateway.has_delivered(view.number, hub.gateway.chain_hash)
        }
        return seats <= delivered

    def _seal(self, job_id: str, hub: Attempt, members: list[tuple[SimulatedSite, Attempt]]) -> None:
        assert hub.gateway.view is not None
        if hub.gateway.sealed_round * SAMPLES_PER_ROUND >= self._samples(hub):
            return
        number = hub.gateway.view.number
        said = {other.site_id: theirs.gateway.delivered_leaving for other, theirs in members}
        hub.gateway.sealed(self.history.seal(job_id, hub.gateway.chain_hash, number, said))
        for _, theirs in members:
            theirs.own_samples += SAMPLES_PER_ROUND // len(hub.gateway.view.members)

    def _feel(self, site: SimulatedSite, attempt: Attempt, group: list[tuple[SimulatedSite, Attempt]]) -> None:
        """Let a gateway notice which of its peers it does not reach."""
        gateway = attempt.gateway
        if gateway.view is None:
            return
        seats = {(member.site_id, member.epoch) for member in gateway.view.members}
        heard = {
            other.site_id
            for other, theirs in group
            if (other.site_id, theirs.order.epoch) in seats and self.reach(site.site_id, other.site_id)
        }
        others = {member.site_id for member in gateway.view.members} - {site.site_id}
        if gateway.view.hub == site.site_id:
            since = gateway.members_lost_since_s
            gateway.members_lost_since_s = {other: since.get(other, self.true_s) for other in sorted(others - heard)}
        elif gateway.view.hub in heard:
            gateway.hub_lost_since_s = None
        elif gateway.hub_lost_since_s is None:
            gateway.hub_lost_since_s = self.true_s

    def reach(self, one: str, other: str) -> bool:
        """Say whether two sites' gateways reach each other now."""
        if one == other:
            return True
        if self.sites[one].is_isolated or self.sites[other].is_isolated:
            return False
        return self._parted_until_s.get(frozenset((one, other)), 0.0) <= self.true_s

    def part_two(self, seconds: float) -> None:
        """Part two sites from each other for a while; the market still hears both."""
        pair = self.rng.sample(self.site_ids, 2)
        self._parted_until_s[frozenset(pair)] = self.true_s + seconds
        self.story.add(self.true_s, f"{pair[0]} and {pair[1]} do not reach each other for {seconds:.1f} s")

    def since_s(self, at_s: float | None) -> float | None:
        """Return how long ago `at_s` was."""
        return None if at_s is None else self.true_s - at_s

    def _advance(self, site: SimulatedSite, attempt: Attempt) -> None:
        if not attempt.running:
            return
        sealed = attempt.gateway.sealed_round
        attempt.samples_done = sealed * SAMPLES_PER_ROUND
        if sealed and sealed % 3 == 0 and (attempt.checkpoint is None or attempt.checkpoint.round_number < sealed):
            attempt.checkpoint = self._store_checkpoint(site, attempt, sealed)
        if self.rng.random() < self.faults.break_script:
            site.stop(attempt, ExitCause.SCRIPT)
        elif attempt.samples_done >= self._samples(attempt):
            site.stop(attempt, ExitCause.DONE)
        elif (
            site.site_id in self.history.stopping.get(attempt.gateway.chain_hash, ()) and sealed > attempt.started_round
        ):
            attempt.checkpoint = self._store_checkpoint(site, attempt, sealed)
            site.stop(attempt, ExitCause.LEFT)
            self.story.add(self.true_s, f"{site.site_id} leaves {attempt.order.job_id} after round {sealed}")

    def _store_checkpoint(self, site: SimulatedSite, attempt: Attempt, sealed: int) -> NewestCheckpoint:
        digest = attempt.gateway.chain_hash

        def work(session: Session) -> None:
            if session.get(Artifact, digest) is None:
                session.add(Artifact(digest=digest, size_bytes=1000, complete=True, created_ms=self.clock.now_ms()))
                session.flush()
            session.merge(SiteUpload(site_id=site.site_id, digest=digest, created_ms=self.clock.now_ms()))

        self._crashing = False
        self.market.database.write("checkpoint", work)
        self._crashing = True
        return NewestCheckpoint(
            round_number=sealed,
            chain_hash=digest,
            outer_hash=digest,
            file="checkpoint.safetensors",
            digest=digest,
            size_bytes=1000,
            samples_done=sealed * SAMPLES_PER_ROUND,
        )

    @staticmethod
    def _samples(attempt: Attempt) -> int:
        assert attempt.order.attempt is not None
        return attempt.order.attempt.spec.market.workload.samples
