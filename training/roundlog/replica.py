"""One gateway's copy of the round log: the pure log, its files, and a bell when either changes.

The ranks' and the agent's sockets, the hub role and the member role all work on this one object,
in one event loop; between two awaits it is never half changed. `log` is for reading here: what
changes it goes through this class, which keeps the files in step.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from training.attempt import GatewayConfig
from training.clock import Clock
from training.errors import SignatureError
from training.exchange import Leaving
from training.roundlog.blobs import BlobStore
from training.roundlog.contribution import Contribution, FragmentPart, Header, sign_contribution
from training.roundlog.control import Equivocation, LinkBytes
from training.roundlog.credentials import load_attempt_key
from training.roundlog.doorbell import Doorbell
from training.roundlog.errors import Reason, Refusal
from training.roundlog.hub_wire import WANTED_MAX, SnapshotNote
from training.roundlog.log import ChainPage, RoundLog
from training.roundlog.manifest import SealedManifest
from training.roundlog.ranks_wire import CommitRequest
from training.roundlog.record import Recorder
from training.roundlog.signing import SignedDocument
from training.roundlog.store import GatewayRecord, LogStore, OwnContribution
from training.roundlog.view import View, ViewReport, open_view

# A member that has not applied a round after this many more is taken for lost: it needs a snapshot.
ROUNDS_HELD_MAX: Final = 64
# Blobs since the newest snapshot are kept for sites that join, at most this many rounds.
ROUNDS_FOR_JOINERS_MAX: Final = 8


class Replica:
    """The round log as this gateway holds it, and what its own site contributed."""

    def __init__(self, config: GatewayConfig, clock: Clock) -> None:
        """Load the state folder; what an earlier process had acknowledged is there again."""
        self.config = config
        self.clock = clock
        self.key = load_attempt_key(Path(config.key_path).read_bytes())
        self.store = LogStore(Path(config.state_dir))
        self.blobs = BlobStore(self.store.blobs)
        self.log = RoundLog(config.job_id, config.site_id, contribution_bytes_max=config.contribution_bytes_max)
        self._record = _recorder(config, self.blobs)
        self.changed = Doorbell()
        self.own: OwnContribution | None = None
        self.snapshot: SnapshotNote | None = None
        self.arriving: set[str] = set()
        # Set where the agent asked this site to stop; the next contribution says so.
        self.leaving: Leaving | None = None
        self.applied_by_all = 0
        self.waiting_for: tuple[str, ...] = ()
        self.hub_lost_at_s: float | None = None
        # At the hub: when each member that is out of reach was last heard, by the monotonic clock.
        self.members_lost_at_s: dict[str, float] = {}
        self._heard_s = clock.monotonic_s()
        self._sent_bytes: dict[str, int] = {}
        self._received_bytes: dict[str, int] = {}
        self._view_document: SignedDocument | None = None
        self._load()

    @property
    def view(self) -> View | None:
        """Return the current view."""
        return self.log.view

    @property
    def complete_round(self) -> int:
        """Return the last round that the ranks may see: every blob since the applied one is held."""
        complete = self.log.applied_round
        for sealed in self.log.manifests_after(complete):
            if not all(self.blobs.held(entry.header.digest) for entry in sealed.contributions):
                break
            complete = sealed.round_number
        return complete

    @property
    def links(self) -> dict[str, LinkBytes]:
        """Return the payload bytes exchanged with each other site."""
        return {
            site_id: LinkBytes(
                bytes_sent=self._sent_bytes.get(site_id, 0), bytes_received=self._received_bytes.get(site_id, 0)
            )
            for site_id in sorted({*self._sent_bytes, *self._received_bytes})
        }

    def count_sent(self, site_id: str, size_bytes: int) -> None:
        """Count payload bytes sent to a site."""
        self._sent_bytes[site_id] = self._sent_bytes.get(site_id, 0) + size_bytes

    def count_received(self, site_id: str, size_bytes: int) -> None:
        """Count payload bytes received from a site."""
        self._received_bytes[site_id] = self._received_bytes.get(site_id, 0) + size_bytes

    def hub_heard(self, waiting_for: tuple[str, ...]) -> None:
        """Record that the hub answered, and whose contribution it lacks."""
        self._heard_s = self.clock.monotonic_s()
        self.hub_lost_at_s = None
        self.waiting_for = waiting_for

    def hub_away(self, *, silent: bool) -> None:
        """Record that the hub is out of reach: since it last answered where it fell `silent`, else from now.

        A connection that was refused or cut says nothing about the time before: its hub may have
        been idle, and its gateway may only be starting again.
        """
        if self.hub_lost_at_s is None:
            self.hub_lost_at_s = self._heard_s if silent else self.clock.monotonic_s()

    def install_view(self, document: SignedDocument) -> View:
        """Verify and install a view. Raises Refusal where it is forged, older or in conflict."""
        view = self._open_view(document)
        if self.log.check_view(view):
            if view.hub == self.config.site_id and len(view.members) > 1 and self.config.listen is None:
                message = f"view {view.number} names {view.hub} as hub, but its gateway does not listen"
                raise Refusal(Reason.VIEW_CONFLICT, message)
            self.log.install(view)
            self._view_document = document
            if self._record is not None:
                self._record.view(view, document)
            self.applied_by_all = 0
            self.waiting_for = ()
            self.hub_lost_at_s, self._heard_s = None, self.clock.monotonic_s()
            self.members_lost_at_s = {}
            self._chain_replaced()
        return view

    def promise(self, number: int) -> ViewReport:
        """Promise view `number` and report how far this log reaches."""
        self.log.promise(number)
        self.save()
        self.changed.ring()
        return self.log.report(self.complete_round, self.blobs.digests())

    def extend(self, page: ChainPage) -> bool:
        """Take a page of the chain towards the view's base; return whether it is reached."""
        was_behind = self.log.behind
        reached = self.log.extend(page)
        if reached and was_behind:
            self._chain_replaced()
        return reached

    def append(self, sealed: SealedManifest) -> None:
        """Take the next seal into the chain."""
        self.log.append(sealed)
        self.store.save_manifest(sealed)
        if self._record is not None:
            self._record.sealed(sealed)  # before its blobs may be dropped
        self.waiting_for = ()
        self.prune()
        self.changed.ring()

    def noted(self, equivocation: Equivocation) -> None:
        """Keep a report of equivocation."""
        self.log.noted(equivocation)
        self.save()

    def applied(self, round_number: int, outer_hash: str) -> None:
        """Record that the ranks applied a round."""
        self.log.applied(round_number, outer_hash)
        if self._record is not None:
            self._record.applied(round_number, outer_hash)
        self._moved()

    def applied_everywhere(self, round_number: int) -> None:
        """Record that every member has applied `round_number`."""
        if round_number > self.applied_by_all:
            self.applied_by_all = round_number
            self._moved()

    def ranks_started_anew(self) -> None:
        """Record that the ranks lost what they had applied: they take it from a snapshot.

        Ranks that had applied nothing start where the first ones did.
        """
        if self.log.applied_round > self.log.base_round:
            if self.snapshot is not None and any(True for _ in self.wanted(self.snapshot.round_number)):
                self.snapshot = None  # nobody could come from there to the chain's end
            self.lost_touch()

    def lost_touch(self) -> None:
        """Record that blobs which this site still needs are gone everywhere: only a snapshot helps."""
        self.log.needs_snapshot = True
        self._moved()

    def take_fragment(self, round_number: int, fragment: int, path: Path) -> None:
        """Move a posted fragment from `path` into its place. Raises Refusal where the site's fragments grow too large.

        One for a round that is sealed already is forgotten: the ranks learn from the manifest that
        the round went without them, and put their work into the carry.
        """
        if not self.check_open(round_number):
            return
        place = self.store.posted_path(round_number, fragment)
        posted = sum(other.stat().st_size for other in place.parent.iterdir() if other != place)
        if posted + path.stat().st_size > self.config.contribution_bytes_max:
            message = (
                f"the fragments of round {round_number} exceed the job's {self.config.contribution_bytes_max} bytes"
            )
            raise Refusal(Reason.TOO_LARGE, message)
        path.replace(place)

    async def commit(self, round_number: int, request: CommitRequest) -> None:
        """Join the posted fragments of a round into the site's contribution. Raises Refusal.

        A round that is sealed already went without this site: the commit is taken and forgotten.
        """
        if not self.check_open(round_number):
            return
        with self.store.incoming() as joined:
            await self._commit_joined(round_number, request, joined)

    async def _commit_joined(self, round_number: int, request: CommitRequest, joined: Path) -> None:
        paths = [self.store.posted_path(round_number, fragment) for fragment in range(request.fragments)]
        try:
            parts, digest = await asyncio.to_thread(_join, paths, joined, self.config.contribution_bytes_max)
        except (FileNotFoundError, Refusal):
            # Where a quorum seals without this site, what it posted may be dropped in the middle of the reading.
            if self.check_open(round_number):
                raise
            return
        own = OwnContribution(
            round_number=round_number,
            weight=request.weight,
            samples=request.samples,
            outer_hash=request.outer_hash,
            digest=digest,
            size_bytes=sum(part.size_bytes for part in parts),
            fragments=parts,
            # A commit that is repeated says what it said: a contribution never changes.
            leaving=self.leaving if self.own is None or self.own.round_number != round_number else self.own.leaving,
        )
        if not self.check_open(round_number) or (self.own is not None and self.own.round_number == round_number):
            if self.own is not None and self.own.round_number == round_number and self.own != own:
                message = f"round {round_number} was committed with other content; a contribution never changes"
                raise Refusal(Reason.CHANGED, message)
            return
        self.blobs.take(joined, digest)
        self.own = own
        self._moved()

    def check_open(self, round_number: int) -> bool:
        """Say whether a round is open: False where it is sealed. Raises Refusal where it is yet to open."""
        if round_number > self.log.sealed_round + 1:
            message = f"round {round_number} cannot be open: round {self.log.sealed_round + 1} is not sealed"
            raise Refusal(Reason.ROUND_FUTURE, message)
        return round_number > self.log.sealed_round

    def own_contribution(self) -> Contribution | None:
        """Return the site's contribution to the open round, signed for the current view, or None."""
        view, own = self.view, self.own
        if view is None or own is None or self.log.behind or self.log.needs_snapshot:
            return None
        member = view.member(self.config.site_id)
        if member is None or own.round_number != self.log.sealed_round + 1:
            return None
        header = Header(
            job_id=view.job_id,
            view_number=view.number,
            round_number=own.round_number,
            site_id=member.site_id,
            epoch=member.epoch,
            digest=own.digest,
            size_bytes=own.size_bytes,
            weight=min(own.weight, member.weight_max),
            samples=own.samples,
            fragments=own.fragments,
            previous_hash=self.log.chain_hash,
            outer_hash=own.outer_hash,
            leaving=own.leaving,
        )
        return sign_contribution(header, self.key)

    def offer_snapshot(self, note: SnapshotNote) -> None:
        """Offer a snapshot whose blob is held, in place of an older one."""
        if self.snapshot is None or note.round_number >= self.snapshot.round_number:
            self.snapshot = note
            self._moved()

    def restored(self, note: SnapshotNote) -> None:
        """Record that the ranks hold the state of a snapshot."""
        self.log.restored(note.round_number, note.outer_hash)
        self._moved()

    def usable_snapshot(self) -> SnapshotNote | None:
        """Return the snapshot that is held and stands on this chain, None where there is none."""
        note = self.snapshot
        if note is None or self.log.behind or not self.blobs.held(note.digest):
            return None
        return note if self.log.hash_at(note.round_number) == note.manifest_hash else None

    def wanted(self, after_round: int) -> Iterator[Header]:
        """Yield the headers of sealed contributions after `after_round` whose blobs are not here."""
        start = max(after_round, self.log.sealed_round - ROUNDS_HELD_MAX)
        count = 0
        for sealed in self.log.manifests_after(start):
            for entry in sealed.contributions:
                if not self.blobs.held(entry.header.digest) and count < WANTED_MAX:
                    count += 1
                    yield entry.header

    def prune(self) -> None:
        """Drop blobs and posted fragments that nobody will ask for again."""
        sealed_round = self.log.sealed_round
        kept_for_joiners = self.snapshot.round_number if self.snapshot else 0
        released = min(
            self.applied_by_all, self.log.applied_round, max(kept_for_joiners, sealed_round - ROUNDS_FOR_JOINERS_MAX)
        )
        released = max(released, sealed_round - ROUNDS_HELD_MAX)
        keep = {entry.header.digest for sealed in self.log.manifests_after(released) for entry in sealed.contributions}
        if self.own is not None and self.own.round_number > sealed_round:
            keep.add(self.own.digest)
        if self.snapshot is not None:
            keep.add(self.snapshot.digest)
        self.blobs.keep_only(keep | self.arriving, self.arriving)
        self.store.drop_posted(sealed_round)

    def save(self) -> None:
        """Write the record."""
        log = self.log
        self.store.save_record(
            GatewayRecord(
                promised=log.promised,
                view=self._view_document,
                base_round=log.base_round,
                base_hash=log.base_hash,
                applied_round=log.applied_round,
                outer_hash=log.outer_hash,
                needs_snapshot=log.needs_snapshot,
                equivocations=tuple(log.equivocations),
                own=self.own,
                snapshot=self.snapshot,
                links=self.links,
            )
        )

    def _load(self) -> None:
        record = self.store.load_record()
        log = self.log
        if record.view is not None:
            log.view = self._open_view(record.view)
            self._view_document = record.view
        log.promised = record.promised
        log.load_chain(record.base_round, record.base_hash, self.store.load_manifests(record.base_round))
        log.applied_round = min(record.applied_round, log.sealed_round)
        log.outer_hash = record.outer_hash
        log.needs_snapshot = record.needs_snapshot
        log.equivocations = list(record.equivocations)
        if record.own is not None and self.blobs.held(record.own.digest):
            self.own = record.own
        if record.snapshot is not None and self.blobs.held(record.snapshot.digest):
            self.snapshot = record.snapshot
        self._sent_bytes = {site_id: link.bytes_sent for site_id, link in record.links.items()}
        self._received_bytes = {site_id: link.bytes_received for site_id, link in record.links.items()}
        # Not pruned here: until the first view is heard of again, nothing is known to be superfluous.

    def _open_view(self, document: SignedDocument) -> View:
        try:
            return open_view(document, self.config.authority_key)
        except (SignatureError, ValueError) as error:
            message = f"this view is not one that the broker signed: {error}"
            raise Refusal(Reason.VIEW_FORGED, message[:500]) from None

    def _chain_replaced(self) -> None:
        self.store.rewrite_chain(self.log)
        if self._record is not None:
            self._record.rewrite(self.log.manifests_after(self.log.base_round))
        self._moved()

    def _moved(self) -> None:
        self.save()
        self.prune()
        self.changed.ring()


def _recorder(config: GatewayConfig, blobs: BlobStore) -> Recorder | None:
    if config.record_dir is None:
        return None
    return Recorder(Path(config.record_dir), config.site_id, blobs, bytes_max=config.record_bytes_max)


def _join(paths: list[Path], joined: Path, bytes_max: int) -> tuple[tuple[FragmentPart, ...], str]:
    """Write the posted fragments one after the other; return their parts and the digest of all."""
    total = hashlib.sha256()
    parts: list[FragmentPart] = []
    size = 0
    # Not "wb", which would make it anew where a commit that was given up has removed it.
    with joined.open("r+b") as file:
        for number, path in enumerate(paths):
            if not path.exists():
                message = f"fragment {number} of {len(paths)} was not posted; post all before the commit"
                raise Refusal(Reason.INCOMPLETE, message)
            payload = path.read_bytes()
            size += len(payload)
            if size > bytes_max:
                raise Refusal(Reason.TOO_LARGE, f"the contribution exceeds the job's {bytes_max} bytes")
            total.update(payload)
            file.write(payload)
            parts.append(FragmentPart(size_bytes=len(payload), digest=hashlib.sha256(payload).hexdigest()))
    return tuple(parts), total.hexdigest()
