"""A watched page with the wake process beside it: it looks when the bell rings, and polls when the streams are taken."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis
from aiohttp import web
from playwright.sync_api import expect
from werkzeug.serving import make_server

from broker import wake
from broker.api.app import create_app
from broker.celery_doorbell import WAKE_CHANNEL
from broker.market import Market
from broker.portal import portal
from tests.broker.portal.conftest import Visitor
from tests.broker.portal.scene import Scene

pytestmark = pytest.mark.xdist_group("portal")


@contextmanager
def _waking(market: Market, redis_url: str) -> Iterator[str]:
    """Run the wake process's server in a thread of its own."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(
        wake.WakeServer(market.authority.derive_key("wake"), redis_url).application(), shutdown_timeout=0.1
    )

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _serving(scene: Scene, wake_url: str) -> Iterator[str]:
    settings = scene.market.settings.model_copy(update={"wake_url": wake_url})
    server = make_server(
        "127.0.0.1", 0, create_app(dataclasses.replace(scene.market, settings=settings), [portal]), True
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_a_page_looks_when_the_bell_rings(
    visitor: Visitor, scene: Scene, cookies: dict[str, str], valkey_url: str
) -> None:
    with _waking(scene.market, valkey_url) as wake_url, _serving(scene, wake_url) as address:
        visitor.address = address
        visitor.become(cookies["ada"])
        visitor.visit(f"/jobs/{scene.jobs['spanning']}")
        live = visitor.page.locator("#live")
        expect(live).to_have_attribute("data-live", "stream")
        scene.agents["danzig"].run_log("rung for")
        with redis.Redis.from_url(valkey_url) as client:
            client.publish(WAKE_CHANNEL, json.dumps({"job": scene.jobs["spanning"]}))
        # Sooner than the slow look that a stream leaves in place.
        expect(live).to_contain_text("rung for", timeout=6_000)
        visitor.visit("/jobs")  # closes the stream before its server ends


def test_a_page_polls_where_all_streams_are_taken(
    visitor: Visitor, scene: Scene, cookies: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake, "STREAMS_MAX", 0)
    with _waking(scene.market, "") as wake_url, _serving(scene, wake_url) as address:
        visitor.address = address
        visitor.become(cookies["ada"])
        visitor.visit(f"/jobs/{scene.jobs['spanning']}")
        live = visitor.page.locator("#live")
        expect(live).to_have_attribute("data-live", "polling")
        scene.agents["bremen"].run_log("polled for")
        expect(live).to_contain_text("polled for")
        visitor.errors = [error for error in visitor.errors if "503" not in error]  # the browser names the refusal
