"""A member's line to its hub: requests over mutual TLS, and ranged transfers over several connections.

A blob travels as chunks of 256 KiB to 1 MiB. Several connections take chunks from one list, so a long fat
link is filled and a lost connection costs one chunk; what the other side has already is asked
first, so a transfer resumes where it broke off. Payload bytes are counted per peer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Self, TypeVar

import aiohttp
from pydantic import BaseModel

from training.roundlog.blobs import chunk_bytes
from training.roundlog.credentials import client_context, peer_uri, pinned
from training.roundlog.errors import Reason, Refusal, read_refusal
from training.roundlog.hub_wire import BODY_BYTES_MAX, BlobState, HubState, SnapshotNote
from training.roundlog.log import ChainPage
from training.roundlog.replica import Replica
from training.roundlog.signing import SignedDocument
from training.roundlog.view import View

Answer = TypeVar("Answer", bound=BaseModel)
# A chunk may take a minute (0.14 Mbit/s) before its connection is given up.
_CHUNK_WAIT_S: Final = 60.0
_REQUEST_WAIT_S: Final = 20.0
_CONNECT_WAIT_S: Final = 5.0
# What an answer to a poll may be late by before the hub counts as lost: on a quiet link, and on one that a
# transfer of this site's fills.
_POLL_MARGIN_QUIET_S: Final = 1.0
_POLL_MARGIN_S_MAX: Final = 10.0
_CHUNK_TRIES_MAX: Final = 5
_RETRY_FIRST_S: Final = 0.1
_BAD_REQUEST: Final = 400


class HubLink:
    """The line from this gateway to the hub of one view. Use as an async context manager."""

    def __init__(self, replica: Replica, view: View) -> None:
        """Prepare the line; the first request connects."""
        hub = view.member(view.hub)
        assert hub is not None, "a view's hub is a member"
        assert hub.address is not None, "whoever dials checked that the hub listens"
        config = replica.config
        self._replica = replica
        self._hub = hub
        self._base = f"https://{hub.address}/views/{view.number}"
        context = client_context(config.certificate_path, config.key_path, config.ca_path)
        self._context = pinned(context, peer_uri(view.job_id, hub.epoch, hub.site_id), hub.attempt_key)
        self._connections = config.connections
        self._poll_margin_s = min(_POLL_MARGIN_S_MAX, config.patience_s / 4)
        self._session: aiohttp.ClientSession | None = None
        self._transfers = 0

    async def __aenter__(self) -> Self:
        """Open the session: the transfers' connections, one for the poll and one for requests."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._context, limit=self._connections + 2),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    async def state(self, *, after_round: int, applied_round: int, seeking: bool, seen: int, wait_s: float) -> HubState:
        """Return the hub's state, once it differs from version `seen` or `wait_s` has passed."""
        query = (
            f"after_round={after_round}&applied_round={applied_round}&seeking={int(seeking)}"
            f"&seen={seen}&wait_s={wait_s:.3f}"
        )
        margin_s = self._poll_margin_s if self._transfers else min(_POLL_MARGIN_QUIET_S, self._poll_margin_s)
        return await self._ask(HubState, "GET", f"/state?{query}", wait_s=wait_s + margin_s)

    async def announce(self, document: SignedDocument) -> BlobState:
        """Post a signed header and return which chunks of its blob the hub lacks."""
        return await self._ask(BlobState, "POST", "/contributions", document)

    async def announce_snapshot(self, note: SnapshotNote) -> BlobState:
        """Offer a snapshot that the hub wants."""
        return await self._ask(BlobState, "POST", "/snapshot", note)

    async def blob_state(self, digest: str) -> BlobState:
        """Return which chunks of a blob the hub lacks."""
        return await self._ask(BlobState, "GET", f"/blobs/{digest}/state")

    async def chain_page(self, after_round: int) -> ChainPage:
        """Return a page of the hub's chain."""
        return await self._ask(ChainPage, "GET", f"/chain?after_round={after_round}")

    async def post_chain(self, page: ChainPage) -> None:
        """Bring the hub a page of the chain towards the view's base."""
        await self._request("POST", "/chain", page.model_dump_json().encode(), wait_s=_REQUEST_WAIT_S)

    async def upload(self, digest: str, missing: tuple[int, ...]) -> None:
        """Send the chunks `missing` of a blob that is held here."""
        blobs = self._replica.blobs
        size = blobs.size_bytes(digest)
        length = chunk_bytes(size)

        async def send(chunk: int) -> None:
            start, stop = chunk * length, min((chunk + 1) * length, size)
            payload = blobs.read(digest, start, stop)
            await self._request("PUT", f"/blobs/{digest}?offset={start}", payload, wait_s=_CHUNK_WAIT_S)
            self._replica.count_sent(self._hub.site_id, len(payload))

        await self._spread(missing, send)

    async def download(self, digest: str, size_bytes: int) -> None:
        """Fetch a blob that the hub holds, or what is still missing of it."""
        blobs = self._replica.blobs
        blobs.begin(digest, size_bytes)

        async def fetch(chunk: int) -> None:
            start, stop = blobs.chunk_span(digest, chunk)
            headers = {"Range": f"bytes={start}-{stop - 1}"}
            payload = await self._request("GET", f"/blobs/{digest}", None, wait_s=_CHUNK_WAIT_S, headers=headers)
            self._replica.count_received(self._hub.site_id, len(payload))
            blobs.write(digest, start, payload)

        await self._spread(blobs.missing(digest), fetch)
        await blobs.finish(digest)

    async def _spread(self, chunks: tuple[int, ...], move: Callable[[int], Awaitable[None]]) -> None:
        """Move all chunks over as many connections as the job has, each chunk with a few tries."""
        waiting = deque(chunks)
        self._transfers += 1

        async def worker() -> None:
            while waiting:
                chunk = waiting.popleft()
                await _with_tries(move, chunk)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._connections, len(chunks))):
                    group.create_task(worker())
        except BaseExceptionGroup as failures:
            # One failed transfer is one failure, whichever connection met it first.
            raise failures.exceptions[0] from None
        finally:
            self._transfers -= 1

    async def _ask(
        self,
        kind: type[Answer],
        method: str,
        path: str,
        document: BaseModel | None = None,
        *,
        wait_s: float = _REQUEST_WAIT_S,
    ) -> Answer:
        body = None if document is None else document.model_dump_json().encode()
        return kind.model_validate_json(await self._request(method, path, body, wait_s=wait_s))

    async def _request(
        self, method: str, path: str, body: bytes | None, *, wait_s: float, headers: dict[str, str] | None = None
    ) -> bytes:
        """Return the body of a successful answer. Raises Refusal, or what aiohttp raises."""
        assert self._session is not None, "used within its context"
        timeout = aiohttp.ClientTimeout(total=wait_s, sock_connect=_CONNECT_WAIT_S)
        async with self._session.request(
            method, self._base + path, data=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            payload = await _read_capped(response)
            if response.status >= _BAD_REQUEST:
                refusal = read_refusal(response.status, payload)
                raise Refusal(_known(refusal.code), refusal.message)
            return payload


async def _read_capped(response: aiohttp.ClientResponse) -> bytes:
    if response.content_length is not None and response.content_length > BODY_BYTES_MAX:
        raise Refusal(Reason.TOO_LARGE, f"the hub answers {response.content_length} bytes")
    payload = bytearray()
    async for piece in response.content.iter_any():
        payload += piece
        if len(payload) > BODY_BYTES_MAX:
            raise Refusal(Reason.TOO_LARGE, f"the hub answers more than {BODY_BYTES_MAX} bytes")
    return bytes(payload)


async def _with_tries(move: Callable[[int], Awaitable[None]], chunk: int) -> None:
    """Move one chunk, again after a broken connection; the last failure goes to the caller."""
    wait_s = _RETRY_FIRST_S
    for remaining in reversed(range(_CHUNK_TRIES_MAX)):
        try:
            await move(chunk)
        except (aiohttp.ClientError, TimeoutError, OSError):
            if not remaining:
                raise
            await asyncio.sleep(wait_s)
            wait_s *= 2
        else:
            return


def _known(code: str) -> Reason:
    try:
        return Reason(code)
    except ValueError:
        return Reason.MALFORMED
