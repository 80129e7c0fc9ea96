"""How long the server takes for each page of a large market, and how much it sends: the portal's figures.

    PYTHONPATH=. python tests/benchmarks/bench_pages.py [--jobs 10000 --sites 200]

The market is written straight into SQLite: one tenant with all jobs, sites of four pools with 64 GPUs each, 399 rounds.
Times are of this process's CPU, the median of several requests without a network between; beside them the sign-in page,
which reads nothing, as the reference of this machine. Bytes are of the page alone, uncompressed; style and scripts come
once and are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from sqlalchemy import insert
from sqlalchemy.orm import Session

from broker.api.app import create_app
from broker.bootstrap import open_market
from broker.database.tables import Account, Event, Gpu, Hold, Job, Pool, Round, Site
from broker.identity.passwords import Role, create_user, open_session
from broker.market import Market
from broker.portal import portal
from broker.portal.blueprint import SESSION_COOKIE
from broker.settings import Settings
from broker.tenants import create_tenant
from sites.protocol import Offer, PoolOffer
from tests.broker.portal.scene import spec_of
from training.clock import ManualClock

TYPES: Final = ("H100", "A100", "L40S", "cpu-slot")
GPUS_PER_POOL: Final = 64
ROUNDS: Final = 399
REPEATS: Final = 7
MS_MAX, BYTES_MAX = 100.0, 200_000
STATES: Final = ("queued", "running", "finished", "failed", "cancelled")
CERTIFICATE: Final = {
    "welfare_micros_per_hour": 900_000_000,
    "bound_micros_per_hour": 905_000_000,
    "gap_micros_per_hour": 5_000_000,
    "turnover_micros_per_hour": 700_000_000,
    "uplift_micros_per_hour": 1_000_000,
    "regret_sum_micros_per_hour": 4_000_000,
    "slack_sum_micros_per_hour": 1_000_000,
    "lp_objective_micros_per_hour": 905_000_000,
    "checks": {},
}


def fill(market: Market, jobs: int, sites: int) -> None:
    """Write the market's rows."""
    now_ms = market.clock.now_ms()
    create_tenant(market, "ada")
    names = [f"site-{number:03d}" for number in range(sites)]
    pools = [(site_id, gpu_type) for site_id in names for gpu_type in TYPES]
    prices = json.dumps({f"{site_id}/{gpu_type}": 1_000_000 + len(site_id) for site_id, gpu_type in pools})
    spec = spec_of("job", "0" * 64, gpus=4, sites_max=2, budget_micros=1_000_000).model_dump_json()
    offer = Offer(
        pools=tuple(
            PoolOffer(
                gpu_type=gpu_type,
                gpu_ids=tuple(f"{gpu_type}-{n}" for n in range(GPUS_PER_POOL)),
                ask_micros_per_gpu_hour=900_000,
            )
            for gpu_type in TYPES
        )
    ).model_dump_json()

    def work(session: Session) -> None:
        def add(table: type[Any], rows: list[dict[str, Any]]) -> None:
            session.execute(insert(table), rows)

        add(Site, [_site(name, offer, now_ms) for name in names])
        add(Account, [_account(f"site/{name}", name, now_ms) for name in names])
        add(Pool, [_pool(site_id, gpu_type) for site_id, gpu_type in pools])
        for site_id, gpu_type in pools:
            pool_id = f"{site_id}/{gpu_type}"
            add(
                Gpu,
                [
                    {"site_id": site_id, "gpu_id": f"{gpu_type}-{n}", "pool_id": pool_id, "present": True}
                    for n in range(GPUS_PER_POOL)
                ],
            )
        add(Round, [_round(number, prices, now_ms) for number in range(1, ROUNDS + 1)])
        add(Job, [_job(number, spec, now_ms) for number in range(jobs)])
        add(
            Hold,
            [
                {"job_id": f"job_{n}", "tenant_id": "ada", "amount_micros": 1, "posted_micros": 0, "voided_micros": 0}
                for n in range(jobs)
            ],
        )
        add(
            Event, [{"kind": "job", "job_id": f"job_{n}", "after": "queued", "created_ms": now_ms} for n in range(jobs)]
        )

    market.database.write("fill", work)


