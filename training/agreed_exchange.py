"""The round log as all ranks of a site see it: rank 0 asks or commits, and every rank acts on the same answer.

Every rank moves the bytes of its own fragments; whatever decides (position, seal, refusal) is asked by rank 0 alone and
told to the others, so that ranks cannot part. All public methods but `fetch` are collectives. `training.synchronizer`
decides what to ask and when; `training.exchange` is what one rank sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import TypeAdapter

from training.dealing import Ranges
from training.errors import ExchangeError
from training.exchange import Entry, Exchange, Position, SealedRound
from training.ranks import Json, Ranks
from training.roundlog.errors import ExchangeRefusedError, Reason

_POSITION: Final = TypeAdapter(Position)
_SEALED: Final = TypeAdapter(SealedRound)
# After these the round goes on without this site, and its work waits in its carry.
_PASSING: Final = frozenset(
    {
        Reason.ROUND_SEALED,
        Reason.NOT_MEMBER,
        Reason.SAMPLES_OVERLAP,
        Reason.SNAPSHOT_NEEDED,
        Reason.CHAIN_BROKEN,
        Reason.VIEW_OLDER,
    }
)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a site says with a contribution, beside its payloads. `fragments` counts those of all its ranks."""

    number: int
    weight: int
    samples: Ranges
    fragments: int
    outer_hash: str


class AgreedExchange:
    """One exchange, asked by rank 0 on behalf of all ranks. If rank 0 meets an ExchangeError, every rank raises it."""

    def __init__(self, exchange: Exchange, ranks: Ranks) -> None:
        """Speak through `exchange`, which only rank 0 asks for decisions."""
        self._exchange = exchange
        self._ranks = ranks

    def position(self) -> Position:
        """Return where the log wants this site to start."""
        answer = self._on_rank_0(lambda: _POSITION.dump_python(self._exchange.position(), mode="json"))
        return _POSITION.validate_python(answer)

    def sealed(self, number: int) -> SealedRound | None:
        """Wait for the sealed round; None where this site must take a snapshot instead."""
        return self._asked(lambda: self._exchange.await_sealed(number))

    def sealed_already(self, number: int) -> SealedRound | None:
        """Return the round if it is sealed; None where it is not, or where a snapshot is needed instead."""
        return self._asked(lambda: self._exchange.sealed_already(number))

    def offer(self, offer: Offer, payloads: Mapping[int, bytes]) -> int:
        """Post this rank's payloads and commit; return the bytes posted by all ranks.

        A passing refusal is no error: the round goes on without us.
        """
        refused = False
        try:
            for place, payload in payloads.items():
                self._exchange.post_fragment(offer.number, place, payload)
        except ExchangeRefusedError as refusal:
            refused = _is_passing(refusal)
        # Also the barrier that rank 0 needs before it commits.
        told = np.array([refused, sum(map(len, payloads.values()))], dtype=np.int64)
        by_rank = self._ranks.gather(told)
        if not any(bool(each[0]) for each in by_rank):
            self._on_rank_0(lambda: self._commit(offer))
        return sum(int(each[1]) for each in by_rank)

    def fetch(self, number: int, site_id: str, place: int) -> bytes:
        """Return one fragment of a sealed contribution, for this rank alone."""
        return self._exchange.fetch_fragment(number, site_id, place)

    def fetched_bytes(
        self, entries: Iterable[Entry], payloads: Mapping[tuple[str, int], bytes], *, except_site: str
    ) -> dict[str, int]:
        """Return the bytes that the site's ranks together fetched of each other site."""
        others = [entry.site_id for entry in entries if entry.site_id != except_site]
        own = np.array(
            [sum(len(each) for (site, _), each in payloads.items() if site == other) for other in others],
            dtype=np.int64,
        )
        total = np.sum(self._ranks.gather(own), axis=0) if others else own
        return {other: int(size) for other, size in zip(others, total, strict=True)}

    def report_applied(self, number: int, outer_hash: str) -> None:
        """Tell the log the state that this site has after a round."""

        def report() -> Json:
            self._exchange.applied(number, outer_hash)
            return {}

        self._on_rank_0(report)

    def fetch_snapshot(self, path: Path) -> None:
        """Write a peer's snapshot to `path`."""
        self._on_rank_0(lambda: {"round": self._exchange.fetch_snapshot(str(path))})

    def _commit(self, offer: Offer) -> Json:
        try:
            self._exchange.commit(
                offer.number,
                weight=offer.weight,
                samples=offer.samples,
                fragments=offer.fragments,
                outer_hash=offer.outer_hash,
            )
        except ExchangeRefusedError as refusal:
            return {"refused": _is_passing(refusal)}
        return {"refused": False}

    def _asked(self, question: Callable[[], SealedRound | None]) -> SealedRound | None:
        def ask() -> Json:
            try:
                sealed = question()
            except ExchangeRefusedError as refusal:
                if refusal.reason != Reason.SNAPSHOT_NEEDED:
                    raise
                sealed = None
            return {"sealed": None if sealed is None else _SEALED.dump_python(sealed, mode="json")}

        answer = self._on_rank_0(ask)["sealed"]
        return None if answer is None else _SEALED.validate_python(answer)

    def _on_rank_0(self, ask: Callable[[], Json]) -> Json:
        """Return rank 0's answer on every rank. If rank 0 meets an ExchangeError, every rank raises it."""
        answer: Json | None = None
        failure: ExchangeError | None = None
        if self._ranks.rank == 0:
            try:
                answer = {"answer": ask()}
            except ExchangeError as error:
                answer, failure = {"error": str(error)}, error
        answer = self._ranks.broadcast_json(answer)
        if failure is not None:
            raise failure
        if "error" in answer:
            raise ExchangeError(answer["error"])
        result: Json = answer["answer"]
        return result


def _is_passing(refusal: ExchangeRefusedError) -> bool:
    """Return True for a refusal after which the site's work waits in its carry; raise any other."""
    if refusal.reason not in _PASSING:
        raise refusal
    return True
