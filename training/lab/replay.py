"""Replay a recorded run: its seals, merges and outer steps once more, without the sites, to the same final hash.

    python -m training.lab.replay RUN      one JSON document; exit code 1 and {"code", "message"} where it differs

What is checked on the way, round by round and in this order: the view that was in force (the authority's signature, and
that its base lies on the chain), the seal (the hub's signature, its place in the chain), every contribution (its site's
signature, its digests, the chain and the outer state that it names), the merge and the outer step, done by the runtime's own
`OuterShare`, and then its hash against what each site reported. Inner steps are not repeated: what they came to is in the
contributions. So a run replays whatever happened to its sites: all that counts of a death, a moved hub or a late
contribution is in the chain.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from training.codecs import Values
from training.errors import CheckpointError, SignatureError
from training.fragments import Fragment
from training.lab.errors import LabError, ReplayError
from training.lab.replayed import Replayed
from training.lab.run_record import START, RunRecord
from training.outer_share import OuterShare
from training.ranks import Ranks
from training.roundlog.contribution import Contribution
from training.roundlog.errors import Refusal
from training.roundlog.manifest import SealedManifest, open_manifest, read_manifest
from training.roundlog.record import SiteRecord
from training.roundlog.view import View, open_view
from training.run_start import read_start
from training.strategies import strategy_of

_HASH_SHOWN: Final = 12
# Of what the outer hash covers, what comes out of the log alone.
REPRODUCED: Final[dict[str, str]] = {
    "every_step": (
        "the merged gradient of every step and its hash; not the parameters, which each site's own optimizer made of it"
    ),
    "neighbour": (
        "every site's copy and their mean, which is the model that the job delivers; not what each site held itself"
    ),
}
_REPRODUCED_ELSE: Final = "parameters and outer momentum after every round"

Read = TypeVar("Read")


class RecordedModel:
    """The model of a recorded run as far as the outer state needs one: its fragments, and what they were at the start."""

    def __init__(self, fragments: tuple[Fragment, ...], theta: Mapping[int, Values]) -> None:
        """Hold the fragments of the run's start."""
        self.fragments = fragments
        self._theta = theta

    def read(self, fragment: Fragment, at: int = 0) -> Values:  # noqa: ARG002 - there is one rank
        """Return the fragment's values at the start."""
        return self._theta[fragment.number].copy()

    def read_gradients(self, fragment: Fragment, at: int = 0) -> Values:  # noqa: ARG002 - there is one rank
        """Return zeros: nothing is trained here."""
        return np.zeros(fragment.elements, dtype=np.float32)

    def write(self, fragment: Fragment, values: Values) -> None:
        """Do nothing: there is no model to write to."""

    def write_gradients(self, fragment: Fragment, values: Values) -> None:
        """Do nothing."""

    def shapes(self, fragment: Fragment) -> tuple[tuple[int, int], ...]:
        """Return each piece as one row: shapes matter to encoding, of which a replay does none."""
        return tuple((1, piece.stop - piece.start) for piece in fragment.pieces)


def replay(folder: Path) -> Replayed:
    """Replay the run in `folder`. Raises ReplayError with the first round that differs, LabError where there is no run."""
    run = RunRecord.read(folder)
    if run.plan.strategy == "local":
        message = f"{run.job} ran on one site: nothing was merged, so there is nothing to replay"
        raise ReplayError(message)
    return _Replay(folder, run).to_the_end()


