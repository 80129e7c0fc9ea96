"""A market whose sites speak the protocol in-process, one sentence at a time: what the journey's tests are told with.

Nothing happens by itself here: a test says who beats, when a round is held and how much time passes. The simulator's
sites (`tests.simulation`) act by themselves and are for what nobody thought of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from broker.artifacts import ArtifactStore
from broker.audit import audit
from broker.database.engine import Database
from broker.database.tables import Artifact, Event, Hold, Job, Lease, LeasedGpu, MarketState, Placement, Round
from broker.database.tables import ViewChange as ViewRow
from broker.database.uploads import SiteUpload
from broker.heartbeat import receive
from broker.identity.authority import Authority
from broker.ids import SequentialIds
from broker.market import Market
from broker.reconcile import reconcile
from broker.rounds.clear import hold_round
from broker.settings import Settings
from broker.submit import submit_job
from broker.transitions import PlacementState
from sites.identity import attempt_uri, certificate_request_pem
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
    SiteData,
    Usage,
    Veto,
)
from tests.simulation.founding import TENANT_ID, WORKDIR, found
from tests.simulation.world import World
from training.attempt import NewestCheckpoint
from training.clock import ManualClock
from training.roundlog.signing import public_hex
from training.roundlog.view import GENESIS_HASH, View, ViewReport, open_view
from training.spec import JobSpec

T = TypeVar("T")
ASK = 100_000
CREDIT = 1_000_000
LIVENESS_S = 6.0
MARGIN_S = 3.0
PROPOSAL_S = 8.0
TERM_S = 60
SETTLE_S = 20.0
HUB_LOST_S = 3.0
SOON_S = 0.5


@dataclass
class Bells:
    """A doorbell that only remembers."""

    rounds: int = 0
    sites: list[str] = field(default_factory=list)

    def ring_round(self) -> None:
        self.rounds += 1

    def wake_site(self, site_id: str) -> None:
        self.sites.append(site_id)

    def wake_watchers(self, job_id: str) -> None:
        pass


class SpeakingSite:
    """A site with `gpus` CPU slots that says what it is told to say."""

    def __init__(self, scene: Scene, site_id: str, gpus: int, *, listens: bool = True) -> None:
        self.scene = scene
        self.site_id = site_id
        self.key = Ed25519PrivateKey.generate()
        self.listens = listens
        self.skills: tuple[str, ...] = ()
        self.data: SiteData | None = None
        self.sequence = 0
        self.orders: dict[str, LeaseOrder] = {}
        self.reports: dict[str, AttemptReport] = {}
        self.usage: dict[str, list[Usage]] = {}
        others = [other for other in scene.site_ids if other != site_id]
        self.offer = Offer(
            pools=(
                PoolOffer(
                    gpu_type="cpu-slot",
                    gpu_ids=tuple(f"slot-{number}" for number in range(gpus)),
                    ask_micros_per_gpu_hour=ASK,
                ),
            ),
            links=tuple(LinkOffer(target=other, bandwidth_bits_per_s=1e8, delay_s=0.02) for other in others),
            listens=listens,
        )

    def say(self, **items: Any) -> HeartbeatAnswer:
        """Send one heartbeat with exactly these items."""
        self.sequence += 1
        return self.send(self.heartbeat(**items), self.sequence)

    def heartbeat(self, **items: Any) -> Heartbeat:
        return Heartbeat(
            agent_version="1", boot="boot-1", offer=self.offer, **{"skills": self.skills, "data": self.data, **items}
        )

    def send(self, heartbeat: Heartbeat, sequence: int) -> HeartbeatAnswer:
        answer = receive(self.scene.market, self.site_id, heartbeat, sequence=sequence)
        self.orders = {order.lease_id: order for order in answer.leases}
        return answer

    def beat(self) -> HeartbeatAnswer:
        """Send one heartbeat with all that stands: every attempt, and every usage that was not acknowledged."""
        answer = self.say(
            attempts=tuple(self.reports.values()),
            usage=tuple(row for rows in self.usage.values() for row in rows),
        )
        for lease_id, taken in answer.usage_acknowledged.items():
            self.usage[lease_id] = [row for row in self.usage[lease_id] if row.sequence > taken]
        return answer

    def confirmation(self, order: LeaseOrder) -> Confirmation:
        return Confirmation(
            lease_id=order.lease_id,
            epoch=order.epoch,
            attempt_key=public_hex(self.key),
            csr_pem=certificate_request_pem(self.key, attempt_uri(order.job_id, order.epoch, self.site_id)),
            gateway_address="127.0.0.1:7500" if self.listens else None,
        )

    def proposed(self) -> list[LeaseOrder]:
        """Look once, and return what is proposed."""
        self.beat()
        return [order for order in self.orders.values() if order.phase is LeasePhase.PROPOSED]

    def confirm(self) -> HeartbeatAnswer:
        """Look, and confirm all that is proposed."""
        return self.say(confirmations=tuple(self.confirmation(order) for order in self.proposed()))

    def veto(self, reason: str = "the owner says no") -> HeartbeatAnswer:
        """Look, and refuse all that is proposed."""
        return self.say(
            vetoes=tuple(
                Veto(lease_id=order.lease_id, epoch=order.epoch, code="policy", reason=reason)
                for order in self.proposed()
            )
        )

    def order(self) -> LeaseOrder:
        """Return the only active order."""
        (order,) = [order for order in self.orders.values() if order.phase is LeasePhase.ACTIVE]
        return order

    def run(self, *, sealed: int = 0, chain_hash: str = GENESIS_HASH, view: int = 1, **gateway: Any) -> None:
        """Let the active attempt run, its log reaching round `sealed`."""
        order = self.order()
        self.reports[order.lease_id] = AttemptReport(
            lease_id=order.lease_id,
            epoch=order.epoch,
            phase=AttemptPhase.RUNNING,
            gateway=GatewayReport(
                view_number=view,
                sealed_round=sealed,
                chain_hash=chain_hash,
                applied_round=sealed,
                outer_hash=None,
                **{"samples_done": sealed * 1000, **gateway},
            ),
        )
        self.beat()

    def promise(self, number: int, *, sealed: int = 0, chain_hash: str = GENESIS_HASH) -> HeartbeatAnswer:
        """Promise a view in the active attempt's report."""
        order = self.order()
        report = ViewReport(
            promised=number, sealed_round=sealed, chain_hash=chain_hash, applied_round=sealed, outer_hash=None
        )
        return self.say(attempts=(self.reports[order.lease_id].model_copy(update={"promise": report}),))

    def exit(self, cause: ExitCause, detail: str = "", **fields: Any) -> HeartbeatAnswer:
        """End the active attempt and say so."""
        return self.exit_of(self.order(), cause, detail, **fields)

    def exit_of(self, order: LeaseOrder, cause: ExitCause, detail: str = "", **fields: Any) -> HeartbeatAnswer:
        """End an attempt, whatever became of its lease, and say so."""
        report = AttemptReport(
            lease_id=order.lease_id,
            epoch=order.epoch,
            phase=AttemptPhase.EXITED,
            cause=cause,
            exit_code=0,
            detail=detail,
            **fields,
        )
        self.reports[order.lease_id] = report
        return self.beat()

    def meter(self, order: LeaseOrder, gpu_milliseconds: int, sequence: int = 1) -> None:
        """Keep a report of usage for the next beat."""
        self.usage.setdefault(order.lease_id, []).append(
            Usage(
                lease_id=order.lease_id,
                epoch=order.epoch,
                sequence=sequence,
                gpu_milliseconds=gpu_milliseconds,
                samples=0,
            )
        )

    def view(self) -> View:
        """Return the view that the active order carries."""
        attempt = self.order().attempt
        assert attempt is not None
        assert attempt.view is not None
        return open_view(attempt.view, self.scene.market.authority.authority_key)

    def promise_wanted(self) -> int | None:
        """Return the view that the broker asks this site to promise."""
        attempt = self.order().attempt
        assert attempt is not None
        return attempt.promise


