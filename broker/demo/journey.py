"""The demo, step by step: start a market, let sites join, submit jobs, follow them to the end, close the books.

Everything after the start goes through the public API with tokens of the parties themselves. Works with `world` for
who takes part, `processes` for what runs, `observation` for what is seen, `report` for what is said at the end.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import yaml

import training
from broker.bootstrap import open_market
from broker.cli.client import BrokerClient
from broker.cli.config import Context
from broker.demo import processes, world
from broker.demo.display import Display
from broker.demo.errors import DemoError
from broker.demo.observation import Observation
from broker.demo.processes import Places
from broker.demo.world import DemoJob, DemoSite
from broker.identity.tokens import TokenKind, create_token
from broker.ledger import fund_equity
from broker.settings import Settings
from broker.supervise.processes import Supervisor
from broker.supervise.valkey import ValkeySource

POLL_S: Final = 0.4
JOIN_TIMEOUT_S: Final = 60.0
JOURNEY_TIMEOUT_S: Final = 420.0
ADMIN_TOKEN_LIFE_S: Final = 86_400
FINAL_STATES: Final = frozenset({"finished", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """A job of the demo and its id in the market."""

    plan: DemoJob
    job_id: str
    spec: dict[str, Any]


class Journey:
    """One run of the demo inside a running `Supervisor`."""

    def __init__(
        self,
        places: Places,
        supervisor: Supervisor,
        display: Display,
        *,
        sites: Sequence[DemoSite] = world.SITES,
        settings: Mapping[str, str] = world.BROKER_SETTINGS,
    ) -> None:
        """Prepare; nothing is started yet. Another market than the demo's own has its own `sites` and `settings`."""
        self._sites = sites
        self._settings = settings
        self._places = places
        self._supervisor = supervisor
        self._display = display
        self._resources = contextlib.ExitStack()
        self._admin: BrokerClient | None = None
        self._tenants: dict[str, BrokerClient] = {}
        self.tokens: dict[str, str] = {}
        self.submitted: tuple[SubmittedJob, ...] = ()

    def __enter__(self) -> Self:
        """Return the journey."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._resources.close()

    @property
    def admin(self) -> BrokerClient:
        """The admin's client; there is one once the market is started."""
        assert self._admin is not None, "the market is started first"
        return self._admin

    def start_market(self) -> dict[str, str]:
        """Start Valkey and the API, make the first admin token, and return the broker's environment."""
        valkey = processes.private_valkey(self._places)
        self._start_valkey(valkey)
        environment = processes.broker_environment(self._places, valkey.url, self._settings)
        self._display.stage("making the market's keys, tables and first admin token")
        token = self._open_books(environment)
        self._display.stage("starting the API and the portal (gunicorn with Flask, TLS by the market's own authority)")
        self._supervisor.start(processes.api_process(self._places, environment))
        self._admin = self._client(token)
        self._display.say(f"broker: API and portal at {self._places.url}, Valkey on a Unix socket ({valkey.origin})")
        return environment

    def let_sites_join(self) -> None:
        """Invite the sites, start their agents, and wait until the market hears all of them."""
        self._display.stage("measuring what a CPU slot can do")
        ranges = processes.port_ranges(len(self._sites))
        self._display.say("the sites run these jobs as your own user, without a sandbox: the code is the demo's own")
        settings = [
            processes.write_site_settings(self._places, site, ports, self._sites)
            for site, ports in zip(self._sites, ranges, strict=True)
        ]
        processes.measure_once(settings)
        for site, path in zip(self._sites, settings, strict=True):
            self._display.stage(f"{site.site_id} joins with a one-time join string, and its agent starts")
            invitation = self.admin.admin_post("/sites/invite", {"site_id": site.site_id})
            processes.join_site(path, invitation["join_string"])
            self._supervisor.start(processes.agent_process(self._places, site, path))
            self._supervisor.check()
        self._display.stage("the agents make their first offers")
        self._wait(
            lambda: _all_offer(self.admin.admin_list("/sites"), self._sites),
            JOIN_TIMEOUT_S,
            "not all sites made an offer",
        )
        for site in self._sites:
            hub = ", other sites may connect to it" if site.listens else ""
            self._display.say(
                f"site {site.site_id}: {site.slots} CPU slots standing in for GPUs, asks "
                f"{site.ask_micros_per_slot_hour / world.CREDIT_MICROS:g} credits per slot-hour{hub}"
            )

    def submit_jobs(self) -> None:
        """Open the tenants with their credits and submit their jobs through the public API."""
        for tenant_id in world.TENANTS:
            self._open_tenant(tenant_id)
        from broker.cli.job_document import read_job

        submitted = []
        for plan in world.JOBS:
            self._supervisor.check()
            self._display.stage(f"{plan.tenant_id} packs, uploads and submits {plan.name}")
            client = self._tenants[plan.tenant_id]
            document = read_job(write_job(self._places, plan))
            client.upload_workdir(document.packed)
            job = client.submit(document.spec, key=f"demo-{plan.name}")
            submitted.append(SubmittedJob(plan, job["job_id"], document.spec))
            self._display.say(
                f"job {plan.name} of {plan.tenant_id}: bids "
                f"{plan.bid_micros_per_million_samples / world.CREDIT_MICROS:g} credits per million samples; {plan.why}"
            )
        self.submitted = tuple(submitted)

    def start_rounds(self, environment: dict[str, str]) -> None:
        """Start the workers: the first round then sees all three jobs at once."""
        self._display.stage("starting the Celery workers: one clears rounds, one reconciles and settles, with the beat")
        for spec in processes.worker_processes(self._places, environment):
            self._supervisor.start(spec)
        self._supervisor.start(processes.wake_process(self._places, environment))

    def follow(self) -> Observation:
        """Show the jobs until each is final and its books are closed; return what was seen."""
        observation = Observation(self.admin, self._tenants, self.submitted)
        deadline_s = time.monotonic() + JOURNEY_TIMEOUT_S
        while True:
            observation.look()
            self._display.stage(observation.headline)
            self._display.show(observation.board)
            self._supervisor.check()
            if observation.settled:
                return observation
            if time.monotonic() >= deadline_s:
                raise DemoError(
                    f"the jobs were not done within {JOURNEY_TIMEOUT_S:.0f} s ({observation.headline}); "
                    "the logs of all processes are in the demo's folder"
                )
            time.sleep(POLL_S)

    def stay(self) -> None:
        """Keep everything running until Ctrl-C."""
        while True:
            self._supervisor.check()
            time.sleep(POLL_S)

    def _start_valkey(self, source: ValkeySource) -> None:
        assert source.process is not None, "the demo's Valkey is its own"
        self._display.stage(f"starting Valkey ({source.origin}) on a private Unix socket")
        self._supervisor.start(source.process)

    def _open_books(self, environment: dict[str, str]) -> str:
        """Do what `hansa admin init` does, in this process: keys, tables, equity, the first admin token."""
        market = open_market(
            Settings.model_validate({name.removeprefix("HANSA_").lower(): value for name, value in environment.items()})
        )
        now_ms = market.clock.now_ms()
        market.database.write(
            "fund equity", lambda session: fund_equity(session, world.EQUITY_MICROS, "demo", now_ms, memo="demo")
        )
        token = create_token(market, TokenKind.ADMIN, life_s=ADMIN_TOKEN_LIFE_S, label="demo")
        self._places.ca.write_text(market.authority.ca_pem)
        market.database.close()
        return token.text

    def _open_tenant(self, tenant_id: str) -> None:
        self.admin.admin_post("/tenants", {"tenant_id": tenant_id, "name": tenant_id.capitalize()})
        self.admin.admin_post(f"/tenants/{tenant_id}/deposit", {"amount_micros": world.DEPOSIT_MICROS})
        made = self.admin.admin_post(f"/tenants/{tenant_id}/tokens", {"label": "demo"})
        self.tokens[tenant_id] = made["token"]
        self._tenants[tenant_id] = self._client(made["token"])

    def open_portal_accounts(self) -> dict[str, tuple[str, str]]:
        """Give the admin and each tenant an account for the portal; return login -> (role, password)."""
        accounts: dict[str, tuple[str, str]] = {}
        for login, role, tenant_id in [("admin", "admin", None), *((name, "tenant", name) for name in world.TENANTS)]:
            password = secrets.token_urlsafe(12)
            body = {"login": login, "password": password, "role": role, "tenant_id": tenant_id}
            self.admin.admin_post("/users", body)
            accounts[login] = (role, password)
        return accounts

    def _client(self, token: str) -> BrokerClient:
        context = Context(self._places.url, token, self._places.ca)
        return self._resources.enter_context(BrokerClient(context))

    def _wait(self, done: Callable[[], bool], timeout_s: float, complaint: str) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not done():
            self._supervisor.check()
            if time.monotonic() >= deadline_s:
                raise DemoError(f"{complaint} within {timeout_s:.0f} s; the agents' logs say why")
            time.sleep(POLL_S)


def write_job(places: Places, plan: DemoJob) -> Path:
    """Write the example's workdir and a job file for `plan` where a person can read them; return the job file."""
    folder = places.home / "jobs" / plan.name
    example = Path(training.__file__).parent / "examples" / world.EXAMPLE
    shutil.copytree(example, folder, ignore=shutil.ignore_patterns("__pycache__"))
    document = yaml.safe_load((example / "job.yaml").read_text())
    document["name"] = plan.name
    document["resources"] = {"accelerators": f"{world.GPU_TYPE}:{plan.slots}"}
    market = document["market"]
    market["budget"] = plan.budget_micros / world.CREDIT_MICROS
    market["bid"] = plan.bid_micros_per_million_samples / world.CREDIT_MICROS
    market["sites_max"] = plan.sites_max
    market["workload"]["samples"] = plan.samples
    market["sync"]["period_steps"] = world.PERIOD_STEPS
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def _all_offer(rows: list[dict[str, Any]], sites: Sequence[DemoSite]) -> bool:
    offering = {row["site_id"] for row in rows if row["state"] == "live" and row["pools"]}
    return offering >= {site.site_id for site in sites}
