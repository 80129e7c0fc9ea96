"""The ranks' door to their gateway: ranks.sock (see `training.roundlog.ranks_wire` for the calls).

The ranks run a tenant's code: what they send is bounded in size and number, and names no file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from aiohttp import web

from training.roundlog.errors import Reason, Refusal
from training.roundlog.hub_wire import SnapshotNote
from training.roundlog.ranks_wire import (
    FRAGMENTS_MAX,
    POLL_WAIT_S_MAX,
    ROUND_HEADER,
    AppliedRequest,
    CommitRequest,
    Measurements,
    position_json,
    sealed_round_json,
)
from training.roundlog.replica import Replica
from training.roundlog.web_edge import json_body, refusals, seconds

_BODY_WAIT_S: Final = 30.0
_JSON_BYTES_MAX: Final = 1_000_000
_METRICS_BYTES_MAX: Final = 256_000_000
# A rank is local: a minute without one more byte of a fragment means that it died.
_STALL_S: Final = 60.0


class RanksApi:
    """The calls of `training.exchange.Exchange` on one gateway's replica."""

    def __init__(self, replica: Replica) -> None:
        """Serve `replica`."""
        self._replica = replica
        self._receiving = asyncio.Lock()

    def application(self) -> web.Application:
        """Return the web application for ranks.sock."""
        application = web.Application(middlewares=[refusals], client_max_size=_JSON_BYTES_MAX)
        rounds = r"/rounds/{round:\d{1,9}}"
        application.add_routes(
            [
                web.get("/position", self._position),
                web.put(rounds + r"/fragments/{fragment:\d{1,6}}", self._post_fragment),
                web.post(rounds + "/commit", self._commit),
                web.get(rounds + "/sealed", self._sealed),
                web.get(rounds + r"/sites/{site:[a-z0-9-]{1,31}}/fragments/{fragment:\d{1,6}}", self._fragment),
                web.post(rounds + "/applied", self._applied),
                web.put(rounds + "/snapshot", self._offer_snapshot),
                web.get("/snapshot", self._fetch_snapshot),
                web.post("/report", self._report),
            ]
        )
        return application

    async def _position(self, request: web.Request) -> web.Response:
        wait_s = seconds(request, "wait_s", POLL_WAIT_S_MAX)
        position = await self._replica.changed.until(self._replica.log.position, wait_s)
        return web.Response(status=204) if position is None else _json(position_json.dump_json(position))

    async def _post_fragment(self, request: web.Request) -> web.Response:
        replica = self._replica
        round_number, fragment = _round(request), _fragment(request)
        if fragment >= FRAGMENTS_MAX:
            raise Refusal(Reason.TOO_LARGE, f"a contribution has at most {FRAGMENTS_MAX} fragments")
        replica.check_open(round_number)
        with replica.store.incoming() as part:
            await _receive(request, part, replica.config.contribution_bytes_max)
            replica.take_fragment(round_number, fragment, part)
        return web.Response(status=204)

    async def _commit(self, request: web.Request) -> web.Response:
        commit = await json_body(request, CommitRequest, _BODY_WAIT_S)
        await self._replica.commit(_round(request), commit)
        return web.Response(status=204)

    async def _sealed(self, request: web.Request) -> web.Response:
        replica = self._replica
        round_number = _round(request)

        def find() -> bytes | None:
            if replica.log.needs_snapshot:
                message = "this site's state left the chain; ask for the position and fetch a snapshot"
                raise Refusal(Reason.SNAPSHOT_NEEDED, message)
            if round_number <= replica.log.base_round and replica.view is not None:
                message = f"round {round_number} lies before this site's base, round {replica.log.base_round}"
                raise Refusal(Reason.ROUND_SEALED, message)
            if replica.log.behind or round_number > replica.complete_round:
                return None
            answer = replica.log.sealed_answer(round_number)
            return None if answer is None else sealed_round_json.dump_json(answer)

        found = await replica.changed.until(find, seconds(request, "wait_s", POLL_WAIT_S_MAX))
        return web.Response(status=204) if found is None else _json(found)

    async def _fragment(self, request: web.Request) -> web.Response:
        replica = self._replica
        round_number, fragment, site_id = _round(request), _fragment(request), request.match_info["site"]
        sealed = replica.log.manifest(round_number)
        entry = sealed.contribution(site_id) if sealed else None
        if entry is None or fragment >= len(entry.header.fragments):
            raise Refusal(Reason.NOT_FOUND, f"round {round_number} has no fragment {fragment} of {site_id}")
        header = entry.header
        if not replica.blobs.held(header.digest):
            message = f"the blob of {site_id} in round {round_number} is gone; this site needs a snapshot"
            raise Refusal(Reason.SNAPSHOT_NEEDED, message)
        start, stop = header.fragment_span(fragment)
        payload = await asyncio.to_thread(replica.blobs.read, header.digest, start, stop)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(payload).hexdigest())
        if digest != header.fragments[fragment].digest:
            raise Refusal(Reason.DIGEST, f"fragment {fragment} of {site_id} is not what its header says")
        return web.Response(body=payload, content_type="application/octet-stream")

    async def _applied(self, request: web.Request) -> web.Response:
        note = await json_body(request, AppliedRequest, _BODY_WAIT_S)
        self._replica.applied(_round(request), note.outer_hash)
        return web.Response(status=204)

    async def _offer_snapshot(self, request: web.Request) -> web.Response:
        replica = self._replica
        round_number = _round(request)
        manifest_hash = replica.log.hash_at(round_number)
        if manifest_hash is None or round_number > replica.log.applied_round:
            raise Refusal(Reason.ROUND_UNSEALED, f"round {round_number} was not applied here")
        outer_hash = replica.log.outer_hash if round_number == replica.log.applied_round else None
        if self._receiving.locked():
            raise Refusal(Reason.BUSY, "a snapshot is being received already; one at a time")
        with replica.store.incoming() as part:
            async with self._receiving:
                digest, size = await _receive(request, part, replica.config.snapshot_bytes_max)
            replica.blobs.take(part, digest)
        replica.offer_snapshot(
            SnapshotNote(
                round_number=round_number,
                manifest_hash=manifest_hash,
                outer_hash=outer_hash,
                digest=digest,
                size_bytes=size,
            )
        )
        return web.Response(status=204)

    async def _fetch_snapshot(self, request: web.Request) -> web.StreamResponse:
        replica = self._replica
        note = await replica.changed.until(replica.usable_snapshot, seconds(request, "wait_s", POLL_WAIT_S_MAX))
        if note is None:
            return web.Response(status=204)
        answer = web.FileResponse(replica.blobs.path(note.digest), headers={ROUND_HEADER: str(note.round_number)})
        if replica.log.needs_snapshot:
            replica.restored(note)
        return answer

    async def _report(self, request: web.Request) -> web.Response:
        measurements = await json_body(request, Measurements, _BODY_WAIT_S)
        row = {"time_ms": self._replica.clock.now_ms(), **measurements.values}
        _append_line(Path(self._replica.config.metrics_path), json.dumps(row, separators=(",", ":")))
        return web.Response(status=204)


def _round(request: web.Request) -> int:
    return int(request.match_info["round"])


def _fragment(request: web.Request) -> int:
    return int(request.match_info["fragment"])


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


async def _receive(request: web.Request, path: Path, bytes_max: int) -> tuple[str, int]:
    """Stream the body to `path` and return its digest and size. Raises Refusal beyond `bytes_max`."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        async for piece in _pieces(request):
            size += len(piece)
            if size > bytes_max:
                raise Refusal(Reason.TOO_LARGE, f"the body exceeds the {bytes_max} bytes that the job allows")
            digest.update(piece)
            file.write(piece)
    if request.content_length is not None and size != request.content_length:
        raise Refusal(Reason.MALFORMED, "the body broke off; send it again")
    return digest.hexdigest(), size


def _append_line(path: Path, line: str) -> None:
    if path.exists() and path.stat().st_size > _METRICS_BYTES_MAX:
        raise Refusal(Reason.TOO_LARGE, "the metrics of this attempt are full; report less often")
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


async def _pieces(request: web.Request) -> AsyncIterator[bytes]:
    while True:
        async with asyncio.timeout(_STALL_S):
            piece = await request.content.readany()
        if not piece:
            return
        yield piece
