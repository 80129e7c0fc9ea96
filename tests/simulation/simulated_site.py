"""A simulated site: an agent that keeps the protocol's promises, and the truth about its GPUs.

What survives a crash of the agent (its journal, the processes that the warden watches) is kept
apart from what does not. The truth (`busy`) is what runs on which GPU, whoever believes what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from sites.protocol import (
    AttemptPhase,
    AttemptReport,
    Confirmation,
    ExitCause,
    GatewayReport,
    Heartbeat,
    HeartbeatAnswer,
    LeaseOrder,
    LeasePhase,
    LinkOffer,
    Offer,
    PoolOffer,
    Skill,
    Usage,
    Veto,
)
from tests.simulation.simulated_log import SimulatedGateway
from training.attempt import NewestCheckpoint
from training.exchange import Leaving
from training.roundlog.signing import public_hex
from training.roundlog.view import open_view

if TYPE_CHECKING:
    from tests.simulation.world import World

SAMPLES_PER_ROUND = 1_000


@dataclass(slots=True)
class Attempt:
    """Processes on GPUs, or what is left of them. `deadline_s` is the warden's."""

    order: LeaseOrder
    gateway: SimulatedGateway
    started_s: float
    deadline_s: float
    # The round whose state it started from: that it was stopped there before is past.
    started_round: int = 0
    running: bool = True
    cause: ExitCause | None = None
    ended_s: float = 0.0
    metered_s: float = 0.0
    metered_samples: int = 0
    own_samples: int = 0
    samples_done: int = 0
    sequence: int = 0
    unacknowledged: list[Usage] = field(default_factory=list)
    checkpoint: NewestCheckpoint | None = None
    released: bool = False

    @property
    def lingers(self) -> bool:
        """Whether only its gateway is left, because others may still fetch the last round from it."""
        return self.cause is ExitCause.LEFT and not self.released

    @property
    def leaving(self) -> Leaving | None:
        """How its ranks were asked to stop."""
        return None if self.order.attempt is None else self.order.attempt.leaving

    @property
    def key(self) -> tuple[str, int]:
        """Its lease and epoch."""
        return self.order.lease_id, self.order.epoch