def _site(name: str, offer: str, now_ms: int) -> dict[str, Any]:
    return {"site_id": name, "state": "live", "offer": offer, "joined_ms": now_ms, "heard_ms": now_ms}


def _account(account_id: str, owner: str, now_ms: int) -> dict[str, Any]:
    return {"account_id": account_id, "kind": "site", "owner": owner, "created_ms": now_ms}


def _pool(site_id: str, gpu_type: str) -> dict[str, Any]:
    return {
        "pool_id": f"{site_id}/{gpu_type}",
        "site_id": site_id,
        "gpu_type": gpu_type,
        "ask_micros_per_gpu_hour": 900_000,
    }


def _round(number: int, prices: str, now_ms: int) -> dict[str, Any]:
    return {
        "round_number": number,
        "taken_ms": now_ms,
        "committed_ms": now_ms,
        "snapshot_digest": "0" * 64,
        "clearing_digest": "0" * 64,
        "status": "optimal",
        "solver": "none",
        "solve_s": 1.0,
        "prices": prices,
        "certificate": json.dumps(CERTIFICATE),
        "dropped": "[]",
        "jobs_considered": 10_000,
        "placements_made": 9_000,
    }


def _job(number: int, spec: str, now_ms: int) -> dict[str, Any]:
    return {
        "job_id": f"job_{number}",
        "tenant_id": "ada",
        "name": f"job-{number}",
        "state": STATES[number % len(STATES)],
        "spec": spec,
        "samples_done": number,
        "reason_code": "waiting",
        "reason": "waits for the next round",
        "submitted_ms": now_ms + number,
    }


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--jobs", type=int, default=10_000)
    arguments.add_argument("--sites", type=int, default=200)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder), requests_per_s=100_000)
        market = open_market(settings, clock=ManualClock())
        fill(market, given.jobs, given.sites)
        people = {
            "": None,
            "tenant": create_user(market, "ada@example.org", "correct horse battery", Role.TENANT, "ada"),
            "admin": create_user(market, "root@example.org", "correct horse battery", Role.ADMIN),
            "operator": create_user(
                market, "olga@example.org", "correct horse battery", Role.OPERATOR, site_id="site-000"
            ),
        }
        clients = {}
        app = create_app(market, [portal])
        for role, person in people.items():
            clients[role] = app.test_client()
            if person is not None:
                clients[role].set_cookie(SESSION_COOKIE, open_session(market, person))
        pages = (
            ("", "/sign-in"),
            ("tenant", "/jobs"),
            ("tenant", "/jobs?state=running"),
            ("tenant", "/jobs/job_1"),
            ("tenant", "/jobs/new"),
            ("tenant", "/market"),
            ("operator", "/site"),
            ("operator", "/site/delivery.json"),
            ("operator", "/site/statement"),
            ("admin", "/admin/sites"),
            ("admin", "/admin/sites/site-000"),
            ("admin", "/admin/rounds"),
            ("admin", "/admin/rounds/200"),
            ("admin", "/admin/replay?round=200"),
            ("admin", "/admin/replay/rounds.json"),
            ("admin", "/admin/forecasts"),
            ("admin", "/admin/tenants"),
            ("admin", "/admin/accounts"),
            ("admin", "/admin/ledger"),
        )
        reference_ms, slow = 0.0, 0
        print(f"{given.jobs} jobs, {given.sites} sites, {ROUNDS} rounds")
        print(f"{'page':34} {'who':9} {'CPU ms':>8} {'x sign-in':>10} {'kB':>7}")
        for role, path in pages:
            took, size = _measured(clients[role], path)
            reference_ms = reference_ms or took
            slow += took > MS_MAX or size > BYTES_MAX
            print(f"{path:34} {role or 'anyone':9} {took:8.1f} {took / reference_ms:10.1f} {size / 1000:7.1f}")
        print(f"{slow} of {len(pages)} beyond {MS_MAX:.0f} ms or {BYTES_MAX // 1000} kB")
        market.database.close()


def _measured(client: Any, path: str) -> tuple[float, int]:
    times = []
    for _ in range(REPEATS + 1):
        began_s = time.process_time()
        answer = client.get(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code}"
        size = len(answer.data)
        times.append((time.process_time() - began_s) * 1000)
    return statistics.median(times[1:]), size  # the first fills the caches of templates and of the database


if __name__ == "__main__":
    main()