class Scene:
    """A market with sites of two slots each (or as told), all of them heard once."""

    def __init__(self, url: str, home: Path, sites: dict[str, int] | None = None, **settings: Any) -> None:
        self.clock = ManualClock()
        self.bells = Bells()
        sites = sites or {"ada": 2, "bob": 2, "cid": 2}
        self.site_ids = list(sites)
        database = Database(url)
        chosen = {
            "heartbeat_s": 1.0,
            "liveness_s": LIVENESS_S,
            "liveness_margin_s": MARGIN_S,
            "proposal_s": PROPOSAL_S,
            "term_s": TERM_S,
            "settle_s": SETTLE_S,
            "hub_lost_s": HUB_LOST_S,
            "attempts_max": 3,
            "barred_rounds": 3,
            "restart_s": 5.0,
            **settings,
        }
        self.market = Market(
            settings=Settings(home=home, **chosen),
            database=database,
            clock=self.clock,
            ids=SequentialIds(),
            authority=Authority(home, self.clock),
            artifacts=ArtifactStore(home / "artifacts"),
            doorbell=self.bells,
        )
        found(cast("World", self))
        self.sites = {site_id: SpeakingSite(self, site_id, gpus) for site_id, gpus in sites.items()}
        for site in self.sites.values():
            site.beat()

    def close(self) -> None:
        """End with a sound market: every test of the journey also is a test of the audit's invariants."""
        try:
            assert self.market.database.read(audit) == []
        finally:
            self.market.database.close()

    # --- What is done -----------------------------------------------------------------------------

    def submit(self, gpus: int = 2, **terms: Any) -> str:
        return submit_job(self.market, TENANT_ID, spec(gpus, **terms)).job_id

    def round(self) -> Round | None:
        return hold_round(self.market)

    def reconcile(self) -> bool:
        return reconcile(self.market)

    def pass_s(self, seconds: float, *speakers: str) -> None:
        """Let time pass while these sites go on to beat."""
        while seconds > 0:
            step = min(seconds, 2.0)
            self.clock.advance_s(step)
            seconds -= step
            for site_id in speakers:
                self.sites[site_id].beat()

    def start(self, job_id: str) -> list[SpeakingSite]:
        """Hold a round, let every site confirm, and return the sites at which the job now runs."""
        self.round()
        members = [self.sites[lease.site_id] for lease in self.leases(job_id) if lease.state == "proposed"]
        for site in members:
            site.confirm()
        for site in members:
            site.beat()
            site.run()
        return members

    def store(self, digest: str, *site_ids: str) -> None:
        """Write down that a file is in the artifact store, and that these sites (else all) have brought it."""
        now_ms = self.clock.now_ms()

        def work(session: Session) -> None:
            session.add(Artifact(digest=digest, size_bytes=1, complete=True, created_ms=now_ms))
            session.flush()
            for site_id in site_ids or self.site_ids:
                session.add(SiteUpload(site_id=site_id, digest=digest, created_ms=now_ms))

        self.market.database.write("store", work)

    # --- What is seen -----------------------------------------------------------------------------

    def read(self, query: Select[tuple[T]]) -> list[T]:
        return self.market.database.read(lambda session: list(session.scalars(query)))

    def job(self, job_id: str) -> Job:
        (job,) = self.read(select(Job).where(Job.job_id == job_id))
        return job

    def hold(self, job_id: str) -> Hold:
        (hold,) = self.read(select(Hold).where(Hold.job_id == job_id))
        return hold

    def placement(self, job_id: str) -> Placement:
        """Return the newest placement of a job."""
        return self.read(select(Placement).where(Placement.job_id == job_id).order_by(Placement.epoch.desc()))[0]

    def placements(self, job_id: str) -> int:
        return len(self.read(select(Placement).where(Placement.job_id == job_id)))

    def leases(self, job_id: str) -> list[Lease]:
        """Return the leases of a job's newest placement in site order."""
        newest = self.read(select(Placement.placement_id).where(Placement.job_id == job_id).order_by(-Placement.epoch))
        if not newest:
            return []
        return self.read(select(Lease).where(Lease.placement_id == newest[0]).order_by(Lease.site_id))

    def lease(self, job_id: str, site_id: str) -> Lease:
        (lease,) = [lease for lease in self.leases(job_id) if lease.site_id == site_id]
        return lease

    def taken_gpus(self, site_id: str) -> int:
        """Count the GPUs of a site that no other lease may have."""
        return len(self.read(select(LeasedGpu.gpu_id).where(LeasedGpu.site_id == site_id, LeasedGpu.live)))

    def views(self, job_id: str) -> list[ViewRow]:
        return self.read(select(ViewRow).where(ViewRow.job_id == job_id).order_by(ViewRow.number))

    def events(self, kind: str) -> list[Event]:
        return self.read(select(Event).where(Event.kind == kind).order_by(Event.event_id))

    def live_placements(self) -> int:
        return len(self.read(select(Placement).where(Placement.state != PlacementState.ENDED)))

    def is_due(self) -> bool:
        state = self.read(select(MarketState))[0]
        return state.changes != state.changes_cleared and state.frozen_ms is None

    def rounds(self) -> int:
        return self.market.database.read(lambda session: session.scalar(select(func.count()).select_from(Round)) or 0)

    def write(self, work: Any) -> None:
        """Change a row directly: what a race would have done."""

        def change(session: Session) -> None:
            work(session)

        self.market.database.write("race", change)


