"""When a round is sealed and who is in it: the hub's two decisions, as pure functions of what came.

A round is sealed at once when every member's contribution is complete, or when a quorum is and
the view's grace has passed since the quorum was met. Synchronous training is a quorum of all.
A site that joins and still lacks the outer state is not waited for; the others seal on, see it in
the view, and offer the snapshot that it needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from training.roundlog.contribution import Contribution
from training.roundlog.control import Equivocation
from training.roundlog.errors import Reason
from training.roundlog.ranges import RangeSet
from training.roundlog.view import View


@dataclass(frozen=True, slots=True)
class Choice:
    """Which contributions a round seals, and which it leaves out for what reason."""

    sealed: tuple[Contribution, ...]
    refused: tuple[tuple[str, Reason], ...]
    equivocations: tuple[Equivocation, ...]


def seal_wait_s(
    view: View, arrivals_s: Mapping[str, float], now_s: float, *, stateless: Collection[str] = ()
) -> float | None:
    """Return how long the hub still waits before it seals: 0 for now, None for more contributions.

    `arrivals_s` maps each site to the monotonic second at which its contribution was complete.
    Sites in `stateless` have no outer state yet and cannot contribute: nobody waits for them.
    """
    expected = {member.site_id for member in view.members if member.site_id not in stateless}
    quorum = min(view.quorum, len(expected))
    if quorum == 0 or len(arrivals_s) < quorum:
        return None
    if expected <= arrivals_s.keys():
        return 0.0
    quorum_met_s = sorted(arrivals_s.values())[quorum - 1]
    return max(0.0, quorum_met_s + view.grace_s - now_s)


def choose_entries(view: View, contributions: Mapping[str, Contribution], done: RangeSet) -> Choice:
    """Choose what a round seals: one outer state, and no sample twice.

    Where outer hashes differ, most sites are believed, on a tie the hub's side, then the first in
    site order; the others are reported. Of two overlapping sample ranges the earlier site's stays.
    """
    believed = _believed_outer_hash(view, contributions)
    taken = done
    sealed: list[Contribution] = []
    refused: list[tuple[str, Reason]] = []
    equivocations: list[Equivocation] = []
    for site_id in sorted(contributions):
        entry = contributions[site_id]
        header = entry.header
        if header.outer_hash != believed:
            refused.append((site_id, Reason.EQUIVOCATION))
            equivocations.append(
                Equivocation(
                    round_number=header.round_number,
                    site_id=site_id,
                    about="outer",
                    expected=believed,
                    named=header.outer_hash,
                )
            )
        elif taken.overlaps(header.samples) is not None:
            refused.append((site_id, Reason.SAMPLES_OVERLAP))
        else:
            sealed.append(entry)
            taken = taken.union(header.samples)
    return Choice(tuple(sealed), tuple(refused), tuple(equivocations))


def _believed_outer_hash(view: View, contributions: Mapping[str, Contribution]) -> str:
    votes = Counter(entry.header.outer_hash for entry in contributions.values())
    hub = contributions.get(view.hub)
    hub_hash = hub.header.outer_hash if hub else None
    ordered = [contributions[site_id].header.outer_hash for site_id in sorted(contributions)]
    return max(votes, key=lambda named: (votes[named], named == hub_hash, -ordered.index(named)))