class SimulatedSite:
    """One site of the world."""

    def __init__(self, world: World, site_id: str, gpus: int, *, listens: bool) -> None:
        """Own `gpus` CPU slots; every site has links to every other."""
        self.world = world
        self.site_id = site_id
        self.listens = listens
        self.ask = world.rng.randrange(1, 6) * 100_000
        self.gpu_ids = tuple(f"slot-{index}" for index in range(gpus))
        self.key = Ed25519PrivateKey.generate()
        self.csr = _csr(self.key)
        self.draining = False
        self.vetoing = False
        self.agent_up = True
        self.boots = 1
        # Until then nothing of this site is heard outside, and it hears nothing; what runs goes on.
        self.isolated_until_s = 0.0
        # The journal: what a restarted agent finds again.
        self.attempts: dict[str, Attempt] = {}
        self.newest_epoch: dict[str, int] = {}
        self.confirming: dict[str, LeaseOrder] = {}
        self.vetoes: dict[str, LeaseOrder] = {}

    # --- What the site says -----------------------------------------------------------------------

    def heartbeat(self) -> Heartbeat:
        """Return what the agent says now."""
        self.enforce_deadlines()
        for attempt in self.attempts.values():
            self._cut_usage(attempt)
        return Heartbeat(
            agent_version="simulated",
            boot=f"boot-{self.boots}",
            offer=self.offer(),
            skills=tuple(Skill),
            confirmations=tuple(
                Confirmation(
                    lease_id=order.lease_id,
                    epoch=order.epoch,
                    attempt_key=public_hex(self.key),
                    csr_pem=self.csr,
                    gateway_address="127.0.0.1:7500" if self.listens else None,
                )
                for order in self.confirming.values()
            ),
            vetoes=tuple(
                Veto(lease_id=order.lease_id, epoch=order.epoch, code="policy", reason="the owner says no")
                for order in self.vetoes.values()
            ),
            attempts=tuple(self._report(attempt) for attempt in self.attempts.values()),
            usage=tuple(row for attempt in self.attempts.values() for row in attempt.unacknowledged),
        )

    def offer(self) -> Offer:
        """Return what the site sells now."""
        return Offer(
            pools=(PoolOffer(gpu_type="cpu-slot", gpu_ids=self.gpu_ids, ask_micros_per_gpu_hour=self.ask),),
            links=tuple(
                LinkOffer(target=other, bandwidth_bits_per_s=1e8, delay_s=0.02, egress_price_micros_per_gb=20_000)
                for other in self.world.site_ids
                if other != self.site_id
            ),
            listens=self.listens,
            draining=self.draining,
        )

    def _report(self, attempt: Attempt) -> AttemptReport:
        lease_id, epoch = attempt.key
        gateway = attempt.gateway
        newest = attempt.order.attempt
        promise = None
        if (attempt.running or attempt.lingers) and newest is not None and newest.promise is not None:
            promise = gateway.promise(newest.promise)
        return AttemptReport(
            lease_id=lease_id,
            epoch=epoch,
            phase=AttemptPhase.RUNNING if attempt.running else AttemptPhase.EXITED,
            cause=attempt.cause,
            exit_code=None if attempt.running else 0,
            gateway=GatewayReport(
                view_number=0 if gateway.view is None else gateway.view.number,
                sealed_round=gateway.sealed_round,
                chain_hash=gateway.chain_hash,
                applied_round=gateway.sealed_round,
                outer_hash=None,
                samples_done=attempt.samples_done,
                hub_lost_s=self.world.since_s(gateway.hub_lost_since_s) if attempt.running else None,
                members_lost_s={
                    other: self.world.true_s - since_s for other, since_s in gateway.members_lost_since_s.items()
                },
            ),
            promise=promise,
            checkpoint=attempt.checkpoint,
        )

    def _cut_usage(self, attempt: Attempt) -> None:
        until_s = self.world.true_s if attempt.running else attempt.ended_s
        gpu_ms = int((until_s - attempt.metered_s) * 1000) * len(attempt.order.gpu_ids)
        samples = attempt.own_samples - attempt.metered_samples
        if gpu_ms <= 0 and samples <= 0:
            return
        attempt.metered_s, attempt.metered_samples = until_s, attempt.own_samples
        attempt.sequence += 1
        lease_id, epoch = attempt.key
        others = [site_id for site_id in self.world.site_ids if site_id != self.site_id]
        attempt.unacknowledged.append(
            Usage(
                lease_id=lease_id,
                epoch=epoch,
                sequence=attempt.sequence,
                gpu_milliseconds=max(0, gpu_ms),
                samples=samples,
                egress_bytes={others[0]: samples * 10} if others and samples else {},
            )
        )

    # --- What it is told --------------------------------------------------------------------------

    def take_answer(self, answer: HeartbeatAnswer, sent_s: float) -> None:
        """Apply an answer to the heartbeat that was sent at `sent_s`."""
        standing = {order.lease_id: order for order in answer.leases}
        for lease_id, sequence in answer.usage_acknowledged.items():
            attempt = self.attempts.get(lease_id)
            if attempt is not None:
                attempt.unacknowledged = [row for row in attempt.unacknowledged if row.sequence > sequence]
        for lease_id in list(self.attempts):
            order = standing.get(lease_id)
            if order is None or order.phase is LeasePhase.ENDED:
                self._release(self.attempts[lease_id], forget=order is None)
        self._forget_answered(standing)
        for order in answer.leases:
            if order.epoch < self.newest_epoch.get(order.job_id, 0):
                continue
            if order.phase is LeasePhase.PROPOSED:
                self._consider(order)
            elif order.phase is LeasePhase.ACTIVE:
                self._run(order, sent_s)

    def _forget_answered(self, standing: dict[str, LeaseOrder]) -> None:
        for lease_id in [*self.confirming, *self.vetoes]:
            if lease_id not in standing or standing[lease_id].phase is not LeasePhase.PROPOSED:
                self.confirming.pop(lease_id, None)
                self.vetoes.pop(lease_id, None)

    def _consider(self, order: LeaseOrder) -> None:
        self.newest_epoch[order.job_id] = order.epoch
        if self.vetoing:
            self.vetoes[order.lease_id] = order
        else:
            self.confirming[order.lease_id] = order

    def _run(self, order: LeaseOrder, sent_s: float) -> None:
        attempt = self.attempts.get(order.lease_id)
        deadline_s = sent_s + order.liveness_s
        if attempt is None:
            if order.lease_id in self.world.forgotten or deadline_s <= self.world.true_s:
                return
            self._start(order, deadline_s)
            return
        attempt.order = order
        if attempt.running or attempt.lingers:
            attempt.deadline_s = max(attempt.deadline_s, deadline_s)
            self._install_view(attempt)

    def _start(self, order: LeaseOrder, deadline_s: float) -> None:
        if any(other.running and other.order.job_id == order.job_id for other in self.attempts.values()):
            return  # never before the former attempt's processes are dead
        for gpu_id in order.gpu_ids:
            self.world.occupy(self.site_id, gpu_id, order)
        assert order.attempt is not None
        attempt = Attempt(
            order=order,
            gateway=SimulatedGateway(self.site_id, self.world.history),
            started_s=self.world.true_s,
            deadline_s=deadline_s,
            metered_s=self.world.true_s,
        )
        self.attempts[order.lease_id] = attempt
        self._install_view(attempt)
        attempt.started_round = attempt.gateway.sealed_round
        attempt.samples_done = attempt.started_round * SAMPLES_PER_ROUND

    def _install_view(self, attempt: Attempt) -> None:
        newest = attempt.order.attempt
        if newest is not None and newest.view is not None:
            view = open_view(newest.view, self.world.market.authority.authority_key)
            if view.member(self.site_id) is not None:
                attempt.gateway.install(view)

    def _release(self, attempt: Attempt, *, forget: bool) -> None:
        self.stop(attempt, ExitCause.ORDERED)
        attempt.released = True
        self._cut_usage(attempt)
        if forget:
            del self.attempts[attempt.order.lease_id]
            self.world.forgotten.add(attempt.order.lease_id)

    # --- What happens to it -----------------------------------------------------------------------

    def stop(self, attempt: Attempt, cause: ExitCause) -> None:
        """End an attempt's processes; the cause of the first end stands."""
        if not attempt.running:
            return
        attempt.running = False
        attempt.cause = cause
        attempt.ended_s = self.world.true_s
        for gpu_id in attempt.order.gpu_ids:
            self.world.vacate(self.site_id, gpu_id, attempt.order)

    def enforce_deadlines(self) -> None:
        """Let the warden kill what has outlived its liveness; it needs no agent for that."""
        for attempt in self.attempts.values():
            if self.world.true_s >= attempt.deadline_s:
                attempt.released = True
            if attempt.running and self.world.true_s >= attempt.deadline_s:
                self.stop(attempt, ExitCause.EXPIRED)
                attempt.ended_s = min(attempt.ended_s, attempt.deadline_s)

    def lose_power(self) -> None:
        """Kill everything at once; the journal remains."""
        self.agent_up = False
        for attempt in self.attempts.values():
            self.stop(attempt, ExitCause.SITE)
            attempt.released = True

    def isolate(self, until_s: float) -> None:
        """Cut the site off from everyone, market and peers; nothing dies of it by itself."""
        self.isolated_until_s = until_s

    @property
    def is_isolated(self) -> bool:
        """Whether the site is cut off now."""
        return self.world.true_s < self.isolated_until_s

    def kill_agent(self) -> None:
        """Kill the agent alone."""
        self.agent_up = False

    def start_agent(self) -> None:
        """Start the agent again."""
        if not self.agent_up:
            self.agent_up = True
            self.boots += 1


def _csr(key: Ed25519PrivateKey) -> str:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, None)
    return request.public_bytes(Encoding.PEM).decode()
