"""The listening end of a gateway: mutual TLS 1.3, and limits on what a connection may take up.

aiohttp limits headers and bodies; this adds the limits in time and number: a handshake has ten
seconds, a connection without a request in progress has half a minute, and there are only so many.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final, Self

from aiohttp import web

from training.roundlog.web_edge import Handler

# Seven peers with sixteen connections each and two for polls and requests, twice over for reconnects.
CONNECTIONS_MAX: Final = 256
HANDSHAKE_WAIT_S: Final = 10.0
IDLE_S: Final = 30.0
# A poll that is cut off costs its caller a retry: nothing is worth waiting for at the end.
SHUTDOWN_WAIT_S: Final = 0.1
_SWEEP_S: Final = 2.0
_BACKLOG: Final = 64


class Listener:
    """A TLS server for one application. Use as an async context manager."""

    def __init__(
        self, application: web.Application, address: str, context: ssl.SSLContext, *, idle_s: float = IDLE_S
    ) -> None:
        """Prepare to serve `application` on `address` (host:port)."""
        host, _, port = address.rpartition(":")
        self._host = host.strip("[]")
        self._port = int(port)
        self._context = context
        self._idle_s = idle_s
        self._idle_since: dict[web.RequestHandler, float] = {}
        self._busy: set[object] = set()
        application.middlewares.insert(0, self._track)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=idle_s,
            lingering_time=1.0,
            shutdown_timeout=SHUTDOWN_WAIT_S,
        )
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Listen."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._accept,
            self._host,
            self._port,
            ssl=self._context,
            ssl_handshake_timeout=HANDSHAKE_WAIT_S,
            backlog=_BACKLOG,
        )
        self._sweeper = loop.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and end every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for connection in self._idle_since:
            connection.force_close()
        await self._runner.cleanup()

    def _accept(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None, "set up before it listens"
        connection = server()
        self._idle_since[connection] = asyncio.get_running_loop().time()
        if len(self._idle_since) > CONNECTIONS_MAX:
            # The one that has been idle longest makes room; a busy one is never cut off.
            idle = [known for known in self._idle_since if known not in self._busy]
            self._end(min(idle, key=self._idle_since.__getitem__))
        return connection

    @web.middleware
    async def _track(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = request.protocol
        self._busy.add(connection)
        try:
            return await handler(request)
        finally:
            self._busy.discard(connection)
            if connection in self._idle_since:
                self._idle_since[connection] = asyncio.get_running_loop().time()

    async def _sweep(self) -> None:
        """End connections that stay without a complete request: those that trickle headers, too."""
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._idle_s / 2))
            oldest_s = asyncio.get_running_loop().time() - self._idle_s
            for connection, since_s in [*self._idle_since.items()]:
                if connection not in self._busy and since_s < oldest_s:
                    self._end(connection)

    def _end(self, connection: web.RequestHandler) -> None:
        self._idle_since.pop(connection, None)
        connection.force_close()
