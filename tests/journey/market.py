"""A whole market of real processes for tests that kill them: the demo's, with one slot a site and short clocks.

The books and rows are read from the database itself, because the API is one of the processes that are killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from rich.console import Console
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.audit import audit
from broker.cli.client import BrokerClient
from broker.cli.config import Context
from broker.cli.job_document import read_job
from broker.database.tables import (
    Account,
    Hold,
    Lease,
    Transfer,
    UsageReport,
)
from broker.demo import processes
from broker.demo.display import PlainDisplay
from broker.demo.journey import Journey
from broker.demo.processes import Places
from broker.demo.world import BROKER_SETTINGS, CREDIT_MICROS, GPU_TYPE, DemoSite
from broker.ledger import TransferKind
from broker.supervise import descendants
from broker.supervise.processes import ProcessSpec, Supervisor
from sites.drivers import ranks as rank_starter
from tests.journey.rows import Chain, MarketRows, content_of
from tests.sites.waiting import lives, wait_until
from training.roundlog.manifest import Manifest

T = TypeVar("T")

# Longer than an API or an agent takes to start again on a busy machine: leases outlive both.
LIVENESS_S: Final = 20.0
MARGIN_S: Final = 3.0
HUB_LOST_S: Final = 3.0
SETTINGS: Final = {
    **BROKER_SETTINGS,
    "HANSA_HEARTBEAT_S": "0.5",
    "HANSA_LIVENESS_S": str(LIVENESS_S),
    "HANSA_LIVENESS_MARGIN_S": str(MARGIN_S),
    "HANSA_HUB_LOST_S": str(HUB_LOST_S),
    "HANSA_ROUND_S": "1",
    "HANSA_RECONCILE_S": "0.5",
    "HANSA_SETTLE_S": "5",
    "HANSA_GRACE_S": "0.2",
    # Survivors go on where they are: a move to a better place would hide what is looked for.
    "HANSA_RESTART_S": "600",
}
# One slot each, so that every job of more slots spans; all listen, so that each may be the hub. The last has two slots,
# at a price of which a common job's budget does not reserve one term: else every job of two would go there.
SITES: Final = tuple(
    DemoSite(name, slots=slots, ask_micros_per_slot_hour=ask, listens=True)
    for name, slots, ask in (
        ("bergen", 1, 600_000),
        ("lubeck", 1, 900_000),
        ("visby", 1, 1_200_000),
        ("danzig", 2, 100_000_000),
    )
)
TENANT: Final = "fugger"
STEP_S: Final = 0.08
BATCH: Final = 4
FINAL_STATES: Final = frozenset({"finished", "failed", "cancelled"})
JOB_S: Final = 90.0
"""Longer than any job of the campaign takes on a busy machine."""


class RunningMarket(MarketRows):
    """The processes, the rows, and what a test may do to them."""

    def __init__(
        self,
        places: Places,
        supervisor: Supervisor,
        sites: tuple[DemoSite, ...] = SITES,
        settings: Mapping[str, str] = SETTINGS,
    ) -> None:
        """Know where everything is; nothing is started."""
        super().__init__(places.home, f"sqlite:///{places.broker_home}/market.sqlite3")
        self.sites = sites
        self.settings = dict(settings)
        self.places = places
        self.supervisor = supervisor
        self._resources = contextlib.ExitStack()
        self._specs: dict[str, ProcessSpec] = {}
        self._jobs = 0

    def start(self) -> None:
        """Start the market and let a tenant in."""
        log = self._resources.enter_context((self.places.logs / "journey.log").open("w"))
        journey = self._resources.enter_context(
            Journey(
                self.places,
                self.supervisor,
                PlainDisplay(Console(file=log, width=160)),
                sites=self.sites,
                settings=self.settings,
            )
        )
        environment = journey.start_market()
        journey.let_sites_join()
        journey.start_rounds(environment)
        valkey = processes.private_valkey(self.places).process
        assert valkey is not None
        for spec in (
            valkey,
            processes.api_process(self.places, environment),
            *processes.worker_processes(self.places, environment),
            processes.wake_process(self.places, environment),
            *(
                processes.agent_process(self.places, site, self.places.site_home(site) / "site.yaml")
                for site in self.sites
            ),
        ):
            self._specs[spec.name] = spec
        journey.admin.admin_post("/tenants", {"tenant_id": TENANT, "name": "Fugger"})
        journey.admin.admin_post(f"/tenants/{TENANT}/deposit", {"amount_micros": 1000 * CREDIT_MICROS})
        token = journey.admin.admin_post(f"/tenants/{TENANT}/tokens", {"label": "kills"})["token"]
        self.tenant = self._resources.enter_context(BrokerClient(Context(self.places.url, token, self.places.ca)))
        self._resources.callback(self.database.close)

    def close(self) -> None:
        """Let go of connections and files; the supervisor ends the processes."""
        self._resources.close()

    # --- processes --------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """Kill a process with SIGKILL, as the kernel does when memory is short."""
        self.supervisor.kill(name)

    def restart(self, name: str) -> None:
        """Start a killed process again, as an operator's systemd would, but beside whatever the dead one left."""
        self.supervisor.start(self._specs[name])

    @contextlib.contextmanager
    def settings_changed(self, site_id: str, changes: dict[str, Any], env: dict[str, str]) -> Iterator[None]:
        """Let a site's agent work with other settings meanwhile, as its operator would: edit site.yaml, restart."""
        path = self.places.home / "sites" / site_id / "site.yaml"
        kept, spec = path.read_text(), self._specs[site_id]
        for text, chosen in (
            (yaml.safe_dump(yaml.safe_load(kept) | changes), dataclasses.replace(spec, env={**spec.env, **env})),
            (kept, spec),
        ):
            self.kill(site_id)
            path.write_text(text)
            self._specs[site_id] = chosen
            heard_ms = self.heard_ms(site_id)
            self.restart(site_id)
            wait_until(lambda heard_ms=heard_ms: self.heard_ms(site_id) > heard_ms)
            if text is not kept:
                try:
                    yield
                finally:
                    self.await_forgotten(site_id)

    def restart_dead(self) -> None:
        """Start whatever a failed test left dead, so that the next one begins with a whole market."""
        for name in self._specs:
            if not lives(self.supervisor.pid(name)):
                self.restart(name)

    def pids_of_site(self, site_id: str) -> set[int]:
        """Return all processes that belong to a site: its agent, its wardens, gateways and ranks."""
        marks = [f"{self.places.home}/sites/{site_id}/".encode()]
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                told = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
                if any(mark in told for mark in marks) and lives(int(folder.name)):
                    found.add(int(folder.name))
        return found - {os.getpid()}

    def pids_running(self, site_id: str, word: str) -> set[int]:
        """Return the processes of a site whose command line holds `word`."""
        found = set()
        for pid in self.pids_of_site(site_id):
            with contextlib.suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " "):
                    found.add(pid)
        return found

    def ranks(self, site_id: str) -> set[int]:
        """Return the processes of a site that train."""
        return {pid for pid in self.pids_running(site_id, "training.launch") if not self._starts_ranks(pid)}

    def cut_power(self, site_id: str) -> None:
        """End everything of a site at one instant."""
        pids = self.pids_of_site(site_id)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.supervisor.kill(site_id)
        wait_until(lambda: not self.pids_of_site(site_id))

    @staticmethod
    def _starts_ranks(pid: int) -> bool:
        try:
            return Path(rank_starter.__file__).name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has ended, so that it trains no more either
            return True

    # --- jobs -------------------------------------------------------------------------------------

    def submit(
        self,
        *,
        slots: int,
        seconds: float,
        checkpoint_rounds: int = 5,
        sites: int | None = None,
        most: int | None = None,
        where: Sequence[str] | None = None,
    ) -> str:
        """Submit a job that trains for about `seconds` on `slots` slots, each at a site of its own, and return its id.

        A job that may do with fewer `sites` pays for the dear one, too. One that takes up to `most` slots is elastic;
        `where` names the only sites that it may be at.
        """
        self._jobs += 1
        folder = self.places.home / "jobs" / f"job-{self._jobs}"
        folder.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("small_job.py"), folder / "train.py")
        document = {
            "name": folder.name,
            "workdir": ".",
            "run": "python train.py",
            "envs": {"STEP_S": str(STEP_S)},
            "resources": {"accelerators": f"{GPU_TYPE}:{slots}..{most or slots}"},
            "market": {
                "budget": 3.0 if sites is None else 60.0,
                "bid": 50.0 if sites is None else 5000.0,
                "sites_max": sites or slots,
                **({} if where is None else {"sites_allowed": list(where)}),
                "workload": {
                    "samples": samples_in(seconds, slots),
                    "batch_per_gpu": BATCH,
                    "parameters": 83,
                    "flops_per_sample": 5e7,
                },
                "sync": {
                    "strategy": "diloco",
                    "codec": "fp32",
                    "period_steps": 5,
                    "checkpoint_rounds": checkpoint_rounds,
                    "patience_s": 60,
                },
            },
        }
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        job = read_job(path)
        self.tenant.upload_workdir(job.packed)
        return str(self.tenant.submit(job.spec, key=f"kills-{self._jobs}")["job_id"])

    def lease(self, job_id: str, site_id: str) -> Lease:
        """Return a site's newest lease of a job."""
        return [lease for lease in self.leases(job_id) if lease.site_id == site_id][-1]

    def look(self, chain: Chain, job_id: str) -> None:
        """Read what the job's gateways have sealed by now."""
        chain.look(self.places.home, job_id)

    def tell(self, what: str, *, since_s: float) -> None:
        """Print how long something took; `pytest -rP` shows it."""
        print(f"{what} after {time.monotonic() - since_s:.1f} s")  # noqa: T201 - the campaign reports its figures

    def await_rounds(self, job_id: str, rounds: int, chain: Chain | None = None) -> None:
        """Wait until a number of rounds are sealed and every site of the gang says so."""

        def trained() -> bool:
            if chain is not None:
                chain.look(self.places.home, job_id)
            assert self.job(job_id).state not in FINAL_STATES, self.story(job_id)
            leases = [lease for lease in self.leases(job_id) if lease.state == "active"]
            reports = self.gateways(job_id)
            return bool(leases) and all(
                lease.site_id in reports and reports[lease.site_id].sealed_round >= rounds for lease in leases
            )

        with self._told(job_id):
            wait_until(trained, JOB_S)

    def await_rounds_of_others(self, job_id: str, rounds: int, site_id: str, chain: Chain) -> None:
        """Wait until a number of rounds are sealed, as sites other than `site_id` say."""

        def sealed() -> bool:
            self.look(chain, job_id)
            reports = self.gateways(job_id)
            return any(report.sealed_round >= rounds for each, report in reports.items() if each != site_id)

        self.await_true(job_id, sealed)

    def await_forgotten(self, site_id: str) -> None:
        """Wait until a site's agent is heard again and has nothing of a former attempt left."""
        journal = self.places.home / "sites" / site_id / "journal.sqlite3"

        def forgotten() -> bool:
            with contextlib.closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as database:
                (count,) = database.execute("SELECT count(*) FROM attempt").fetchone()
            return bool(count == 0)

        wait_until(forgotten)

    def await_finished(self, job_id: str, chain: Chain | None = None) -> None:
        """Wait until the job has finished and its hold is closed."""

        def closed() -> bool:
            if chain is not None:
                chain.look(self.places.home, job_id)
            state = self.job(job_id).state
            assert state not in FINAL_STATES - {"finished"}, self.story(job_id)
            hold = self.read(lambda session: session.get_one(Hold, job_id))
            return state == "finished" and hold.closed_ms is not None

        with self._told(job_id):
            wait_until(closed, JOB_S)

    def await_true(self, job_id: str, probe: Callable[[], T], limit_s: float = JOB_S) -> T:
        """Wait for `probe`; where that fails, the job's events are told."""
        with self._told(job_id):
            return wait_until(probe, limit_s)

    @contextlib.contextmanager
    def _told(self, job_id: str) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story(job_id)}") from None

    # --- what must be true afterwards -------------------------------------------------------------

    def assert_sound(self, job_id: str) -> None:
        """Assert that the job was charged once for what was used, and that the market's books are in order."""

        def look(session: Session) -> None:
            assert audit(session) == []
            assert session.scalar(select(func.sum(Account.balance_micros))) == 0
            hold = session.get_one(Hold, job_id)
            charged = session.scalar(
                select(func.sum(UsageReport.charge_micros))
                .join(Lease, Lease.lease_id == UsageReport.lease_id)
                .where(Lease.job_id == job_id)
            )
            assert hold.posted_micros == charged
            assert 0 < hold.posted_micros < hold.amount_micros
            assert hold.posted_micros + hold.voided_micros == hold.amount_micros
            holds = select(func.count()).where(Transfer.job_id == job_id, Transfer.kind == TransferKind.HOLD)
            assert session.scalar(holds) == 1
            for lease in session.scalars(select(Lease).where(Lease.job_id == job_id)):
                assert lease.active_ms is not None
                assert lease.ended_ms is not None
                # What a site is paid for cannot exceed the time between grant and end (and its last report).
                lasted_ms = lease.ended_ms - lease.active_ms + round((LIVENESS_S + MARGIN_S) * 1000)
                assert lease.delivered_gpu_milliseconds <= lasted_ms * lease.gpus

        self.read(look)

    def assert_released(self, job_id: str) -> None:
        """Assert that a cancelled job's hold is closed, with no more posted than its sites delivered."""

        def closed() -> bool:
            return self.read(lambda session: session.get_one(Hold, job_id).closed_ms) is not None

        self.await_true(job_id, closed)
        assert self.job(job_id).state == "cancelled"
        assert self.read(audit) == []

    def assert_trained_once(self, job_id: str, chain: Chain, samples: int) -> None:
        """Assert that the chain is one line with each sample in it once, and that checkpoints and outputs agree with it."""
        numbers = sorted(chain.rounds)
        assert numbers == list(range(1, numbers[-1] + 1))
        done: set[int] = set()
        for number in numbers:
            contents = set(chain.rounds[number].values())
            assert len(contents) == 1, f"round {number} has two seals"
            manifest = Manifest.model_validate_json(contents.pop())
            for entry in manifest.entries:
                header = json.loads(content_of(entry.contribution))
                for each in header["samples"]:
                    own = set(range(each["start"], each["stop"]))
                    assert not done & own, f"round {number} has samples again"
                    done |= own
        assert done == set(range(samples))
        newest = self.checkpoints(job_id)
        assert newest
        assert all(row.samples_done == samples for row in newest)
        assert len({(row.round_number, row.chain_hash, row.outer_hash) for row in newest}) == 1
        assert newest[0].round_number == numbers[-1]
        summary = self.summary(job_id)
        assert summary["outer_hash"] == newest[0].outer_hash
        assert summary["samples"] == samples

    def summary(self, job_id: str) -> dict[str, Any]:
        """Return the summary.json that the job's script left."""
        target = self.places.home / f"{job_id}-summary.json"
        self.tenant.download(f"/v1/jobs/{job_id}/artifacts/summary.json", target)
        return dict(json.loads(target.read_text()))


