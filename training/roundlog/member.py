"""The member role: follow the hub of the current view.

Two loops. One polls the hub's state: it takes new seals once their blobs are here, and brings the
hub what it lacks after a change of view. The other delivers the site's own contribution. Both
repeat until the view changes; what they had done needs no memory, since the hub's state says
what is missing.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

import aiohttp
import structlog
from pydantic import ValidationError

from training.roundlog.blobs import ARRIVING_MAX
from training.roundlog.errors import Reason, Refusal
from training.roundlog.hub_wire import CHAIN_PAGE_BYTES, HubState
from training.roundlog.replica import Replica
from training.roundlog.transfer import HubLink
from training.roundlog.view import View

# The hub answers at least this often, so that its silence is noticed; an answer and its question are some 1 kB.
_POLL_S_MAX: Final = 1.0
_RETRY_FIRST_S: Final = 0.05
_RETRY_LONGEST_S: Final = 1.0
# What the hub will refuse again however often the same header comes.
_FINAL: Final = frozenset(
    {
        Reason.SIGNATURE,
        Reason.TOO_LARGE,
        Reason.MALFORMED,
        Reason.WRONG_JOB,
        Reason.WRONG_EPOCH,
        Reason.OVERWEIGHT,
        Reason.CHANGED,
        Reason.LENGTHS,
        Reason.SAMPLES,
        Reason.SAMPLES_OVERLAP,
        Reason.EQUIVOCATION,
        Reason.ROUND_SEALED,
    }
)
_TROUBLE: Final = (aiohttp.ClientError, OSError, TimeoutError, ssl.SSLError, ValidationError)

log: Final = structlog.get_logger(__name__)


class Follower:
    """One member's work on one view whose hub is another site."""

    def __init__(self, replica: Replica, view: View) -> None:
        """Follow the hub of `view` on behalf of `replica`."""
        self._replica = replica
        self._view = view
        # Poll and margin together stay within half of patience, so that a hub that vanished without
        # a word is reported while there is time for a new view.
        self._poll_s = min(_POLL_S_MAX, replica.config.patience_s / 4)
        self._delivered: str | None = None
        self._seen = 0

    async def run(self) -> None:
        """Follow until cancelled."""
        async with HubLink(self._replica, self._view) as link, asyncio.TaskGroup() as group:
            group.create_task(self._repeat(lambda: self._follow(link), reports_hub=True))
            group.create_task(self._repeat(lambda: self._deliver(link), reports_hub=False))

    async def _repeat(self, step: Callable[[], Awaitable[None]], *, reports_hub: bool) -> None:
        retry_s = _RETRY_FIRST_S
        while True:
            try:
                await step()
            except Refusal as refusal:
                log.info("hub_refused", reason=str(refusal.reason), message=str(refusal))
            except _TROUBLE as error:
                log.info("hub_unreachable", hub=self._view.hub, error=str(error)[:300])
                if reports_hub:
                    self._seen = 0
                    self._replica.hub_away(silent=isinstance(error, TimeoutError))
            else:
                retry_s = _RETRY_FIRST_S
                continue
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _RETRY_LONGEST_S)

    async def _follow(self, link: HubLink) -> None:
        """Ask for the hub's state once and act on it."""
        replica = self._replica
        known = replica.changed.version
        state = await link.state(
            after_round=replica.log.sealed_round,
            applied_round=replica.log.applied_round,
            seeking=replica.log.needs_snapshot,
            seen=self._seen,
            wait_s=self._poll_s,
        )
        replica.hub_heard(state.waiting_for)
        if replica.config.site_id in state.waiting_for and state.sealed_round == replica.log.sealed_round:
            # The hub restarted, or never had it: deliver once more.
            self._redeliver()
        if replica.log.behind:
            await self._catch_up(link, state)
        elif state.behind:
            if self._brings_base():
                await self._bring_chain(link, state)
        else:
            await self._take_seal(link, state)
            await self._fetch_wanted(link, state)
            await self._bring_wanted(link, state)
            await self._take_snapshot(link, state)
            if not replica.log.needs_snapshot:
                replica.applied_everywhere(min(state.applied_by_all, replica.log.sealed_round))
        # What changed here meanwhile (a snapshot, an applied round) may call for the hub's state anew.
        self._seen = state.version if replica.changed.version == known else 0

    def _redeliver(self) -> None:
        if self._delivered is not None:
            self._delivered = None
            self._replica.changed.ring()

    async def _take_seal(self, link: HubLink, state: HubState) -> None:
        """Take the next seal once all its blobs are here, so that whoever knows a round holds it whole."""
        replica = self._replica
        if state.manifest is None:
            return
        sealed = replica.log.open_next(state.manifest)
        digests = {entry.header.digest for entry in sealed.contributions}
        replica.arriving |= digests
        try:
            for entry in sealed.contributions:
                if not replica.blobs.held(entry.header.digest):
                    await link.download(entry.header.digest, entry.header.size_bytes)
            replica.append(sealed)
        finally:
            replica.arriving -= digests

    async def _catch_up(self, link: HubLink, state: HubState) -> None:
        """Fetch the chain up to the view's base from the hub."""
        replica = self._replica
        if state.behind:
            await replica.changed.wait(_RETRY_FIRST_S)
            return
        page = await link.chain_page(replica.log.next_page_after())
        replica.extend(page)

    def _brings_base(self) -> bool:
        """Say whether it falls to this site to bring the hub the base: to its reporter, if it is here."""
        reporter = self._view.base_reporter
        return reporter == self._replica.config.site_id or reporter is None or self._view.member(reporter) is None

    async def _bring_chain(self, link: HubLink, state: HubState) -> None:
        """Bring the hub the chain that the view's base stands on."""
        log_ = self._replica.log
        known = log_.hash_at(state.sealed_round) == state.chain_hash
        after = state.sealed_round if known else log_.base_round
        while after < self._view.base_round:
            page = log_.chain_page(after, bytes_max=CHAIN_PAGE_BYTES)
            await link.post_chain(page)
            after = page.start_round + len(page.manifests)
        if not known and after == log_.base_round:
            await link.post_chain(log_.chain_page(after, bytes_max=CHAIN_PAGE_BYTES))

    async def _fetch_wanted(self, link: HubLink, state: HubState) -> None:
        """Fetch the blobs of sealed rounds that this site has yet to apply."""
        replica = self._replica
        if replica.log.needs_snapshot and replica.usable_snapshot() is None:
            return
        snapshot = replica.usable_snapshot()
        after = snapshot.round_number if replica.log.needs_snapshot and snapshot else replica.log.applied_round
        hub_lacks = set(state.wanted)
        for header in [*replica.wanted(after)][:ARRIVING_MAX]:
            if header.digest in hub_lacks:
                continue
            replica.arriving.add(header.digest)
            try:
                await link.download(header.digest, header.size_bytes)
            except Refusal as refusal:
                if refusal.reason is not Reason.NOT_FOUND:
                    raise
                log.warning("blob_gone", round=header.round_number, site=header.site_id)
                replica.lost_touch()
                return
            finally:
                replica.arriving.discard(header.digest)
            replica.changed.ring()

    async def _bring_wanted(self, link: HubLink, state: HubState) -> None:
        """Bring the hub blobs, or a snapshot, that it lacks and this site holds."""
        replica = self._replica
        for digest in state.wanted:
            if replica.blobs.held(digest):
                await link.upload(digest, (await link.blob_state(digest)).missing)
        note = replica.usable_snapshot()
        if state.snapshot_wanted and note is not None and not replica.log.needs_snapshot:
            await link.upload(note.digest, (await link.announce_snapshot(note)).missing)

    async def _take_snapshot(self, link: HubLink, state: HubState) -> None:
        """Fetch the snapshot that this site needs."""
        replica = self._replica
        note = state.snapshot
        if note is None or not replica.log.needs_snapshot or replica.usable_snapshot() == note:
            return
        if note.size_bytes > replica.config.snapshot_bytes_max:
            raise Refusal(Reason.TOO_LARGE, f"the snapshot has {note.size_bytes} bytes, too many for this site")
        replica.arriving.add(note.digest)
        try:
            await link.download(note.digest, note.size_bytes)
            replica.offer_snapshot(note)
        finally:
            replica.arriving.discard(note.digest)

    async def _deliver(self, link: HubLink) -> None:
        """Send the site's own contribution to the open round, once for each header."""
        replica = self._replica
        own = replica.own_contribution()
        if own is None or own.document.payload == self._delivered:
            await replica.changed.wait(self._poll_s)
            return
        try:
            state = await link.announce(own.document)
            if state.missing:
                await link.upload(own.header.digest, state.missing)
        except Refusal as refusal:
            if refusal.reason not in _FINAL:
                raise
            log.warning("contribution_refused", reason=str(refusal.reason), message=str(refusal))
        self._delivered = own.document.payload
