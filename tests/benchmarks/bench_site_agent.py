"""What sites cost and how many one broker bears: an idle agent, a start on a warm site, heartbeats, submissions.

    python -m tests.benchmarks.bench_site_agent [--agents 1000] [--only S1]

S1  a real agent process, idle, heartbeats every 5 s: resident memory, share of a core
S2  from the grant of a lease to the first optimizer.step, one rank, on a site that ran a job before (no broker's round in it)
S3  simulated agents at 5 s heartbeats through gunicorn: p50 and p99 from when each was due, so a queue is not left out
S4  durable job submissions a second, four tenants' connections
S5  heartbeats a second against a bare Flask JSON endpoint under the same gunicorn, in the same run

One broker process, SQLite with synchronous=FULL, on the machine that also runs the clients.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from broker.bootstrap import open_market
from broker.database.tables import Artifact
from broker.database.uploads import WorkdirUpload
from broker.identity.join import invite_site
from broker.identity.tokens import TokenKind, create_token
from broker.market import Market as Broker
from broker.settings import Settings
from broker.tenants import create_tenant, deposit
from sites.client import BrokerClient, enrol
from sites.identity import (
    Identity,
    certificate_request_pem,
    decode_join_string,
    prepare_identity,
    site_uri,
    store_identity,
)
from sites.protocol import AttemptPhase, Heartbeat, Offer, PoolOffer
from tests.broker.speaking import spec
from tests.sites.conftest import SITE_YAML, job
from tests.sites.market import Grant, Market
from tests.sites.waiting import wait_until
from training.clock import SystemClock

HEARTBEAT_S = 5.0
IDLE_S = 30.0
LOAD_S = 10.0
CONNECTIONS = 8
BARE = "import flask\napp = flask.Flask('bare')\n@app.post('/')\ndef answer(): return flask.jsonify(flask.request.get_json())\n"
FIRST_STEP = """
import os, time
import torch, training
model = torch.nn.Linear(10, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(torch.randn(1000, 10), torch.randn(1000, 10))
told = False
with training.join(model, optimizer, data=data) as session:
    for inputs, targets in session.batches():
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not told:
            print(f"first step at {time.time()}", flush=True)
            told = True
"""


class Served:
    """A broker under gunicorn with its sites and a tenant, and a bare Flask beside it."""

    def __init__(self, folder: Path, agents: int) -> None:
        """Found a market and start both servers."""
        self.folder = folder
        port, bare_port = 17_400, 17_401
        self.url, self.bare_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{bare_port}"
        settings = {
            "HANSA_HOME": str(folder / "broker"),
            "HANSA_PUBLIC_URL": self.url,
            "HANSA_REQUESTS_PER_S": "100000",
            "HANSA_SITE_REQUESTS_PER_S": "100000",
            "HANSA_JOBS_QUEUED_PER_TENANT_MAX": "1000000",
        }
        environment = {**os.environ, **settings}
        os.environ.update(settings)
        market = open_market(Settings())
        (folder / "bare.py").write_text(BARE)
        serve = [sys.executable, "-m", "broker.cli.main", "broker", "serve", "--plain-http", "--workers", "1"]
        serve += ["--threads", "16", "--bind", f"127.0.0.1:{port}"]
        plain = [sys.executable, "-m", "gunicorn", "-w", "1", "--threads", "16", "-k", "gthread"]
        plain += ["-b", f"127.0.0.1:{bare_port}", "bare:app", "--no-control-socket"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes = [
            subprocess.Popen(serve, env=environment, **quiet),
            subprocess.Popen(plain, env=environment, cwd=folder, **quiet),
        ]
        self.token, self.workdir = _found(market)
        wait_until(lambda: _answers(f"{self.url}/healthz") and _answers(self.bare_url), limit_s=120)
        self.invitations = {f"site{n:04}": invite_site(market, f"site{n:04}") for n in range(agents)}
        self.idle_invitation = invite_site(market, "hamburg")
        market.database.close()

    def close(self) -> None:
        """End both servers."""
        for process in self.processes:
            process.terminate()
            process.wait(30)


def _found(market: Broker) -> tuple[str, str]:
    create_tenant(market, "acme", "Acme")
    now_ms, workdir = market.clock.now_ms(), "0" * 64

    def work(session: object) -> None:
        deposit(session, market, "acme", 10**14, "first")  # type: ignore[arg-type]  # the database's session
        session.add(Artifact(digest=workdir, size_bytes=1, complete=True, created_ms=now_ms))  # type: ignore[attr-defined]
        session.flush()  # type: ignore[attr-defined]
        session.add(WorkdirUpload(tenant_id="acme", digest=workdir, created_ms=now_ms))  # type: ignore[attr-defined]

    market.database.write("found", work)
    return create_token(market, TokenKind.TENANT, tenant_id="acme", life_s=86_400).text, workdir


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=1).status_code < httpx.codes.INTERNAL_SERVER_ERROR
    return False


def join(folder: Path, site_id: str, invitation: str) -> Identity:
    """Let a site in as `hansa site join` does."""
    invited = decode_join_string(invitation)
    key = prepare_identity(folder)
    store_identity(folder, invited, enrol(invited, certificate_request_pem(key, site_uri(site_id))))
    return Identity(folder, SystemClock())


def idle_agent(served: Served) -> Iterator[tuple[str, str, str]]:
    """S1: a real agent with nothing to do."""
    (served.folder / "site.yaml").write_text(SITE_YAML)
    join(served.folder / "hamburg", "hamburg", served.idle_invitation)
    with _agent(served.folder / "site.yaml") as pid:
        watched = psutil.Process(pid)
        threading.Event().wait(3 * HEARTBEAT_S)
        before, began = watched.cpu_times(), time.monotonic()
        threading.Event().wait(IDLE_S)
        after, lasted = watched.cpu_times(), time.monotonic() - began
        used = after.user + after.system - before.user - before.system
        yield "S1 agent, resident memory", f"{watched.memory_info().rss / 1e6:.1f} MB", "80 MB"
        yield "S1 agent, share of a core when idle", f"{used / lasted:.2%}", "1 %"


@contextlib.contextmanager
def _agent(settings: Path) -> Iterator[int]:
    """Run a real agent; yield its process id."""
    command = [sys.executable, "-m", "sites", "run", "--settings", str(settings), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


def first_step(folder: Path) -> Iterator[tuple[str, str, str]]:
    """S2: the second of two jobs at one site."""
    market = Market()
    (folder / "site.yaml").write_text(SITE_YAML)
    join(folder / "hamburg", "hamburg", market.join_string("hamburg"))
    took = {}
    with _agent(folder / "site.yaml"):
        wait_until(lambda: bool(market.heartbeats), limit_s=60)
        for name in ("cold", "warm"):
            workload = job(market, folder / name, FIRST_STEP)
            began = time.time()
            market.grants[name] = Grant(name, f"job_{name}", workload)
            stream = (name, "log")
            wait_until(lambda stream=stream: b"first step at" in market.streams.get(stream, b""), limit_s=120)
            said = market.streams[stream].decode().partition("first step at ")[2].split()[0]
            took[name] = float(said) - began
            wait_until(lambda name=name: market.reports[name].phase is AttemptPhase.EXITED, limit_s=60)
            del market.grants[name]
    market.close()
    yield "S2 grant to first step, process, warm", f"{took['warm']:.1f} s (first job {took['cold']:.1f} s)", "5 s"


def heartbeats(served: Served) -> Iterator[tuple[str, str, str]]:
    """S3 and S5: agents that each beat every 5 s, then as fast as they can."""
    beats = [
        _beat(served, join(served.folder / "agents" / site_id, site_id, invitation), site_id)
        for site_id, invitation in served.invitations.items()
    ]
    late: list[float] = []
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda beat: beat(), beats))  # the first of each writes its offer
        began = time.monotonic()
        for turn in range(2):
            for index, beat in enumerate(beats):
                due = began + HEARTBEAT_S * (turn + index / len(beats))
                threading.Event().wait(max(0.0, due - time.monotonic()))
                pool.submit(lambda beat=beat, due=due: (beat(), late.append(time.monotonic() - due)))
    cuts = statistics.quantiles(late, n=100)
    yield f"S3 {len(beats)} agents, heartbeat p50", f"{cuts[49] * 1000:.0f} ms", ""
    yield f"S3 {len(beats)} agents, heartbeat p99", f"{cuts[98] * 1000:.0f} ms", "300 ms at 1,000"
    rate = _rate([beats[n::CONNECTIONS] for n in range(min(CONNECTIONS, len(beats)))])
    body = Heartbeat(agent_version="1", boot="b", offer=OFFER).model_dump_json(exclude_defaults=True).encode()
    http = httpx.Client(limits=httpx.Limits(max_connections=CONNECTIONS))
    headers = {"Content-Type": "application/json"}
    bare = _rate([[lambda: http.post(served.bare_url, content=body, headers=headers)]] * CONNECTIONS)
    yield "S5 heartbeats a second", f"{rate:.0f} /s", ""
    yield "S5 bare Flask JSON endpoint", f"{bare:.0f} /s", ""
    yield "S5 heartbeat / bare", f"{rate / bare:.2f}", "0.33"


OFFER = Offer(
    pools=(PoolOffer(gpu_type="A100", gpu_ids=tuple(str(n) for n in range(8)), ask_micros_per_gpu_hour=1_000_000),)
)


def _beat(served: Served, identity: Identity, site_id: str) -> Callable[[], object]:
    client = BrokerClient(identity)
    heartbeat = Heartbeat(agent_version="1", boot=site_id, offer=OFFER)
    return lambda: client.heartbeat(heartbeat)


def submissions(served: Served) -> Iterator[tuple[str, str, str]]:
    """S4: jobs in the database, with hold and event, when the answer comes."""
    body = spec(2).model_copy(update={"workdir_digest": served.workdir}).model_dump_json()
    numbers = iter(range(10**9))

    def submit() -> None:
        key = {"Idempotency-Key": f"bench-{next(numbers)}", "Authorization": f"Bearer {served.token}"}
        answer = http.post(f"{served.url}/v1/jobs", content=body, headers={"Content-Type": "application/json", **key})
        answer.raise_for_status()

    with httpx.Client(timeout=30) as http:
        yield "S4 durable submissions", f"{_rate([[submit]] * 4):.0f} /s", "100 /s"


def _rate(turns: list[list[Callable[[], object]]]) -> float:
    """Return how many calls a second come back when each list is gone through in a circle by a thread of its own."""
    until = time.monotonic() + LOAD_S

    def work(calls: list[Callable[[], object]]) -> int:
        count = 0
        while time.monotonic() < until:
            calls[count % len(calls)]()
            count += 1
        return count

    with ThreadPoolExecutor(len(turns)) as pool:
        return sum(pool.map(work, turns)) / LOAD_S


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--only", choices=("S1", "S2", "S3", "S4"))
    chosen = parser.parse_args()
    table = Table("figure", "measured", "target")
    with tempfile.TemporaryDirectory(prefix="hansa-") as name:
        folder = Path(name)
        if chosen.only in {None, "S2"}:
            (folder / "s2").mkdir()
            for row in first_step(folder / "s2"):
                table.add_row(*row)
        if chosen.only != "S2":
            served = Served(folder, chosen.agents)
            try:
                for part, measure in (("S1", idle_agent), ("S3", heartbeats), ("S4", submissions)):
                    if chosen.only in {None, part}:
                        for row in measure(served):
                            table.add_row(*row)
            finally:
                served.close()
    Console().print(table)


if __name__ == "__main__":
    main()
