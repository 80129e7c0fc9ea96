"""The three Celery tasks: reconcile, clear, settle. Doorbells for level-triggered work.

A message carries nothing but the task's name, so the worst that a lost, doubled or forged one can
do is to have the work looked at later, or once more than needed; `celery_guard` drops whatever else
stands in Redis. No results are kept. `clear` runs alone in a dedicated worker (`-Q rounds -c 1`).

    celery -A broker.tasks worker -Q rounds -c 1 -P solo
    celery -A broker.tasks worker -Q upkeep -c 1 -P solo -B
"""

from __future__ import annotations

import inspect
import os
import signal
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from celery import Celery
from celery.signals import beat_embedded_init
from celery.worker.consumer import Consumer
from kombu.connection import Connection

from broker.bootstrap import open_market
from broker.celery_doorbell import celery_url
from broker.celery_guard import guard_redis
from broker.forecasts import keep_forecasts
from broker.links.probes import plan_probes
from broker.market import Market
from broker.reconcile import reconcile
from broker.retention import sweep
from broker.rounds.clear import hold_round
from broker.settings import Settings
from broker.settle import settle
from broker.supervise.deathwatch import die_with_parent

ROUNDS_QUEUE: Final = "rounds"
UPKEEP_QUEUE: Final = "upkeep"
SWEEP_S: Final = 3600
# A probe is wanted some times a day: a look reads every link.
LINKS_S: Final = 10.0
# How long a worker waits between two tries to reach a lost Redis. Celery's own wait grows to half a minute, and a
# lost doorbell may delay by one beat only.
RECONNECT_S: Final = 1.0


class SteadyConnection(Connection):
    """A connection that is tried again at a steady pace, however long Redis has been away."""

    def _ensure_connection(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  kombu has no types
        # kombu names its own pace where it consumes and gives it by place where it sends: both give way.
        given = inspect.signature(super()._ensure_connection).bind(*arguments, **options).arguments
        steady = {"interval_start": RECONNECT_S, "interval_step": 0, "interval_max": RECONNECT_S}
        return super()._ensure_connection(**{**given, **steady})  # type: ignore[no-untyped-call]  # as above


class QuietConsumer(Consumer):  # type: ignore[misc]  # celery has no types
    """Celery's consumer without what workers tell each other over Redis: nobody here asks, and anybody could answer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401  celery has no types
        """Take what Celery gives."""
        quiet = {"without_mingle": True, "without_gossip": True, "without_heartbeat": True}
        super().__init__(*arguments, **{**options, **quiet})


def make_app(settings: Settings) -> Celery:
    """Return the Celery application for `settings.redis_url`."""
    guard_redis()
    app = Celery("hansa", broker=celery_url(settings.redis_url))
    app.conf.update(
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_consumer="broker.tasks:QuietConsumer",
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # for ever
        # Messages wait nowhere for an acknowledgement: a ring that dies with its worker is made up by the beat.
        broker_transport_options={"ack_emulation": False},
        task_publish_retry_policy={"max_retries": 1},  # the next beat rings anyway
        timezone="UTC",
        # In memory: a schedule on disk would be locked by the beat of a worker that was killed, and
        # says nothing that these three do not know.
        beat_scheduler="celery.beat:Scheduler",
        task_routes={
            "hansa.clear": {"queue": ROUNDS_QUEUE},
            "hansa.reconcile": {"queue": UPKEEP_QUEUE},
            "hansa.settle": {"queue": UPKEEP_QUEUE},
        },
        beat_schedule={
            "clear": {
                "task": "hansa.clear",
                "schedule": settings.round_s,
                "options": {"expires": settings.round_s},
            },
            "reconcile": {
                "task": "hansa.reconcile",
                "schedule": settings.reconcile_s,
                "options": {"expires": settings.reconcile_s},
            },
            "settle": {
                "task": "hansa.settle",
                "schedule": settings.reconcile_s,
                "options": {"expires": settings.reconcile_s},
            },
        },
    )
    app.amqp.Connection = SteadyConnection
    return app


app = make_app(Settings())


@beat_embedded_init.connect  # type: ignore[untyped-decorator]  # celery has no types
def die_with_the_worker(**_: object) -> None:
    """Let the beat, a child process of its worker, end when the worker is killed, rather than ring on beside the next."""
    if not die_with_parent(os.getppid(), signal.SIGTERM):
        os._exit(0)


@cache
def _market() -> Market:
    # Opened by the first task, not by the import: each worker process has its own connections.
    return open_market(Settings())


@app.task(name="hansa.clear")  # type: ignore[untyped-decorator]  # celery has no types
def clear_task() -> None:
    """Hold a round if one is due."""
    hold_round(_market())


@app.task(name="hansa.reconcile")  # type: ignore[untyped-decorator]  # celery has no types
def reconcile_task() -> None:
    """Bring everything that stands to where it should be, then say when jobs will start and finish."""
    reconcile(_market())
    keep_forecasts(_market())
    if _LOOK_AT_LINKS.is_due(_market().clock.monotonic_s()):
        plan_probes(_market())


@app.task(name="hansa.settle")  # type: ignore[untyped-decorator]  # celery has no types
def settle_task() -> None:
    """Close the holds of jobs that are over; once an hour forget what is past its retention."""
    settle(_market())
    if _SWEEP.is_due(_market().clock.monotonic_s()):
        sweep(_market())


@dataclass(slots=True)
class _Seldom:
    """When this worker last did what is not due with every beat; a new worker does it at once, which does no harm."""

    every_s: float
    last_s: float | None = None

    def is_due(self, now_s: float) -> bool:
        """Say whether it is time again, and count from now if so."""
        if self.last_s is not None and now_s - self.last_s < self.every_s:
            return False
        self.last_s = now_s
        return True


_SWEEP: Final = _Seldom(SWEEP_S)
_LOOK_AT_LINKS: Final = _Seldom(LINKS_S)
