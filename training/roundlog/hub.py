"""The hub role: take the members' contributions, seal rounds, and relay blobs without reading them.

Every gateway carries this role; it acts while the current view names its site. It works on the
gateway's own `Replica`, so a hub that restarts has its chain and blobs again, and the members
send what it had not yet sealed. `training.roundlog.listener` serves it, `training.roundlog.member`
is the other end.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from training.roundlog.blobs import CHUNK_BYTES, check_fragments
from training.roundlog.contribution import Contribution, Header, open_contribution
from training.roundlog.control import Equivocation
from training.roundlog.credentials import read_peer_der
from training.roundlog.errors import Reason, Refusal
from training.roundlog.hub_wire import (
    BODY_BYTES_MAX,
    CHAIN_PAGE_BYTES,
    STATE_WAIT_S_MAX,
    BlobState,
    HubState,
    SnapshotNote,
)
from training.roundlog.log import ChainPage
from training.roundlog.manifest import seal_manifest
from training.roundlog.replica import Replica
from training.roundlog.sealing import choose_entries, seal_wait_s
from training.roundlog.signing import SignedDocument
from training.roundlog.view import Member, View
from training.roundlog.web_edge import Handler, json_answer, json_body, number, refusals, seconds

# A chunk of 1 MiB within this time is 0.3 Mbit/s; slower bodies are cut off and resumed.
_BODY_WAIT_S: Final = 30.0
# A member asks for the hub's state anew at once, and every second when there is nothing new.
_MEMBER_SILENT_S: Final = 2.0
_WATCH_S: Final = 0.25
_DIGEST: Final = re.compile(r"^[0-9a-f]{64}$")
_RANGE: Final = re.compile(r"^bytes=([0-9]{1,15})-([0-9]{1,15})$")
_MEMBER: Final = web.RequestKey("member", Member)

log: Final = structlog.get_logger(__name__)


class Hub:
    """The open round of one gateway while its site is the hub, and the door to it."""

    def __init__(self, replica: Replica) -> None:
        """Work on `replica`; nothing is served before `application` is."""
        self._replica = replica
        self._opened = (0, 0)
        self._contributions: dict[str, Contribution] = {}
        self._arrivals_s: dict[str, float] = {}
        self._applied: dict[str, int] = {}
        self._seeking: set[str] = set()
        self._incoming: SnapshotNote | None = None
        self._calls: Counter[str] = Counter()
        self._heard_s: dict[str, float] = {}

    def application(self) -> web.Application:
        """Return the web application that members speak to."""
        application = web.Application(middlewares=[refusals, self._admit], client_max_size=BODY_BYTES_MAX)
        application.add_routes(
            [
                web.get(r"/views/{view:\d{1,9}}/state", self._get_state),
                web.post(r"/views/{view:\d{1,9}}/contributions", self._post_contribution),
                web.get(r"/views/{view:\d{1,9}}/blobs/{digest}", self._get_blob),
                web.get(r"/views/{view:\d{1,9}}/blobs/{digest}/state", self._get_blob_state),
                web.put(r"/views/{view:\d{1,9}}/blobs/{digest}", self._put_blob),
                web.get(r"/views/{view:\d{1,9}}/chain", self._get_chain),
                web.post(r"/views/{view:\d{1,9}}/chain", self._post_chain),
                web.post(r"/views/{view:\d{1,9}}/snapshot", self._post_snapshot),
            ]
        )
        return application

    async def seal_rounds(self, view: View) -> None:
        """Seal round after round while `view` is current; ends when it is not."""
        replica = self._replica
        while replica.view is view:
            self._enter()
            self._take_own(view)
            wait_s = self._wait_s(view)
            if wait_s == 0.0:
                self._seal(view)
            else:
                await replica.changed.wait(wait_s)

    async def watch_members(self, view: View) -> None:
        """Keep account of the members that are out of reach while `view` is current."""
        replica = self._replica
        self._heard_s = dict.fromkeys(self._others(view), replica.clock.monotonic_s())
        while True:
            now_s = replica.clock.monotonic_s()
            replica.members_lost_at_s = {
                site_id: heard_s
                for site_id, heard_s in self._heard_s.items()
                if not self._calls[site_id] and now_s - heard_s >= _MEMBER_SILENT_S
            }
            await asyncio.sleep(_WATCH_S)

    def _others(self, view: View) -> list[str]:
        return [member.site_id for member in view.members if member.site_id != self._replica.config.site_id]

    def _wait_s(self, view: View) -> float | None:
        """Return the wait before the next seal; None where only a change can bring it nearer."""
        replica = self._replica
        if replica.log.promised > view.number or replica.log.behind:
            return None
        return seal_wait_s(view, self._arrivals_s, replica.clock.monotonic_s(), stateless=self._stateless())

    def _stateless(self) -> set[str]:
        """Return the sites that cannot contribute yet: those that seek a snapshot, and joiners still to be heard."""
        replica = self._replica
        own = {replica.config.site_id} if replica.log.needs_snapshot else set()
        joining = set(replica.view.joining) if replica.view is not None else set()
        return self._seeking | own | (joining - self._applied.keys() - {replica.config.site_id})

    def _seal(self, view: View) -> None:
        replica = self._replica
        complete = {site_id: self._contributions[site_id] for site_id in self._arrivals_s}
        choice = choose_entries(view, complete, replica.log.done)
        for equivocation in choice.equivocations:
            replica.noted(equivocation)
        for site_id, reason in choice.refused:
            log.warning("contribution_left_out", site=site_id, round=replica.log.sealed_round + 1, reason=str(reason))
        sealed = seal_manifest(view, replica.log.sealed_round + 1, replica.log.chain_hash, choice.sealed, replica.key)
        replica.append(sealed)
        self._enter()
        log.info("round_sealed", round=sealed.round_number, entries=len(sealed.contributions), view=view.number)

    def _enter(self) -> None:
        """Start an empty round wherever the view or the chain moved on."""
        replica = self._replica
        view = replica.view
        opened = (view.number if view else 0, replica.log.sealed_round + 1)
        if opened == self._opened:
            return
        if opened[0] != self._opened[0]:
            self._applied, self._seeking, self._incoming = {}, set(), None
        self._opened = opened
        self._contributions, self._arrivals_s = {}, {}
        self._announce_arriving()

    def _take_own(self, view: View) -> None:
        site_id = self._replica.config.site_id
        own = None if site_id in self._contributions else self._replica.own_contribution()
        if own is not None:
            try:
                self._check_fits(own.header)
            except Refusal as refusal:
                log.warning("own_contribution_refused", reason=str(refusal.reason), message=str(refusal))
                return
            self._contributions[site_id] = own
            self._arrived(own.header.digest)
        self._replica.waiting_for = self._waiting_for(view)

    def _waiting_for(self, view: View) -> tuple[str, ...]:
        here = self._stateless() | self._arrivals_s.keys()
        return tuple(member.site_id for member in view.members if member.site_id not in here)

    def _arrived(self, digest: str) -> None:
        """Count every contribution whose blob this is as complete."""
        now_s = self._replica.clock.monotonic_s()
        for site_id, entry in self._contributions.items():
            if entry.header.digest == digest and self._replica.blobs.held(digest):
                self._arrivals_s.setdefault(site_id, now_s)
        self._announce_arriving()
        self._replica.changed.ring()

    def _announce_arriving(self) -> None:
        """Say which blobs must not be dropped although no sealed round names them yet."""
        self._replica.arriving = {entry.header.digest for entry in self._contributions.values()}
        if self._incoming is not None:
            self._replica.arriving.add(self._incoming.digest)

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let in members of the current view alone; asked again at every request of a connection."""
        member = request[_MEMBER] = self._member(request)
        self._enter()
        self._calls[member.site_id] += 1
        try:
            return await handler(request)
        finally:
            self._calls[member.site_id] -= 1
            self._heard_s[member.site_id] = self._replica.clock.monotonic_s()

    def _member(self, request: web.Request) -> Member:
        replica = self._replica
        tls = request.transport.get_extra_info("ssl_object") if request.transport else None
        der = tls.getpeercert(binary_form=True) if tls else None
        if der is None:
            raise Refusal(Reason.PEER, "no certificate was shown")
        peer = read_peer_der(der)
        if peer.not_after_ms <= replica.clock.now_ms():
            raise Refusal(Reason.PEER, f"the certificate of {peer.site_id} has expired; connect again with a new one")
        view = replica.view
        if view is None:
            raise Refusal(Reason.BUSY, "this gateway has no view yet")
        member = view.member(peer.site_id)
        if (
            member is None
            or peer.job_id != view.job_id
            or peer.epoch != member.epoch
            or peer.public_key != member.attempt_key
        ):
            message = f"{peer.site_id} with epoch {peer.epoch} is not in view {view.number} of job {view.job_id}"
            raise Refusal(Reason.PEER, message)
        if view.number != int(request.match_info.get("view", "0")):
            raise Refusal(Reason.VIEW_DIFFERS, f"this gateway is in view {view.number}")
        if view.hub != replica.config.site_id:
            raise Refusal(Reason.NOT_HUB, f"the hub of view {view.number} is {view.hub}")
        return member

    async def _get_state(self, request: web.Request) -> web.Response:
        replica = self._replica
        member = request[_MEMBER]
        view = replica.view
        assert view is not None, "admission needs a view"
        after_round = number(request, "after_round")
        self._heard(view, member.site_id, number(request, "applied_round"), seeking=bool(number(request, "seeking")))
        seen = number(request, "seen")
        wait_s = seconds(request, "wait_s", STATE_WAIT_S_MAX)
        await replica.changed.until(
            lambda: True if replica.changed.version != seen or replica.view is not view else None, wait_s
        )
        if replica.view is not view:
            raise Refusal(Reason.VIEW_DIFFERS, "the view changed meanwhile")
        self._enter()
        return json_answer(self._state(view, after_round))

    def _state(self, view: View, after_round: int) -> HubState:
        replica = self._replica
        following = replica.log.manifest(after_round + 1)
        snapshot = self._relayable_snapshot()
        wants_snapshot = snapshot is None and (bool(self._seeking) or replica.log.needs_snapshot)
        return HubState(
            version=replica.changed.version,
            behind=replica.log.behind,
            sealed_round=replica.log.sealed_round,
            chain_hash=replica.log.chain_hash,
            manifest=following.document if following else None,
            waiting_for=self._waiting_for(view),
            applied_by_all=replica.applied_by_all,
            wanted=tuple({header.digest: None for header in self._wanted()}),
            snapshot=snapshot,
            snapshot_wanted=wants_snapshot,
        )

    def _heard(self, view: View, site_id: str, applied_round: int, *, seeking: bool) -> None:
        """Note how far a member is, and what every member has applied by now."""
        if seeking != (site_id in self._seeking):
            self._seeking ^= {site_id}
            self._replica.changed.ring()
        self._applied[site_id] = applied_round
        self._applied[self._replica.config.site_id] = self._replica.log.applied_round
        if all(member.site_id in self._applied for member in view.members):
            self._replica.applied_everywhere(min(self._applied.values()))

    def _wanted(self) -> list[Header]:
        """Return what this hub lacks for itself or for a member that has not applied it."""
        if self._replica.log.behind:
            return []
        applied = [round_number for site_id, round_number in self._applied.items() if site_id not in self._seeking]
        if not self._replica.log.needs_snapshot:
            applied.append(self._replica.log.applied_round)
        snapshot = self._replica.usable_snapshot()
        if snapshot is not None and (self._seeking or self._replica.log.needs_snapshot):
            applied.append(snapshot.round_number)
        return list(self._replica.wanted(min(applied, default=self._replica.log.sealed_round)))

    def _relayable_snapshot(self) -> SnapshotNote | None:
        """Return a snapshot from which a joiner can reach the chain's end with the blobs held here."""
        note = self._replica.usable_snapshot()
        if note is None or any(True for _ in self._replica.wanted(note.round_number)):
            return None
        return note

    async def _post_contribution(self, request: web.Request) -> web.Response:
        replica = self._replica
        member = request[_MEMBER]
        view = replica.view
        document = await json_body(request, SignedDocument, _BODY_WAIT_S)
        if view is None or replica.view is not view:
            raise Refusal(Reason.VIEW_DIFFERS, "the view changed meanwhile")
        if replica.log.behind or replica.log.promised > view.number:
            raise Refusal(Reason.BUSY, "a view is being opened; the contribution is wanted right after")
        contribution = open_contribution(
            document, member.site_id, view, bytes_max=replica.config.contribution_bytes_max
        )
        header = contribution.header
        self._check_fits(header)
        self._enter()
        known = self._contributions.get(member.site_id)
        if known is not None and known.header != header:
            message = f"{member.site_id} contributed to round {header.round_number} already, with other content"
            raise Refusal(Reason.CHANGED, message)
        replica.blobs.begin(header.digest, header.size_bytes)
        self._contributions[member.site_id] = contribution
        self._arrived(header.digest)
        return json_answer(BlobState(missing=replica.blobs.missing(header.digest)))

    def _check_fits(self, header: Header) -> None:
        """Check a header against the chain. Raises Refusal."""
        chain = self._replica.log
        if header.round_number <= chain.sealed_round:
            raise Refusal(Reason.ROUND_SEALED, f"round {header.round_number} was sealed without {header.site_id}")
        if header.round_number > chain.sealed_round + 1:
            raise Refusal(Reason.ROUND_FUTURE, f"round {chain.sealed_round + 1} is open, not {header.round_number}")
        if header.previous_hash != chain.chain_hash:
            self._replica.noted(
                Equivocation(
                    round_number=header.round_number,
                    site_id=header.site_id,
                    about="manifest",
                    expected=chain.chain_hash,
                    named=header.previous_hash,
                )
            )
            message = f"{header.site_id} holds another chain after round {chain.sealed_round}; it needs a snapshot"
            raise Refusal(Reason.EQUIVOCATION, message)
        overlap = chain.done.overlaps(header.samples)
        if overlap is not None:
            message = f"{header.site_id} names samples {overlap.start}..{overlap.stop}, some of which are done"
            raise Refusal(Reason.SAMPLES_OVERLAP, message)

    async def _get_blob_state(self, request: web.Request) -> web.Response:
        digest = _digest(request)
        self._expect(digest)
        return json_answer(BlobState(missing=self._replica.blobs.missing(digest)))

    async def _put_blob(self, request: web.Request) -> web.Response:
        replica = self._replica
        digest = _digest(request)
        offset = number(request, "offset")
        if replica.blobs.held(digest):
            return json_answer(BlobState(missing=()))
        self._expect(digest)
        # Checked before a byte of the body is read: a lying length never costs memory.
        replica.blobs.check_span(digest, offset, request.content_length or 0)
        async with asyncio.timeout(_BODY_WAIT_S):
            payload = await request.read()
        replica.count_received(request[_MEMBER].site_id, len(payload))
        if not replica.blobs.held(digest):
            replica.blobs.write(digest, offset, payload)
            if await replica.blobs.finish(digest, self._content_check(digest)):
                self._completed(digest)
        return json_answer(BlobState(missing=replica.blobs.missing(digest)))

    def _expect(self, digest: str) -> None:
        """Begin a blob that the chain names and this hub lacks; others were begun when announced."""
        for header in self._wanted():
            if header.digest == digest:
                self._replica.arriving.add(digest)
                self._replica.blobs.begin(digest, header.size_bytes)
                return

    def _content_check(self, digest: str) -> Callable[[Path], None] | None:
        for entry in self._contributions.values():
            if entry.header.digest == digest:
                parts = tuple((part.size_bytes, part.digest) for part in entry.header.fragments)
                return lambda path: check_fragments(path, parts)
        return None

    def _completed(self, digest: str) -> None:
        if self._incoming is not None and self._incoming.digest == digest:
            note, self._incoming = self._incoming, None
            self._replica.offer_snapshot(note)
        self._arrived(digest)

    async def _get_blob(self, request: web.Request) -> web.Response:
        replica = self._replica
        digest = _digest(request)
        if not replica.blobs.held(digest):
            raise Refusal(Reason.NOT_FOUND, f"blob {digest[:12]}… is not here")
        size = replica.blobs.size_bytes(digest)
        match = _RANGE.match(request.headers.get("Range", ""))
        start, last = (int(match[1]), int(match[2])) if match else (0, CHUNK_BYTES - 1)
        stop = min(last + 1, size)
        if start > last or start >= size or stop - start > CHUNK_BYTES:
            message = f"bytes {start}-{last} are not at most {CHUNK_BYTES} bytes of a blob of {size}"
            raise Refusal(Reason.OFFSET, message)
        payload = replica.blobs.read(digest, start, stop)
        replica.count_sent(request[_MEMBER].site_id, len(payload))
        return web.Response(
            status=206,
            body=payload,
            content_type="application/octet-stream",
            headers={"Content-Range": f"bytes {start}-{stop - 1}/{size}"},
        )

    async def _get_chain(self, request: web.Request) -> web.Response:
        replica = self._replica
        if replica.log.behind:
            raise Refusal(Reason.BUSY, "this hub is itself catching up")
        return json_answer(replica.log.chain_page(number(request, "after_round"), bytes_max=CHAIN_PAGE_BYTES))

    async def _post_chain(self, request: web.Request) -> web.Response:
        page = await json_body(request, ChainPage, _BODY_WAIT_S)
        if self._replica.extend(page):
            self._enter()
        return web.Response(status=204)

    async def _post_snapshot(self, request: web.Request) -> web.Response:
        replica = self._replica
        note = await json_body(request, SnapshotNote, _BODY_WAIT_S)
        if note.size_bytes > replica.config.snapshot_bytes_max:
            message = f"a snapshot of {note.size_bytes} bytes exceeds {replica.config.snapshot_bytes_max}"
            raise Refusal(Reason.TOO_LARGE, message)
        if replica.log.behind or replica.log.hash_at(note.round_number) != note.manifest_hash:
            raise Refusal(Reason.CHAIN_BROKEN, f"the snapshot of round {note.round_number} is not of this chain")
        if self._relayable_snapshot() is not None or (self._incoming is not None and self._incoming != note):
            raise Refusal(Reason.BUSY, "another snapshot is here or on its way")
        self._incoming = note
        replica.blobs.begin(note.digest, note.size_bytes)
        self._announce_arriving()
        if replica.blobs.held(note.digest):
            self._completed(note.digest)
        return json_answer(BlobState(missing=replica.blobs.missing(note.digest)))


def _digest(request: web.Request) -> str:
    digest = request.match_info["digest"]
    if not _DIGEST.match(digest):
        raise Refusal(Reason.MALFORMED, "a blob is named by 64 hexadecimal digits")
    return digest
