"""Real Celery over a real Valkey: a ring leads to a round, a forged message to nothing, a dead server to no failure."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.beat import Scheduler, SchedulingError

from broker.celery_doorbell import CeleryDoorbell
from broker.reconcile import reconcile
from broker.rounds.clear import hold_round
from broker.settings import Settings
from broker.supervise.errors import ServiceUnavailableError
from broker.supervise.processes import Supervisor
from broker.supervise.valkey import ValkeySource, resolve
from broker.tasks import UPKEEP_QUEUE, make_app
from tests.broker.speaking import Scene

REPOSITORY = Path(__file__).parents[2]
WAIT_S = 40.0
# What a submit may take when its doorbell is dead: two connections that are refused, and no retry, which would take six.
QUICK_S = 5.0


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    # Not pytest's own folder: its path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="hansa-celery-") as folder, Supervisor(Path(folder)) as supervisor:
        yield supervisor


@pytest.fixture
def valkey(supervisor: Supervisor) -> Iterator[ValkeySource]:
    """A server of this test's own, since some tests kill it."""
    with tempfile.TemporaryDirectory(prefix="hansa-valkey-") as folder:
        try:
            source = resolve({}, Path(folder))
        except ServiceUnavailableError as error:
            pytest.skip(str(error))
        assert source.process is not None
        supervisor.start(source.process)
        yield source


@pytest.fixture
def scene(sqlite_schema: Path, tmp_path: Path, valkey: ValkeySource) -> Iterator[Scene]:
    """A market that rings through Celery; the tasks themselves know no difference between databases."""
    path = tmp_path / "market.sqlite3"
    path.write_bytes(sqlite_schema.read_bytes())
    scene = Scene(f"sqlite:///{path}", tmp_path / "home")
    object.__setattr__(scene.market, "doorbell", CeleryDoorbell(valkey.url))
    yield scene
    scene.close()