def samples_in(seconds: float, slots: int) -> int:
    """Return how many samples `slots` slots train in `seconds`, as whole steps of all of them."""
    return max(1, round(seconds / STEP_S)) * BATCH * slots


@contextlib.contextmanager
def running_market(
    failed: Callable[[], bool], sites: tuple[DemoSite, ...] = SITES, settings: Mapping[str, str] = SETTINGS
) -> Iterator[RunningMarket]:
    """Start a market and end it without a trace; only its logs stay where a test has `failed`."""
    # Not the demo's name: whoever clears up after a demo must not take this market's ground away.
    places = Places(Path(tempfile.mkdtemp(prefix="hansa-kills-", dir="/tmp")), *processes.free_ports(2))
    places.logs.mkdir(exist_ok=True)
    begun = time.monotonic()
    supervisor = Supervisor(places.logs, end_together=True)
    market = RunningMarket(places, supervisor, sites, settings)
    try:
        with supervisor:
            try:
                market.start()
                print(f"the market stood after {time.monotonic() - begun:.1f} s")  # noqa: T201
                yield market
            finally:
                market.close()
        wait_until(lambda: not descendants.marked(f"HANSA_HOME={places.broker_home}"), 5)
        wait_until(lambda: not any(market.pids_of_site(site.site_id) for site in sites), 5)
    except BaseException:
        print(f"the logs are in {places.home}")  # noqa: T201
        raise
    if not failed():
        shutil.rmtree(places.home)
