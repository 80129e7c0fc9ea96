"""One gateway's round log as a state machine: views, promises, the chain, and what was applied.

No input or output and no clock: `training.roundlog.replica` keeps it on disk and feeds it. Every
method either changes the log as a whole or raises `Refusal` and changes nothing (but for the
record of an equivocation).

Safety rests on three rules. A seal is taken only from the current view, and never from one below
the promise. A seal must continue the chain hash that is held. A view's base is a hash that the
broker signed, so a chain that reaches it is the right past, whoever sent it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from training.exchange import MemberSeat, Position, SealedRound
from training.roundlog.control import EQUIVOCATIONS_MAX, Equivocation
from training.roundlog.errors import Reason, Refusal
from training.roundlog.manifest import SealedManifest, open_manifest, read_manifest
from training.roundlog.ranges import RangeSet
from training.roundlog.signing import SignedDocument
from training.roundlog.view import GENESIS_HASH, Hash, View, ViewReport

ROUNDS_MAX: Final = 1_000_000
CHAIN_PAGE_MAX: Final = 500
# Ranks train a block in vain for each round that they replay while the others wait for them: beyond this many
# rounds a snapshot is sooner there.
REPLAYED_ROUNDS_MAX: Final = 2


class ChainPage(BaseModel):
    """Manifests that follow `start_round`, oldest first; `start_hash` is the hash that they continue."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_round: int = Field(ge=0, le=ROUNDS_MAX)
    start_hash: Hash
    manifests: tuple[SignedDocument, ...] = Field(max_length=CHAIN_PAGE_MAX)


