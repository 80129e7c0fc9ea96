"""The wake process: long-lived streams that only say "look now".

Agents and browsers hold one stream of server-sent events each; whoever is woken reads what there
is from the API. The process knows nothing but names: it passes on what `broker.celery_doorbell`
publishes in Redis, and when it is away everything goes at the pace of heartbeat and polling.

    GET /wake/site/SITE?ticket=…   GET /wake/job/JOB?ticket=…

Tickets (`broker.tickets`) are given out by the API to whoever may read that site or job.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import redis.asyncio
import structlog
from aiohttp import web
from redis.exceptions import RedisError

from broker.celery_doorbell import WAKE_CHANNEL
from broker.tickets import ticket

STREAMS_MAX: Final = 2000
# One ticket opens one topic: a tenant with many browsers, never all streams.
STREAMS_PER_TOPIC_MAX: Final = 20
KEEPALIVE_S: Final = 20.0
RECONNECT_S: Final = 1.0
# A portal's page may come from another port. There is nothing to read here, and no cookie counts.
_ANY_ORIGIN: Final = {"Access-Control-Allow-Origin": "*"}
# Streams never end by themselves: those that are open at a stop are cut.
STOP_S: Final = 0.5

_log = structlog.get_logger(__name__)


class WakeServer:
    """Passes rings on to the streams that wait for them. Without a `redis_url` it only keeps them open."""

    def __init__(self, key: bytes, redis_url: str) -> None:
        """Serve streams whose tickets were made with `key`."""
        self._key = key
        self._redis_url = redis_url
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._streams = 0

    def application(self) -> web.Application:
        """Return the web application; it listens to Redis as long as it runs."""
        app = web.Application()
        app.router.add_get("/wake/{kind:site|job}/{name}", self._stream)
        app.cleanup_ctx.append(self._listening)
        return app

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        kind, name = request.match_info["kind"], request.match_info["name"]
        if not hmac.compare_digest(ticket(self._key, kind, name), request.query.get("ticket", "")):
            raise web.HTTPForbidden(text="this ticket does not open this stream; fetch a new one from the API")
        if self._streams >= STREAMS_MAX:
            raise web.HTTPServiceUnavailable(
                text="all streams are taken; poll instead", headers={"Retry-After": "30", **_ANY_ORIGIN}
            )
        topic = f"{kind}/{name}"
        if len(self._waiting.get(topic, ())) >= STREAMS_PER_TOPIC_MAX:
            raise web.HTTPTooManyRequests(
                text=f"{STREAMS_PER_TOPIC_MAX} streams about this are open already; close some, or poll instead",
                headers={"Retry-After": "30", **_ANY_ORIGIN},
            )
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
                **_ANY_ORIGIN,
            }
        )
        ring = asyncio.Event()
        ring.set()  # look once at the start: something may have changed before the stream was open
        # Counted before anything is awaited: others that ask meanwhile are to find it.
        self._waiting[topic].add(ring)
        self._streams += 1
        try:
            await response.prepare(request)
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(ring.wait(), KEEPALIVE_S)
                await response.write(b"event: look\ndata: now\n\n" if ring.is_set() else b": still here\n\n")
                ring.clear()
        except ConnectionError:
            return response
        finally:
            self._streams -= 1
            self._waiting[topic].discard(ring)
            if not self._waiting[topic]:
                del self._waiting[topic]

    @asynccontextmanager
    async def _listening(self, _app: web.Application) -> AsyncIterator[None]:
        listener = asyncio.create_task(self._listen()) if self._redis_url else None
        yield
        if listener is not None:
            listener.cancel()
            with suppress(asyncio.CancelledError):
                await listener

    async def _listen(self) -> None:
        while True:
            try:
                client = redis.asyncio.Redis.from_url(self._redis_url)
                async with client.pubsub() as subscription:
                    await subscription.subscribe(WAKE_CHANNEL)
                    self._ring_all()  # rings were lost while nobody listened
                    async for message in subscription.listen():
                        if message["type"] == "message":
                            self._ring(message["data"])
            except (RedisError, OSError) as error:
                _log.warning("wake.redis_lost", error=str(error))
                await asyncio.sleep(RECONNECT_S)

    def _ring(self, data: bytes) -> None:
        # Redis is not trusted: a message can only name a stream to be woken.
        try:
            fields = json.loads(data)
        except ValueError:
            return
        if not isinstance(fields, dict):
            return
        for kind in ("site", "job"):
            name = fields.get(kind)
            if isinstance(name, str):
                for ring in self._waiting.get(f"{kind}/{name}", ()):
                    ring.set()

    def _ring_all(self) -> None:
        for rings in self._waiting.values():
            for ring in rings:
                ring.set()


def serve(key: bytes, redis_url: str, *, host: str, port: int) -> None:
    """Run the wake process on `host`:`port` until it is told to stop."""
    application = WakeServer(key, redis_url).application()
    web.run_app(application, host=host, port=port, print=None, shutdown_timeout=STOP_S)
