"""The wake process over a real Valkey: rings reach the streams they name, and nobody else's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import redis
from aiohttp import web

from broker.celery_doorbell import CeleryDoorbell
from broker.tickets import ticket
from broker.wake import STREAMS_PER_TOPIC_MAX, WakeServer
from sites.wake import WakeListener

KEY = b"key"
WAIT_S = 10.0


@contextmanager
def _serving(redis_url: str) -> Iterator[str]:
    # The loop lives in a thread from start to end: the main thread may have one already (a browser's).
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = web.AppRunner(WakeServer(KEY, redis_url).application(), shutdown_timeout=0.2)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result(WAIT_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


@pytest.fixture
def wake_url(valkey_url: str) -> Iterator[str]:
    with _serving(valkey_url) as url:
        yield url


def _follow(url: str, site_id: str) -> threading.Event:
    wake = threading.Event()
    WakeListener(wake, "").follow(f"{url}/wake/site/{site_id}?ticket={ticket(KEY, 'site', site_id)}")
    assert wake.wait(WAIT_S), "a new stream says once: look"
    wake.clear()
    return wake


def test_a_ring_reaches_the_site_that_it_names(wake_url: str, valkey_url: str) -> None:
    lubeck, visby = _follow(wake_url, "lubeck"), _follow(wake_url, "visby")
    # The server may still be subscribing when the stream is open already: ring until it is heard.
    doorbell = CeleryDoorbell(valkey_url)
    for _ in range(100):
        doorbell.wake_site("lubeck")
        if lubeck.wait(0.1):
            break
    assert lubeck.is_set()
    lubeck.clear()
    visby.clear()
    doorbell.wake_site("lubeck")
    assert lubeck.wait(WAIT_S)
    assert not visby.is_set()


def test_a_stream_opens_only_with_its_own_ticket(wake_url: str) -> None:
    for wrong in ("", ticket(KEY, "site", "visby"), ticket(KEY, "job", "lubeck"), ticket(b"other", "site", "lubeck")):
        answer = httpx.get(f"{wake_url}/wake/site/lubeck", params={"ticket": wrong})
        assert answer.status_code == 403


def test_one_ticket_opens_a_bounded_number_of_streams_and_leaves_the_others_to_others(wake_url: str) -> None:
    where = f"{wake_url}/wake/job/mine?ticket={ticket(KEY, 'job', 'mine')}"
    with ExitStack() as open_streams, httpx.Client(timeout=WAIT_S) as client:
        for _ in range(STREAMS_PER_TOPIC_MAX):
            assert open_streams.enter_context(client.stream("GET", where)).status_code == 200
        refused = client.get(where)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "30")
        other = f"{wake_url}/wake/job/other?ticket={ticket(KEY, 'job', 'other')}"
        assert open_streams.enter_context(client.stream("GET", other)).status_code == 200


def test_hostile_messages_in_redis_wake_nobody_and_stop_nothing(wake_url: str, valkey_url: str) -> None:
    wake = _follow(wake_url, "lubeck")
    client = redis.Redis.from_url(valkey_url)
    for message in (b"\xff", b"[]", b'{"site": 7}', b'{"site": {"lubeck": 1}}', b"{", b'{"job": null}'):
        client.publish("hansa:wake", message)
    assert not wake.wait(0.3)
    for _ in range(100):
        CeleryDoorbell(valkey_url).wake_site("lubeck")
        if wake.wait(0.1):
            return
    pytest.fail("the stream no longer rings")


def test_a_doorbell_without_redis_neither_waits_nor_fails(tmp_path: object) -> None:
    doorbell = CeleryDoorbell(f"unix://{tmp_path}/nobody.sock")
    doorbell.ring_round()
    doorbell.wake_site("lubeck")