class RoundLog:
    """The log of one site in one attempt. Attributes are for reading; methods change them."""

    def __init__(self, job_id: str, site_id: str, *, contribution_bytes_max: int) -> None:
        """Start empty: no view, no promise, the chain at its genesis."""
        self.job_id = job_id
        self.site_id = site_id
        self.contribution_bytes_max = contribution_bytes_max
        self.view: View | None = None
        self.promised = 0
        self.base_round = 0
        self.base_hash = GENESIS_HASH
        self.applied_round = 0
        self.outer_hash: str | None = None
        self.needs_snapshot = False
        self.equivocations: list[Equivocation] = []
        self.done = RangeSet()
        self.samples_by_site: Counter[str] = Counter()
        self._sealed: list[SealedManifest] = []
        self._staged: list[SealedManifest] = []
        self._staged_start: tuple[int, str] = (0, GENESIS_HASH)

    @property
    def sealed_round(self) -> int:
        """Return the last round in the chain."""
        return self.base_round + len(self._sealed)

    @property
    def chain_hash(self) -> str:
        """Return the hash of the last manifest, or of the base before any."""
        return self._sealed[-1].manifest_hash if self._sealed else self.base_hash

    @property
    def behind(self) -> bool:
        """Say whether the chain does not reach the current view's base."""
        return self.view is not None and self.hash_at(self.view.base_round) != self.view.base_hash

    def hash_at(self, round_number: int) -> str | None:
        """Return the chain's hash after `round_number`, None where the log does not hold it."""
        if round_number == self.base_round:
            return self.base_hash
        sealed = self.manifest(round_number)
        return sealed.manifest_hash if sealed else None

    def manifest(self, round_number: int) -> SealedManifest | None:
        """Return the seal of `round_number`, None where the log does not hold it."""
        index = round_number - self.base_round - 1
        return self._sealed[index] if 0 <= index < len(self._sealed) else None

    def manifests_after(self, round_number: int) -> tuple[SealedManifest, ...]:
        """Return the seals after `round_number`, oldest first."""
        return tuple(self._sealed[max(0, round_number - self.base_round) :])

    def chain_page(self, after_round: int, *, bytes_max: int) -> ChainPage:
        """Return manifests after `after_round`, or after the log's own base if that is later."""
        start = min(max(after_round, self.base_round), self.sealed_round)
        start_hash = self.hash_at(start)
        assert start_hash is not None, "start lies within the chain"
        documents: list[SignedDocument] = []
        total = 0
        for sealed in self.manifests_after(start)[:CHAIN_PAGE_MAX]:
            total += len(sealed.document.payload)
            if documents and total > bytes_max:
                break
            documents.append(sealed.document)
        return ChainPage(start_round=start, start_hash=start_hash, manifests=tuple(documents))

    def next_page_after(self) -> int:
        """Return the round after which the next page towards the view's base should start."""
        if self._staged:
            return self._staged[-1].round_number
        return 0 if self.needs_snapshot else self.sealed_round

    def promise(self, number: int) -> None:
        """Refuse seals of views below `number` from now on."""
        if number < self.promised:
            message = f"view {self.promised} is promised already; {number} is older and stays refused"
            raise Refusal(Reason.PROMISE_OLDER, message)
        self.promised = number

    def report(self, complete_round: int, blobs: Iterable[str]) -> ViewReport:
        """Say how far this log reaches; `complete_round` is the last whose blobs are held or applied.

        A site without its outer state reports nothing: it could not be anyone's base.
        """
        known = self.hash_at(complete_round)
        usable = not self.needs_snapshot and known is not None
        return ViewReport(
            promised=max(1, self.promised),
            sealed_round=complete_round if usable else 0,
            chain_hash=known if usable and known else GENESIS_HASH,
            applied_round=self.applied_round if usable else 0,
            outer_hash=self.outer_hash if usable else None,
            blobs=tuple(sorted(blobs)[:10_000]) if usable else (),
        )

    def check_view(self, view: View) -> bool:
        """Say whether `view` is news: False for a repeat. Raises Refusal where it may not be installed."""
        if view.job_id != self.job_id or view.member(self.site_id) is None:
            message = f"view {view.number} of job {view.job_id} does not list {self.site_id} of job {self.job_id}"
            raise Refusal(Reason.NOT_MEMBER, message)
        if self.view is not None and view.number == self.view.number:
            if view != self.view:
                message = f"view {view.number} was installed with other content; the broker must raise the number"
                raise Refusal(Reason.VIEW_CONFLICT, message)
            return False
        if view.number < self.promised or (self.view is not None and view.number < self.view.number):
            current = max(self.promised, self.view.number if self.view else 0)
            message = f"view {view.number} is older than {current}, which this site has promised or installed"
            raise Refusal(Reason.VIEW_OLDER, message)
        return True

    def install(self, view: View) -> None:
        """Make `view` current and settle how this log stands to its base.

        The chain is cut where it goes beyond the base: what no promised member knew does not
        count. Where it does not reach the base it is `behind` until `extend` catches up. A site
        that applied a round which does not count, or that starts in the middle, needs a snapshot.
        """
        if not self.check_view(view):
            return
        first = self.view is None
        self.view = view
        self.promised = view.number
        self._staged = []
        if first and (view.base_reporter is None or view.base_round == 0):
            self._replace_chain(view.base_round, view.base_hash, [])
            self.applied_round = view.base_round
        elif first:
            self.needs_snapshot = True
        elif not self.behind:
            self._replace_chain(self.base_round, self.base_hash, self._sealed[: view.base_round - self.base_round])
            self.needs_snapshot |= self.applied_round > view.base_round
        elif self.sealed_round >= view.base_round:
            self.needs_snapshot = True

    def extend(self, page: ChainPage) -> bool:
        """Take one page of the chain towards the view's base; return whether the base is reached.

        Pages are staged and count only once their last hash is the one that the broker signed.
        Raises Refusal where a page does not link or ends elsewhere.
        """
        assert self.view is not None, "there is a base to reach only in a view"
        if not self.behind:
            return True
        tip = (self._staged[-1].round_number, self._staged[-1].manifest_hash) if self._staged else self._staged_start
        if not self._staged or tip != (page.start_round, page.start_hash):
            self._staged = []
            tip = self._staged_start = (page.start_round, page.start_hash)
        base = (self.view.base_round, self.view.base_hash)
        for document in page.manifests:
            if tip[0] >= base[0]:
                break
            sealed = read_manifest(document)
            if (sealed.round_number - 1, sealed.manifest.previous_hash) != tip:
                self._staged = []
                message = f"the manifest of round {sealed.round_number} does not continue round {tip[0]}"
                raise Refusal(Reason.CHAIN_BROKEN, message)
            self._staged.append(sealed)
            tip = (sealed.round_number, sealed.manifest_hash)
        if tip[0] < base[0]:
            return False
        if tip != base:
            self._staged = []
            message = f"this chain ends round {base[0]} with {tip[1][:12]}…, the view's base is {base[1][:12]}…"
            raise Refusal(Reason.CHAIN_BROKEN, message)
        self._adopt_staged()
        return True

    def _adopt_staged(self) -> None:
        start_round, start_hash = self._staged_start
        staged, self._staged = self._staged, []
        hashes = {start_round: start_hash} | {sealed.round_number: sealed.manifest_hash for sealed in staged}
        if hashes.get(self.sealed_round) == self.chain_hash:
            later = [sealed for sealed in staged if sealed.round_number > self.sealed_round]
            self._replace_chain(self.base_round, self.base_hash, self._sealed + later)
            self.needs_snapshot |= self.sealed_round - self.applied_round > REPLAYED_ROUNDS_MAX
        else:
            self.needs_snapshot = True
            self._replace_chain(start_round, start_hash, staged)

    def open_next(self, document: SignedDocument) -> SealedManifest:
        """Return the seal of the next round, verified against view, promise and chain. Raises Refusal."""
        view = self._sealing_view()
        sealed = open_manifest(document, view, bytes_max=self.contribution_bytes_max)
        self._check_next(sealed)
        return sealed

    def append(self, sealed: SealedManifest) -> None:
        """Take a seal from `open_next` (or this site's own, as hub) into the chain. Raises Refusal."""
        view = self._sealing_view()
        if sealed.manifest.view_number != view.number:
            message = (
                f"round {sealed.round_number} was sealed in view {sealed.manifest.view_number}, now is {view.number}"
            )
            raise Refusal(Reason.VIEW_OLDER, message)
        self._check_next(sealed)
        self._sealed.append(sealed)
        self._count(sealed)

    def applied(self, round_number: int, outer_hash: str | None) -> None:
        """Record that the ranks applied `round_number`. An older report than the last changes nothing."""
        if round_number > self.sealed_round:
            message = f"round {round_number} is not sealed; the chain ends at {self.sealed_round}"
            raise Refusal(Reason.ROUND_UNSEALED, message)
        if round_number >= self.applied_round:
            self.applied_round, self.outer_hash = round_number, outer_hash

    def restored(self, round_number: int, outer_hash: str | None) -> None:
        """Record that the ranks hold a snapshot after `round_number`: the site is on the chain again."""
        assert self.base_round <= round_number <= self.sealed_round, "a snapshot of the chain that is held"
        self.applied_round, self.outer_hash = round_number, outer_hash
        self.needs_snapshot = False

    def noted(self, equivocation: Equivocation) -> None:
        """Keep a report of equivocation, once, the newest hundred."""
        if equivocation not in self.equivocations:
            self.equivocations = [*self.equivocations, equivocation][-EQUIVOCATIONS_MAX:]

    def position(self) -> Position | None:
        """Return where the ranks start, None before the first view or while the base is out of reach."""
        if self.view is None or self.behind:
            return None
        return Position(
            base_round=self.applied_round,
            base_hash=self.hash_at(self.applied_round) or self.view.base_hash,
            members=seats(self.view),
            done=self.done.ranges,
            needs_snapshot=self.needs_snapshot,
        )

    def sealed_answer(self, round_number: int) -> SealedRound | None:
        """Return a sealed round as the ranks see it, None while it is open."""
        sealed = self.manifest(round_number)
        if sealed is None or self.view is None:
            return None
        return SealedRound(
            number=round_number,
            view_number=sealed.manifest.view_number,
            manifest_hash=sealed.manifest_hash,
            entries=tuple(entry.header.entry() for entry in sealed.contributions),
            members=seats(self.view),
        )

    def load_chain(self, base_round: int, base_hash: str, documents: Iterable[SignedDocument]) -> None:
        """Take back a chain from this gateway's own disk, up to the first manifest that does not link."""
        chain: list[SealedManifest] = []
        tip = (base_round, base_hash)
        for document in documents:
            sealed = read_manifest(document)
            if (sealed.round_number - 1, sealed.manifest.previous_hash) != tip:
                break
            chain.append(sealed)
            tip = (sealed.round_number, sealed.manifest_hash)
        self._replace_chain(base_round, base_hash, chain)

    def _sealing_view(self) -> View:
        """Return the view whose seals count now. Raises Refusal where none do."""
        if self.view is None:
            raise Refusal(Reason.VIEW_ABSENT, "no view is installed; the agent hands over the first one")
        if self.promised > self.view.number:
            message = f"view {self.promised} is promised: seals of view {self.view.number} no longer count"
            raise Refusal(Reason.VIEW_OLDER, message)
        if self.behind:
            raise Refusal(Reason.BUSY, f"the chain does not reach round {self.view.base_round} yet")
        return self.view

    def _check_next(self, sealed: SealedManifest) -> None:
        if sealed.round_number <= self.sealed_round:
            raise Refusal(Reason.ROUND_SEALED, f"round {sealed.round_number} is sealed already")
        if sealed.round_number > self.sealed_round + 1:
            message = f"round {sealed.round_number} cannot follow round {self.sealed_round}; fetch those between"
            raise Refusal(Reason.ROUND_FUTURE, message)
        if sealed.manifest.previous_hash != self.chain_hash:
            self._note(sealed.round_number, sealed.manifest.sealed_by, "manifest", sealed.manifest.previous_hash)
            message = f"hub {sealed.manifest.sealed_by} continues another chain than this site holds"
            raise Refusal(Reason.EQUIVOCATION, message)
        for entry in sealed.contributions:
            header = entry.header
            if header.previous_hash != self.chain_hash:
                self._note(sealed.round_number, header.site_id, "manifest", header.previous_hash)
                message = f"{header.site_id} holds another chain after round {self.sealed_round}"
                raise Refusal(Reason.EQUIVOCATION, message)
            if header.outer_hash != sealed.contributions[0].header.outer_hash:
                raise Refusal(Reason.EQUIVOCATION, f"{header.site_id} started round {header.round_number} elsewhere")
            if self.done.overlaps(header.samples) is not None:
                raise Refusal(Reason.SAMPLES_OVERLAP, f"{header.site_id} repeats samples that are done")

    def _note(self, round_number: int, site_id: str, about: str, named: str) -> None:
        self.noted(
            Equivocation(round_number=round_number, site_id=site_id, about=about, expected=self.chain_hash, named=named)
        )

    def _replace_chain(self, base_round: int, base_hash: str, sealed: list[SealedManifest]) -> None:
        self.base_round, self.base_hash, self._sealed = base_round, base_hash, list(sealed)
        self.done, self.samples_by_site = RangeSet(), Counter()
        self.done = RangeSet().union(
            part for manifest in sealed for entry in manifest.contributions for part in entry.header.samples
        )
        for manifest in sealed:
            self._count_by_site(manifest)

    def _count(self, sealed: SealedManifest) -> None:
        self.done = self.done.union(part for entry in sealed.contributions for part in entry.header.samples)
        self._count_by_site(sealed)

    def _count_by_site(self, sealed: SealedManifest) -> None:
        for entry in sealed.contributions:
            samples = sum(part.stop - part.start for part in entry.header.samples)
            self.samples_by_site[entry.header.site_id] += samples


def seats(view: View) -> tuple[MemberSeat, ...]:
    """Return the members of `view` as the ranks see them."""
    return tuple(MemberSeat(member.site_id, member.epoch, member.gpus) for member in view.members)
