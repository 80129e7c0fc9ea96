"""A round log in memory for sites that run as threads: the same Protocol, no network, faults on demand."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from training.errors import ExchangeError
from training.exchange import Entry, Leaving, MemberSeat, Position, SampleRange, SealedRound
from training.roundlog.errors import ExchangeRefusedError, Reason
from training.roundlog.view import GENESIS_HASH

WAIT_S = 30.0


def _nobody(number: int, site: str) -> bool:
    return False


def _staying(number: int, site: str) -> Leaving | None:
    return None


def _unheld(number: int) -> bool:
    return False


def _untouched(number: int, site: str, fragment: int, payload: bytes) -> bytes:
    return payload


def _at_once(number: int) -> None:
    return None


@dataclass
class _Contribution:
    weight: int
    samples: tuple[SampleRange, ...]
    fragments: dict[int, bytes]
    outer_hash: str


@dataclass
class MemoryLog:
    """The hub. With a `quorum`, that many contributions seal a round, unless `hold(round)` still waits for more.

    `excluded(round, site)` decides who is left out; `leaving(round, site)` who says that it stops; `tamper(round, site, n, bytes)` damages blobs."""

    members: list[MemberSeat]
    base_round: int = 0
    base_hash: str = GENESIS_HASH
    done: tuple[SampleRange, ...] = ()
    excluded: Callable[[int, str], bool] = _nobody
    tamper: Callable[[int, str, int, bytes], bytes] = _untouched
    waiting: dict[tuple[int, str], dict[int, bytes]] = field(default_factory=dict)
    contributions: dict[int, dict[str, _Contribution]] = field(default_factory=dict)
    sealed: dict[int, SealedRound] = field(default_factory=dict)
    applied: dict[int, dict[str, str]] = field(default_factory=dict)
    reports: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    snapshot: tuple[int, bytes] | None = None
    quorum: int | None = None
    hold: Callable[[int], bool] = _unheld
    leaving: Callable[[int, str], Leaving | None] = _staying
    joiners: set[str] = field(default_factory=set)
    condition: threading.Condition = field(default_factory=threading.Condition)

    def exchange(self, site_id: str) -> MemoryExchange:
        return MemoryExchange(self, site_id)

    def remove(self, site_id: str) -> None:
        """A new view without the site: what it had not sealed never counts."""
        with self.condition:
            self.members = [seat for seat in self.members if seat.site_id != site_id]
            for number, posted in self.contributions.items():
                if number not in self.sealed:
                    posted.pop(site_id, None)
            self._seal_complete()

    def add(self, seat: MemberSeat) -> None:
        """A new view with one more site, which starts by snapshot."""
        with self.condition:
            self.members = [*self.members, seat]
            self.joiners.add(seat.site_id)
            self.condition.notify_all()

    def wait_for(self, ready: Callable[[], bool]) -> None:
        with self.condition:
            assert self.condition.wait_for(ready, WAIT_S), "the condition never came true"

    def newest(self) -> int:
        return max(self.sealed, default=self.base_round)

    def _seal_complete(self) -> None:
        number = self.newest() + 1
        posted = self.contributions.get(number, {})
        needed = len(self.members) if self.quorum is None else min(self.quorum, len(self.members))
        if self.members and len(posted.keys() & {seat.site_id for seat in self.members}) >= needed:
            if self.hold(number):
                return
            self._seal(number, posted)
        self.condition.notify_all()

    def _seal(self, number: int, posted: dict[str, _Contribution]) -> None:
        entries = tuple(
            Entry(site, each.weight, each.samples, tuple(sorted(each.fragments)), self.leaving(number, site))
            for site, each in sorted(posted.items())
            if not self.excluded(number, site)
        )
        manifest = hashlib.sha256(f"{number} {entries}".encode()).hexdigest()
        self.sealed[number] = SealedRound(number, 1, manifest, entries, tuple(self.members))

    def hashes_agree(self) -> bool:
        return all(len(set(by_site.values())) == 1 for by_site in self.applied.values())


@dataclass
class MemoryExchange:
    """One rank's access to the hub."""

    log: MemoryLog
    site_id: str
    before_commit: Callable[[int], None] = _at_once

    def position(self) -> Position:
        with self.log.condition:
            number = self.log.newest()
            joins = self.site_id in self.log.joiners
            base = number if joins else self.log.base_round
            sealed = self.log.sealed.get(base)
            base_hash = sealed.manifest_hash if sealed else self.log.base_hash
            return Position(base, base_hash, tuple(self.log.members), self.log.done, needs_snapshot=joins)

    def post_fragment(self, round_number: int, fragment: int, payload: bytes) -> None:
        with self.log.condition:
            waiting = self.log.waiting.setdefault((round_number, self.site_id), {})
            waiting[fragment] = self.log.tamper(round_number, self.site_id, fragment, payload)

    def commit(
        self, round_number: int, *, weight: int, samples: Collection[SampleRange], fragments: int, outer_hash: str
    ) -> None:
        self.before_commit(round_number)
        with self.log.condition:
            if round_number in self.log.sealed:
                raise ExchangeRefusedError(Reason.ROUND_SEALED, "too late")
            waiting = self.log.waiting.pop((round_number, self.site_id))
            assert sorted(waiting) == list(range(fragments)), "a fragment was not posted"
            posted = self.log.contributions.setdefault(round_number, {})
            posted[self.site_id] = _Contribution(weight, tuple(samples), waiting, outer_hash)
            self.log._seal_complete()

    def await_sealed(self, round_number: int) -> SealedRound:
        with self.log.condition:
            if not self.log.condition.wait_for(lambda: round_number in self.log.sealed, WAIT_S):
                raise ExchangeError(f"round {round_number} was never sealed")
            return self.log.sealed[round_number]

    def sealed_already(self, round_number: int) -> SealedRound | None:
        with self.log.condition:
            return self.log.sealed.get(round_number)

    def fetch_fragment(self, round_number: int, site_id: str, fragment: int) -> bytes:
        with self.log.condition:
            return self.log.contributions[round_number][site_id].fragments[fragment]

    def applied(self, round_number: int, outer_hash: str) -> None:
        with self.log.condition:
            self.log.applied.setdefault(round_number, {})[self.site_id] = outer_hash
            self.log.condition.notify_all()

    def offer_snapshot(self, round_number: int, path: str) -> None:
        with self.log.condition:
            if self.log.snapshot is None or self.log.snapshot[0] <= round_number:
                self.log.snapshot = (round_number, Path(path).read_bytes())
            self.log.condition.notify_all()

    def fetch_snapshot(self, path: str) -> int:
        with self.log.condition:
            found = self.log.condition.wait_for(
                lambda: self.log.snapshot is not None and self.log.snapshot[0] >= self.log.newest(), WAIT_S
            )
            if not found or self.log.snapshot is None:
                raise ExchangeError("no snapshot")
            number, content = self.log.snapshot
        Path(path).write_bytes(content)
        return number

    def report(self, measurements: dict[str, float]) -> None:
        with self.log.condition:
            self.log.reports.append((self.site_id, measurements))
