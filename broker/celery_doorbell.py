"""The doorbell over Celery and Redis: one message per ring, sent without retry or wait.

Work is rung through Celery's queues, watchers through a Redis channel that `broker.wake` serves.
Whatever goes wrong is logged and dropped: the beat comes anyway.
"""

from __future__ import annotations

import json
from typing import Final

import redis
import structlog
from celery import Celery

from broker.celery_guard import guard_redis

WAKE_CHANNEL: Final = "hansa:wake"
REDIS_WAIT_S: Final = 0.5

_log = structlog.get_logger(__name__)


def celery_url(redis_url: str) -> str:
    """Return `redis_url` as Celery spells it: redis-py says `unix://`, kombu `redis+socket://`."""
    return redis_url.replace("unix://", "redis+socket://", 1)


class CeleryDoorbell:
    """Rings through the Redis or Valkey at `redis_url` (`redis://…` or `unix://…`)."""

    def __init__(self, redis_url: str) -> None:
        """Prepare the connections; nothing is sent yet, and Redis need not be there."""
        guard_redis()  # it only sends, but kombu's own channel keeps bindings in Redis, where anybody could spoil them
        self._app = Celery("hansa-doorbell", broker=celery_url(redis_url))
        self._app.conf.update(
            task_serializer="json",
            task_ignore_result=True,
            # Without max_retries kombu tries again for six seconds, and a heartbeat's answer would wait for it.
            broker_transport_options={
                "socket_connect_timeout": REDIS_WAIT_S,
                "socket_timeout": REDIS_WAIT_S,
                "max_retries": 0,
            },
        )
        self._redis = redis.Redis.from_url(redis_url, socket_connect_timeout=REDIS_WAIT_S, socket_timeout=REDIS_WAIT_S)

    def ring_round(self) -> None:
        """Say that a round has something new to clear."""
        self._ring("hansa.clear", "rounds")

    def wake_site(self, site_id: str) -> None:
        """Say to a site's agent: look now."""
        self._publish({"site": site_id})

    def wake_watchers(self, job_id: str) -> None:
        """Say to browsers and clients that watch a job: look now."""
        self._publish({"job": job_id})

    def _ring(self, task: str, queue: str) -> None:
        try:
            self._app.send_task(task, queue=queue, retry=False, expires=30)
        except Exception as error:  # noqa: BLE001  whatever Redis or kombu raise: a lost ring is no failure
            _log.warning("doorbell.lost", task=task, error=str(error))

    def _publish(self, message: dict[str, str]) -> None:
        try:
            self._redis.publish(WAKE_CHANNEL, json.dumps(message))
        except redis.RedisError as error:
            _log.warning("wake.lost", message=message, error=str(error))