def spec(
    gpus: int = 2,
    *,
    sites_max: int = 1,
    samples: int = 10**9,
    budget: int = 100 * CREDIT,
    bid: int = CREDIT,
    most: int | None = None,
    secrets: list[str] | None = None,
    datasets: list[dict[str, Any]] | None = None,
    **market: Any,
) -> JobSpec:
    """Return a job that wants `gpus` slots (up to `most`) and runs for days."""
    return JobSpec.model_validate(
        {
            "name": "job",
            "run": "python train.py",
            "workdir_digest": WORKDIR,
            "secrets": secrets,
            "data": datasets,
            "resources": {
                "accelerators": [{"gpu_type": "cpu-slot", "count_min": gpus, "count_max": most or gpus}],
            },
            "market": {
                "budget_micros": budget,
                "bid_micros_per_million_samples": bid,
                "sites_max": sites_max,
                "workload": {
                    "samples": samples,
                    "batch_per_gpu": 8,
                    "parameters": 100_000,
                    "flops_per_sample": 1e7,
                },
                **market,
            },
        }
    )


def checkpoint(digest: str, *, sealed: int, chain_hash: str) -> NewestCheckpoint:
    """Return what a gateway says of a checkpoint that it has stored."""
    return NewestCheckpoint(
        round_number=sealed,
        chain_hash=chain_hash,
        outer_hash=chain_hash,
        file="checkpoint.safetensors",
        digest=digest,
        size_bytes=1,
        samples_done=sealed * 1000,
    )


def without(offer: Offer, **changes: Any) -> Offer:
    """Return an offer with other fields."""
    return offer.model_copy(update=changes)