class _Replay:
    def __init__(self, folder: Path, run: RunRecord) -> None:
        self._run = run
        self._sites = {site_id: SiteRecord(folder, site_id) for site_id in run.sites}
        try:
            fragments, start = read_start(folder / START)
        except CheckpointError as error:
            raise ReplayError(f"the run's start: {error}") from error
        self._share: OuterShare[RecordedModel] = OuterShare(
            RecordedModel(fragments, start.outer["theta"]),
            Ranks(),
            strategy_of(run.plan, "", run.links),
            total_samples=run.samples,
        )
        self._share.restore(start.header.round_number, start.done, start.outer, joined=False)
        self._chain_hash = start.header.chain_hash
        self._outer_hash = self._share.state_hash()
        if self._outer_hash != start.header.outer_hash:
            raise ReplayError("the run's start: its outer state does not have the hash that it states")
        self._views = self._read_views()
        self._view: View | None = None
        self._contributions = self._payload_bytes = self._without = 0
        self._dropped: list[str] = []
        self._hashes: dict[int, str] = {}
        self._applied = {site_id: _refused_at(0, site.applied) for site_id, site in self._sites.items()}

    def to_the_end(self) -> Replayed:
        main = self._fullest()
        numbers = main.rounds()
        first = self._share.round_number + 1
        if not numbers:
            raise ReplayError(
                "the record holds no sealed round; the run ended before its first, or its log was removed"
            )
        for number in range(first, numbers[-1] + 1):
            self._round(number, main)
        self._check_end()
        run = self._run
        return Replayed(
            job=run.job,
            strategy=run.plan.strategy,
            rounds=self._share.round_number - first + 1,
            contributions=self._contributions,
            payload_bytes=self._payload_bytes,
            views=len(self._views),
            rounds_without_a_member=self._without,
            dropped=tuple(self._dropped),
            faults=tuple(
                f"{each.site_id} killed after round {each.after_round}, view {each.view_number} without it"
                for each in run.faults
            ),
            samples_done=sum(each.stop - each.start for each in self._share.done),
            outer_hash=self._outer_hash,
            chain_hash=self._chain_hash,
            reproduced=REPRODUCED.get(run.plan.strategy, _REPRODUCED_ELSE),
            has_end=bool(run.ends),
        )

    def _fullest(self) -> SiteRecord:
        """Return the site whose chain reaches furthest, of those that have it from the start; the first of equals."""
        first = self._share.round_number + 1
        rounds = {site_id: site.rounds() for site_id, site in self._sites.items()}
        whole = {site_id: numbers[-1] for site_id, numbers in rounds.items() if numbers and numbers[0] <= first}
        if not whole:
            reach = min((numbers[0] for numbers in rounds.values() if numbers), default=0)
            message = f"round {first}: its seal is not in the record" + (
                f", which starts with round {reach}; copy it whole" if reach else "; the run sealed none"
            )
            raise ReplayError(message)
        # A site that was cut off may have sealed a round that a later view dropped: the last view's members know better.
        last = self._views[max(self._views)]
        members = [each for each in whole if last.member(each) is not None] or list(whole)
        return self._sites[max(members, key=lambda site_id: whole[site_id])]

    def _read_views(self) -> dict[int, View]:
        views: dict[int, View] = {}
        for site in self._sites.values():
            for document in _refused_at(0, lambda site=site: list(site.view_documents())):  # type: ignore[misc]
                try:
                    view = open_view(document, self._run.authority_key)
                except (SignatureError, ValueError) as error:
                    raise ReplayError(f"a view in {site.site_id}'s record: {error}") from error
                if views.setdefault(view.number, view) != view:
                    raise ReplayError(f"view {view.number} stands in the record with two contents")
        if not views:
            raise ReplayError("the record holds no view, so nobody vouches for its seals; copy it whole")
        return views

    def _round(self, number: int, main: SiteRecord) -> None:
        sealed = self._seal(number, main)
        share = self._share
        entries = tuple(each.header.entry() for each in sealed.contributions)
        payloads: dict[tuple[str, int], bytes] = {}
        for contribution in sealed.contributions:
            payloads |= self._payloads(number, contribution)
            self._contributions += 1
        counted = share.verdict(entries, payloads, number)
        share.apply(number, counted, payloads, own_counts=True, scatter=False)
        self._chain_hash = sealed.manifest_hash
        self._outer_hash = self._hashes[number] = share.state_hash()
        self._check_reports(number, sealed)

    def _seal(self, number: int, main: SiteRecord) -> SealedManifest:
        """Return a round's seal, verified against its view, the chain and the outer state before it."""
        document = _refused_at(number, lambda: main.manifest_document(number))
        view = self._view_of(number, _refused_at(number, lambda: read_manifest(document)).manifest.view_number)
        sealed = _refused_at(number, lambda: open_manifest(document, view, bytes_max=self._run.contribution_bytes_max))
        if sealed.round_number != number:
            raise ReplayError(f"round {number}: the file holds the seal of round {sealed.round_number}")
        if sealed.manifest.previous_hash != self._chain_hash:
            raise _differs(number, "the seal continues another chain", sealed.manifest.previous_hash, self._chain_hash)
        for contribution in sealed.contributions:
            header = contribution.header
            if header.previous_hash != self._chain_hash:
                what = f"the contribution of {header.site_id} names another chain"
                raise _differs(number, what, header.previous_hash, self._chain_hash)
            if header.outer_hash != self._outer_hash:
                what = f"the contribution of {header.site_id} started from another outer state"
                raise _differs(number, what, header.outer_hash, self._outer_hash)
        present = {each.header.site_id for each in sealed.contributions}
        self._without += any(member.site_id not in present for member in view.members)
        return sealed

    def _view_of(self, number: int, view_number: int) -> View:
        view = self._views.get(view_number)
        if view is None:
            raise ReplayError(f"round {number}: it was sealed in view {view_number}, which is not in the record")
        if self._view is not None and view.number < self._view.number:
            raise ReplayError(f"round {number}: it was sealed in view {view_number}, after view {self._view.number}")
        if self._view is None or view.number > self._view.number:
            # The authority signed where a view starts; the chain reaches that place here or nowhere.
            if view.base_round != number - 1:
                message = (
                    f"round {number}: view {view_number} goes on after round {view.base_round}, not after {number - 1}"
                )
                raise ReplayError(message)
            if view.base_hash != self._chain_hash:
                raise _differs(number, f"view {view_number} has another base", view.base_hash, self._chain_hash)
            self._view = view
        return view

    def _payloads(self, number: int, contribution: Contribution) -> dict[tuple[str, int], bytes]:
        """Return a contribution's fragments by place, each verified against the digest that its site signed."""
        header = contribution.header
        path = next(iter(self._sites.values())).contributions / header.digest
        try:
            with path.open("rb") as file:
                blob = file.read(header.size_bytes + 1)
        except FileNotFoundError:
            raise ReplayError(f"round {number}: {self._why_absent(number, header.site_id)}") from None
        found = hashlib.sha256(blob).hexdigest()
        if found != header.digest:
            what = f"the contribution of {header.site_id} was altered or cut, {len(blob):,} of {header.size_bytes:,} bytes:"
            raise _differs(number, what + " its digest", found, header.digest)
        self._payload_bytes += len(blob)
        payloads = {}
        for place, part in enumerate(header.fragments):
            start, stop = header.fragment_span(place)
            payloads[header.site_id, place] = blob[start:stop]
            if hashlib.sha256(blob[start:stop]).hexdigest() != part.digest:
                raise ReplayError(f"round {number}: fragment {place} of {header.site_id} is not what its header says")
        return payloads

    def _why_absent(self, number: int, site_id: str) -> str:
        for site in self._sites.values():
            until = site.kept_until()
            if until is not None and number >= until.round_number:
                return (
                    f"its contributions are not in the record, whose limit of {until.bytes_max:,} bytes was reached in round "
                    f"{until.round_number}; all rounds before it replay to their hashes. Run again with a larger --record-gb"
                )
        return f"the contribution of {site_id} is not in the record; copy it whole"

    def _check_reports(self, number: int, sealed: SealedManifest) -> None:
        """Hold the state after a round against what each site's ranks reported."""
        for site_id, applied in self._applied.items():
            told = applied.get(number)
            if told is None or told == self._outer_hash:
                continue
            if self._sealed_elsewhere(number, site_id, sealed):
                self._dropped.append(f"round {number} of {site_id}")
                continue
            raise _differs(number, f"{site_id} reported another outer state", told, self._outer_hash)

    def _sealed_elsewhere(self, number: int, site_id: str, sealed: SealedManifest) -> bool:
        """Say whether a site holds a round that was sealed anew without it: then its report is of that one."""
        view = self._views[sealed.manifest.view_number]
        site = self._sites[site_id]
        if view.member(site_id) is not None or number not in site.rounds():
            return False
        own = _refused_at(number, lambda: read_manifest(site.manifest_document(number)))
        return own.manifest_hash != sealed.manifest_hash

    def _check_end(self) -> None:
        """Hold the last round against what the run's document says of its end."""
        number = self._share.round_number
        for site_id, end in sorted(self._run.ends.items()):
            if end.round_number > number:
                message = (
                    f"round {number + 1}: its seal is not in the record, but {site_id} ended after round "
                    f"{end.round_number}; the log was cut, copy it whole"
                )
                raise ReplayError(message)
            found = self._hashes.get(end.round_number, end.outer_hash)
            if found != end.outer_hash:
                raise _differs(end.round_number, f"{site_id} ended with another outer state", end.outer_hash, found)


def _differs(number: int, what: str, found: str, expected: str) -> ReplayError:
    return ReplayError(f"round {number}: {what} ({found[:_HASH_SHOWN]}…, not {expected[:_HASH_SHOWN]}…)")


def _refused_at(number: int, read: Callable[[], Read]) -> Read:
    """Return what `read` returns. Raises ReplayError with the round where the record refuses it."""
    try:
        return read()
    except (Refusal, OSError) as error:
        raise ReplayError(f"round {number}: {error}" if number else f"the record: {error}") from error


def main(arguments: list[str]) -> int:
    """Replay the run in the folder that is named, and print what came out as one line of JSON."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m training.lab.replay RUN\n")
        return 2
    try:
        found = replay(Path(arguments[0]))
    except LabError as error:
        sys.stdout.write(json.dumps({"code": error.code, "message": str(error)}) + "\n")
        return 1
    sys.stdout.write(found.model_dump_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