class Worker:
    """The dedicated worker of rounds, as the module's docstring says to start it."""

    def __init__(self, scene: Scene, valkey: ValkeySource, log: Path) -> None:
        environment = os.environ | {
            "HANSA_HOME": str(scene.market.settings.home),
            "HANSA_DATABASE_URL": scene.market.database.url,
            "HANSA_REDIS_URL": valkey.url,
        }
        words = ("worker", "-Q", "rounds", "-c", "1", "-P", "solo", "-l", "INFO", "--without-mingle")
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "broker.tasks", *words],
                cwd=REPOSITORY,
                env=environment,
                stdout=stream,
                stderr=stream,
            )

    def is_ready(self) -> bool:
        return b"ready." in self.log.read_bytes()

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def start_worker(scene: Scene, valkey: ValkeySource, tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    workers: list[Worker] = []

    def start() -> Worker:
        worker = Worker(scene, valkey, tmp_path / f"worker-{len(workers)}.log")
        workers.append(worker)
        _until(worker.is_ready, "the worker starts")
        return worker

    yield start
    for worker in workers:
        worker.stop()


def test_a_ring_leads_to_a_round_and_what_strangers_push_to_nothing(
    scene: Scene, valkey: ValkeySource, start_worker: Callable[[], Worker], tmp_path: Path
) -> None:
    worker = start_worker()
    first = scene.submit()
    _until(lambda: scene.job(first).state == "proposed", "the ring of a submit leads to a round")
    marker = tmp_path / "pickled"
    events = len(scene.events("job"))
    hostile = [
        _message(base64.b64encode(_pickled(marker)).decode(), content_type="application/x-python-serialize"),
        _message(_body(args=["drop", "tables"], kwargs={"job_id": "x"})),
        _message(_body(), task="os.system"),
        _message(_body(), id=None),  # celery 5.7 begins again for ever
        _message(_body(), id=["a", {}]),
        _message(_body(), task=None),
        _message(_body(), eta="9999-01-01T00:00:00-23:59"),
        _message(_body(), expires={"at": 1}),
        _message(_body(), compression="zlib"),
        _message("%%%"),
        _message("A" * 900_000),
        _with(headers=7),
        _with(properties=None),
        _with(body={"a": 1}),
        "garbage",  # celery 5.7 ends
        "7",
        "[" * 5000,
        "\udcff",
        "",
    ]
    _push(valkey, *hostile)
    second = scene.submit(1)
    _until(lambda: scene.job(second).state == "proposed" or worker.is_over(), "the worker goes on")
    assert not worker.is_over(), worker.log.read_text()[-3000:]
    assert not marker.exists()
    assert len(scene.events("job")) == events + 2  # submitted and proposed, nothing besides
    assert scene.rounds() == 2
    # A ring from before may place the second job while some of the hostile messages still wait.
    for reason in ("not JSON", "no id", "unknown task", "arguments", "too large"):
        _until(lambda reason=reason: reason in worker.log.read_text(), f"the log says {reason!r}")
    assert not worker.is_over()
    assert "Traceback" not in worker.log.read_text()


def test_keys_of_another_kind_and_orders_to_workers_stop_no_worker(
    scene: Scene, valkey: ValkeySource, start_worker: Callable[[], Worker]
) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        client.set("_kombu.binding.rounds", "x")
        client.hset("unacked", "tag", "garbage")
        client.zadd("unacked_index", {"tag": 1})
        client.set("rounds", "no list")
    worker = start_worker()
    with redis.Redis.from_url(valkey.url) as client:
        shutdown = {"method": "shutdown", "arguments": {}, "destination": None, "ticket": "t"}
        order = _message(base64.b64encode(json.dumps(shutdown).encode()).decode())
        assert client.publish("/0.celery.pidbox", order) == 0, "somebody listens to orders"
        client.delete("rounds")
        client.set("rounds", "no list again")
        _until(lambda: client.type("rounds") != b"string" or worker.is_over(), "the key is removed")
    job_id = scene.submit()
    _until(lambda: scene.job(job_id).state == "proposed" or worker.is_over(), "the worker goes on")
    assert not worker.is_over(), worker.log.read_text()[-3000:]
    assert "Traceback" not in worker.log.read_text()


def test_without_valkey_a_submit_succeeds_as_quickly_and_the_next_beat_catches_up(
    scene: Scene, supervisor: Supervisor
) -> None:
    supervisor.kill("valkey")
    started_s = time.perf_counter()
    job_id = scene.submit()
    assert time.perf_counter() - started_s < QUICK_S
    for site in scene.sites.values():
        site.beat()
    assert time.perf_counter() - started_s < 3 * QUICK_S
    assert scene.job(job_id).state == "queued"
    assert reconcile(scene.market)
    assert hold_round(scene.market) is not None
    assert scene.job(job_id).state == "proposed"


def test_the_beat_rings_again_when_its_server_is_back(valkey: ValkeySource, supervisor: Supervisor) -> None:
    app = make_app(Settings(redis_url=valkey.url))
    beat = Scheduler(app)
    entry = beat.schedule["reconcile"]
    with redis.Redis.from_url(valkey.url) as client:
        beat.apply_async(entry, beat.producer, advance=False)
        assert client.llen(UPKEEP_QUEUE) == 1
        assert valkey.process is not None
        supervisor.kill(valkey.process.name)
        for _ in range(2):
            with pytest.raises(SchedulingError):
                beat.apply_async(entry, beat.producer, advance=False)
        supervisor.start(valkey.process)
        beat.apply_async(entry, beat.producer, advance=False)
        assert client.llen(UPKEEP_QUEUE) == 1
    beat.close()


def test_a_server_that_hangs_holds_up_no_submit(scene: Scene, supervisor: Supervisor) -> None:
    """Worse than a dead server: one that takes connections and never answers."""
    supervisor.kill("valkey", signal.SIGSTOP)
    try:
        done = threading.Event()
        job_ids: list[str] = []

        def submit() -> None:
            job_ids.append(scene.submit())
            done.set()

        threading.Thread(target=submit, daemon=True).start()
        assert done.wait(2 * QUICK_S), "a hanging Valkey holds up a submit"
        assert scene.job(job_ids[0]).state == "queued"
    finally:
        supervisor.kill("valkey", signal.SIGCONT)


def _push(valkey: ValkeySource, *messages: str) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        for message in messages:
            client.lpush("rounds", message.encode("utf-8", "surrogateescape"))


def _message(body: str, *, content_type: str = "application/json", **headers: Any) -> str:
    """A ring as Celery writes it, with `headers` in the place of its own; those that are None are left out."""
    identity = str(uuid.uuid4())
    own = {"lang": "py", "task": "hansa.clear", "id": identity, "root_id": identity, "argsrepr": "()"}
    return json.dumps(
        {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": content_type,
            "headers": {name: value for name, value in (own | headers).items() if value is not None},
            "properties": {
                "correlation_id": identity,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "rounds"},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


def _with(**fields: Any) -> str:
    return json.dumps(json.loads(_message(_body())) | fields)


def _body(args: list[Any] | None = None, kwargs: dict[str, Any] | None = None) -> str:
    return base64.b64encode(json.dumps([args or [], kwargs or {}, {}]).encode()).decode()


def _pickled(marker: Path) -> bytes:
    """Return a pickle that would make a file when loaded, written by hand: nothing here imports the module."""
    return b"cbuiltins\nopen\n(V" + str(marker).encode() + b"\nVw\ntR."


def _until(condition: Callable[[], bool], what: str) -> None:
    ends_s = time.monotonic() + WAIT_S
    waiting = threading.Event()
    while not condition():
        assert time.monotonic() < ends_s, f"waited {WAIT_S:g} s in vain: {what}"
        waiting.wait(0.05)
