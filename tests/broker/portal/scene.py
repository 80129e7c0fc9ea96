"""A market with something on every page, filled by the product's own services: what the portal's tests look at."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker import ledger
from broker.bootstrap import open_market
from broker.enrol import enrol
from broker.heartbeat import receive
from broker.identity.join import invite_site
from broker.identity.passwords import Role, create_user
from broker.market import Market
from broker.portal.workdirs import keep_example
from broker.rounds.clear import hold_round
from broker.rounds.economics import keep_up
from broker.settings import Settings
from broker.streams import streams_of
from broker.submit import submit_job
from broker.tenants import create_tenant, deposit
from sites.identity import attempt_uri, certificate_request_pem, decode_join_string, site_uri
from sites.protocol import (
    AttemptPhase,
    AttemptReport,
    Confirmation,
    Enrolment,
    GatewayReport,
    Heartbeat,
    HeartbeatAnswer,
    LeaseOrder,
    LeasePhase,
    LinkOffer,
    Offer,
    PoolOffer,
    Usage,
)
from training.clock import ManualClock
from training.roundlog.signing import public_hex
from training.roundlog.view import open_view
from training.spec import GpuRequest, JobSpec, MarketTerms, Resources, Workload

PASSWORD = "correct horse battery"
HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


@dataclass
class Agent:
    """A site that says what it is told to say, through the broker's own front door."""

    market: Market
    site_id: str
    offer: Offer
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    sequence: int = 0
    orders: tuple[LeaseOrder, ...] = ()

    def join(self) -> None:
        token = decode_join_string(invite_site(self.market, self.site_id)).token
        csr = certificate_request_pem(self.key, site_uri(self.site_id))
        enrol(self.market, Enrolment(site_id=self.site_id, join_token=token, csr_pem=csr))
        self.say()

    def say(self, **items: object) -> HeartbeatAnswer:
        self.sequence += 1
        heartbeat = Heartbeat(agent_version="1.0", boot="boot-1", offer=self.offer, **items)
        answer = receive(self.market, self.site_id, heartbeat, sequence=self.sequence)
        self.orders = answer.leases
        return answer

    def confirm_all(self) -> None:
        self.say()
        self.say(confirmations=tuple(self._confirmation(order) for order in self.orders if _is_proposed(order)))

    def run(self, *, gpu_s: float, samples: int, detail: str) -> None:
        """Report usage and a running attempt for every active lease; a gang's sites send each other 40 MB."""
        active = [order for order in self.orders if order.phase is LeasePhase.ACTIVE]
        self.say(
            usage=tuple(
                Usage(
                    lease_id=order.lease_id,
                    epoch=order.epoch,
                    sequence=1,
                    gpu_milliseconds=round(gpu_s * 1000),
                    samples=samples,
                    egress_bytes=dict.fromkeys(self._others(order), 40_000_000),
                )
                for order in active
            ),
            attempts=tuple(
                AttemptReport(
                    lease_id=order.lease_id,
                    epoch=order.epoch,
                    phase=AttemptPhase.RUNNING,
                    detail=detail,
                    gateway=_gateway(samples),
                )
                for order in active
            ),
        )

    def run_log(self, line: str) -> None:
        """Add a line to the log of the first active lease."""
        streams = streams_of(self.market)
        lease_id = next(order.lease_id for order in self.orders if order.phase is LeasePhase.ACTIVE)
        streams.append(lease_id, "log", streams.state(lease_id, "log").held_bytes, f"{line}\n".encode())

    def _others(self, order: LeaseOrder) -> list[str]:
        assert order.attempt is not None
        assert order.attempt.view is not None
        view = open_view(order.attempt.view, self.market.authority.authority_key)
        return [member.site_id for member in view.members if member.site_id != self.site_id]

    def _confirmation(self, order: LeaseOrder) -> Confirmation:
        key = Ed25519PrivateKey.generate()
        uri = attempt_uri(order.job_id, order.epoch, self.site_id)
        return Confirmation(
            lease_id=order.lease_id,
            epoch=order.epoch,
            attempt_key=public_hex(key),
            csr_pem=certificate_request_pem(key, uri),
            gateway_address=f"{self.site_id}.example:7500",
        )


@dataclass
class Scene:
    """The market, its sites, and the jobs that stand in it by name."""

    market: Market
    clock: ManualClock
    agents: dict[str, Agent]
    jobs: dict[str, str] = field(default_factory=dict)


