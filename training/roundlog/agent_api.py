"""The agent's door to its gateway: agent.sock (see `training.roundlog.control` for the calls)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from training.roundlog.control import CertificateRequest, GatewayStatus, LeaveRequest, PromiseRequest
from training.roundlog.replica import Replica
from training.roundlog.signing import DOCUMENT_BYTES_MAX, SignedDocument
from training.roundlog.web_edge import json_answer, json_body, refusals

_BODY_WAIT_S: Final = 10.0

ReplaceCertificate = Callable[[bytes], Awaitable[None]]


class AgentApi:
    """Views, promises, status and certificates of one gateway."""

    def __init__(self, replica: Replica, replace_certificate: ReplaceCertificate) -> None:
        """Serve `replica`; `replace_certificate` takes a checked PEM into use."""
        self._replica = replica
        self._replace_certificate = replace_certificate

    def application(self) -> web.Application:
        """Return the web application for agent.sock."""
        application = web.Application(middlewares=[refusals], client_max_size=DOCUMENT_BYTES_MAX)
        application.add_routes(
            [
                web.post("/view", self._view),
                web.post("/promise", self._promise),
                web.get("/status", self._status),
                web.post("/certificate", self._certificate),
                web.post("/ranks", self._ranks),
                web.post("/leave", self._leave),
            ]
        )
        return application

    async def _view(self, request: web.Request) -> web.Response:
        self._replica.install_view(await json_body(request, SignedDocument, _BODY_WAIT_S))
        return web.Response(status=204)

    async def _promise(self, request: web.Request) -> web.Response:
        promise = await json_body(request, PromiseRequest, _BODY_WAIT_S)
        return json_answer(self._replica.promise(promise.number))

    async def _status(self, _: web.Request) -> web.Response:
        return json_answer(gateway_status(self._replica))

    async def _certificate(self, request: web.Request) -> web.Response:
        renewed = await json_body(request, CertificateRequest, _BODY_WAIT_S)
        await self._replace_certificate(renewed.pem.encode())
        return web.Response(status=204)

    async def _ranks(self, _: web.Request) -> web.Response:
        self._replica.ranks_started_anew()
        return web.Response(status=204)

    async def _leave(self, request: web.Request) -> web.Response:
        self._replica.leaving = (await json_body(request, LeaveRequest, _BODY_WAIT_S)).leaving
        return web.Response(status=204)


def gateway_status(replica: Replica) -> GatewayStatus:
    """Return what the gateway knows of its log."""
    log = replica.log
    now_s = replica.clock.monotonic_s()
    return GatewayStatus(
        view_number=log.view.number if log.view else None,
        promised=log.promised,
        sealed_round=log.sealed_round,
        chain_hash=log.chain_hash,
        applied_round=log.applied_round,
        outer_hash=log.outer_hash,
        needs_snapshot=log.needs_snapshot,
        samples_done=log.done.count,
        hub_lost_s=None if replica.hub_lost_at_s is None else now_s - replica.hub_lost_at_s,
        members_lost_s={site_id: max(0.0, now_s - at_s) for site_id, at_s in sorted(replica.members_lost_at_s.items())},
        waiting_for=replica.waiting_for,
        links=replica.links,
        equivocations=tuple(log.equivocations),
        samples_by_site=dict(sorted(log.samples_by_site.items())),
    )
