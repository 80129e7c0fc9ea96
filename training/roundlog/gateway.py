"""The gateway of one attempt: the only process that holds the job's network credentials.

    python -m training.roundlog.gateway gateway.json

It serves the ranks and the agent on Unix sockets, plays the role that the current view gives its
site (hub, or member of another's hub), and may be killed at any moment: what it acknowledged is in
its state folder, and a new process goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from training.attempt import GatewayConfig
from training.clock import Clock, SystemClock
from training.roundlog.agent_api import AgentApi
from training.roundlog.credentials import check_certificate, peer_uri, server_context
from training.roundlog.hub import Hub
from training.roundlog.listener import SHUTDOWN_WAIT_S, Listener
from training.roundlog.member import Follower
from training.roundlog.ranks_api import RanksApi
from training.roundlog.replica import Replica
from training.roundlog.signing import public_hex
from training.roundlog.view import View

_SAVE_S: Final = 5.0
_PRIVATE: Final = 0o077

log: Final = structlog.get_logger(__name__)


class Gateway:
    """One site's gateway, from its configuration to its sockets. Run it once."""

    def __init__(self, config: GatewayConfig, clock: Clock | None = None) -> None:
        """Load the state; nothing is served before `run`."""
        self._config = config
        self._replica = Replica(config, clock or SystemClock())
        self._hub = Hub(self._replica)
        self._renewed = asyncio.Event()
        self._tls = None
        if config.listen is not None:
            self._tls = server_context(config.certificate_path, config.key_path, config.ca_path)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._replica.save)
            if self._config.listen is not None and self._tls is not None:
                await stack.enter_async_context(Listener(self._hub.application(), self._config.listen, self._tls))
            agent_api = AgentApi(self._replica, self._replace_certificate)
            await self._serve(stack, agent_api.application(), self._config.agent_socket)
            await self._serve(stack, RanksApi(self._replica).application(), self._config.ranks_socket)
            log.info("gateway_ready", job=self._config.job_id, site=self._config.site_id, listen=self._config.listen)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._play_roles())
                group.create_task(self._save_counts())

    async def _serve(self, stack: contextlib.AsyncExitStack, application: web.Application, socket_path: str) -> None:
        """Serve on a Unix socket that only this user may open."""
        runner = web.AppRunner(application, access_log=None, auto_decompress=False, shutdown_timeout=SHUTDOWN_WAIT_S)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        umask = os.umask(_PRIVATE)
        try:
            await web.UnixSite(runner, socket_path).start()
        finally:
            os.umask(umask)

    async def _play_roles(self) -> None:
        """Play the role of each view in turn; a renewed certificate starts the role again."""
        replica = self._replica
        while True:
            view = replica.view
            if view is None:
                await replica.changed.wait(None)
                continue
            self._renewed.clear()
            role = asyncio.create_task(self._play(view))
            role.add_done_callback(lambda _: replica.changed.ring())
            try:
                while replica.view is view and not self._renewed.is_set() and not role.done():
                    await replica.changed.wait(None)
            finally:
                role.cancel()
                await asyncio.wait([role])
            if not role.cancelled() and (error := role.exception()) is not None:
                raise error

    async def _play(self, view: View) -> None:
        hub = view.member(view.hub)
        if view.hub == self._config.site_id:
            self._replica.hub_heard(())
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._hub.watch_members(view))
                await self._hub.seal_rounds(view)
                watch.cancel()
        elif hub is None or hub.address is None:
            log.error("hub_without_address", hub=view.hub, view=view.number)
            self._replica.hub_away(silent=False)
            await asyncio.Event().wait()
        else:
            await Follower(self._replica, view).run()

    async def _save_counts(self) -> None:
        """Write the record now and then: byte counts change without any other reason to."""
        while True:
            await asyncio.sleep(_SAVE_S)
            self._replica.save()

    async def _replace_certificate(self, pem: bytes) -> None:
        """Take a renewed certificate into use for new connections. Raises Refusal unless it is ours."""
        config = self._config
        uri = peer_uri(config.job_id, config.epoch, config.site_id)
        ends = check_certificate(pem, uri, public_hex(self._replica.key))
        path = Path(config.certificate_path)
        part = path.with_name(path.name + ".part")
        part.write_bytes(pem)
        part.replace(path)
        if self._tls is not None:
            self._tls.load_cert_chain(config.certificate_path, config.key_path)
        log.info("certificate_renewed", ends=ends.isoformat())
        self._renewed.set()
        self._replica.changed.ring()


async def serve(config: GatewayConfig) -> None:
    """Run a gateway until SIGTERM or SIGINT."""
    running = asyncio.create_task(Gateway(config).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running


def main(arguments: list[str]) -> int:
    """Run the gateway that the file in `arguments` describes."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m training.roundlog.gateway gateway.json\n")
        return 2
    config = GatewayConfig.model_validate_json(Path(arguments[0]).read_bytes())
    asyncio.run(serve(config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