def make_scene(home: Path, database_url: str = "") -> Scene:
    """Two tenants, an admin, three sites and one's operator; a job on two sites, one on one, one that is left out."""
    clock = ManualClock()
    # One clock that stands still for all tests: no bucket would ever be filled again.
    settings = Settings(home=home, public_url="http://127.0.0.1", database_url=database_url, requests_per_s=100_000)
    market = open_market(settings, clock=clock)
    for tenant_id, name in (("ada", f"Ada {HOSTILE}"), ("bob", "Bob & Sons")):
        create_tenant(market, tenant_id, name, home_site={"ada": "bremen"}.get(tenant_id))
        market.database.write(
            "deposit", lambda session, who=tenant_id: deposit(session, market, who, 500_000_000, f"first-{who}")
        )
        create_user(market, f"{tenant_id}@example.org", PASSWORD, Role.TENANT, tenant_id)
    create_user(market, "root@example.org", PASSWORD, Role.ADMIN)
    market.database.write(
        "fund", lambda session: ledger.fund_equity(session, 50_000_000, "first", clock.now_ms()) and None
    )
    agents = {}
    for site_id, gpus, ask, others in (
        ("bremen", 4, 900_000, ("danzig", "lubeck")),
        ("danzig", 2, 1_100_000, ("bremen",)),
        ("lubeck", 2, 1_000_000, ("bremen",)),
    ):
        agents[site_id] = Agent(market, site_id, _offer(site_id, gpus, ask, others))
        agents[site_id].join()
    create_user(market, "olga@example.org", PASSWORD, Role.OPERATOR, site_id="bremen")
    scene = Scene(market, clock, agents)
    workdir = keep_example(market, "ada").digest
    keep_example(market, "bob")
    submit(scene, "ada", spec_of("spanning", workdir, gpus=6, sites_max=2, budget_micros=200_000_000))
    submit(scene, "ada", spec_of("left-out", workdir, gpus=4, sites_max=1, budget_micros=1_000))
    submit(scene, "bob", spec_of("bobs-own", workdir, gpus=2, sites_max=1, budget_micros=150_000_000))
    for _ in range(3):
        clock.advance_s(5)
        hold_round(market)
        for agent in agents.values():
            agent.confirm_all()
    for agent in agents.values():
        agent.say()
    keep_up(market, wait=lambda: True)
    _train(scene)
    return scene


def submit(scene: Scene, tenant_id: str, spec: JobSpec) -> str:
    job = submit_job(scene.market, tenant_id, spec)
    scene.jobs[spec.name] = job.job_id
    return job.job_id


def spec_of(name: str, workdir: str, *, gpus: int, sites_max: int, budget_micros: int) -> JobSpec:
    return JobSpec(
        name=name,
        run="python train.py",
        workdir_digest=workdir,
        resources=Resources(accelerators=(GpuRequest(gpu_type="cpu-slot", count_min=gpus, count_max=gpus),)),
        market=MarketTerms(
            budget_micros=budget_micros,
            sites_max=sites_max,
            workload=Workload(samples=2_000_000, batch_per_gpu=16, parameters=136_960, flops_per_sample=5.3e7),
        ),
    )


def _offer(site_id: str, gpus: int, ask: int, others: tuple[str, ...]) -> Offer:
    return Offer(
        pools=(
            PoolOffer(
                gpu_type="cpu-slot",
                gpu_ids=tuple(f"{site_id}-{index}" for index in range(gpus)),
                ask_micros_per_gpu_hour=ask,
            ),
        ),
        links=tuple(
            LinkOffer(target=other, bandwidth_bits_per_s=1e9, delay_s=0.02, egress_price_micros_per_gb=10_000)
            for other in others
        ),
        listens=True,
        environment={"torch": "2.13.0"},
    )


def _train(scene: Scene) -> None:
    """Let the sites write logs and measurements for what they run, and report usage."""
    streams = streams_of(scene.market)
    started_ms = scene.clock.now_ms()
    for agent in scene.agents.values():
        for order in agent.orders:
            if order.phase is not LeasePhase.ACTIVE:
                continue
            log = io.StringIO()
            log.write(f"{HOSTILE}\n\x1b[31mred\x1b[0m and \x07bell\n")
            rows = []
            for step in range(1, 41):
                loss = 2.0 + 3.5 * math.exp(-step / 12)
                log.write(f"step {step} loss {loss:.3f}\n")
                row = {"time_ms": started_ms + step * 2000, "step": step * 20, "samples_done": step * 20_000}
                rows.append({**row, "loss": loss, "samples_per_s": 10_000.0, "note": HOSTILE})
                if step % 8 == 0:
                    rows.append({**row, "held_out_loss": loss + 0.1})
            streams.append(order.lease_id, "log", 0, log.getvalue().encode())
            text = "".join(json.dumps(row) + "\n" for row in rows)
            streams.append(order.lease_id, "metrics", 0, text.encode())
    scene.clock.advance_s(80)
    for agent in scene.agents.values():
        agent.run(gpu_s=80, samples=400_000, detail=HOSTILE)


def _is_proposed(order: LeaseOrder) -> bool:
    return order.phase is LeasePhase.PROPOSED


def _gateway(samples: int) -> GatewayReport:
    return GatewayReport(
        view_number=1,
        sealed_round=20,
        chain_hash="ab" * 32,
        applied_round=20,
        outer_hash="cd" * 32,
        samples_done=2 * samples,
    )
