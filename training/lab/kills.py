"""Sites that are killed in the middle of a laboratory run, as a person asks for them: site-2@3 dies once round 3 is applied."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

from training.lab.errors import LabError
from training.lab.federation import Federation
from training.roundlog.control import GatewayControlError

_KILL: Final = re.compile(r"(site-[1-9][0-9]?)@([0-9]{1,7})")
_ASK_S: Final = 0.02
_TOLD_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Kill:
    """All processes of a site end at once when another site has applied `after_round`."""

    site_id: str
    after_round: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `site-2@3`. Raises LabError for anything else."""
        found = _KILL.fullmatch(text)
        if found is None:
            raise LabError(f"{text[:40]!r} says no kill; write site-2@3 for: site-2 dies once round 3 is applied")
        return cls(found[1], int(found[2]))


def check(kills: Sequence[Kill], site_ids: Sequence[str]) -> None:
    """Raise LabError where a kill names no site of the run, one twice, or the kills leave none."""
    named = [kill.site_id for kill in kills]
    unknown = sorted(set(named) - set(site_ids))
    if unknown:
        raise LabError(f"{', '.join(unknown)} is no site of this run, which has {', '.join(site_ids)}")
    if len(set(named)) < len(named) or len(named) >= len(site_ids):
        raise LabError("a site can be killed once, and one has to be left; name fewer kills or more sites")


def progress_of(federation: Federation, kills: Sequence[Kill] = ()) -> Iterator[int]:
    """Yield the samples done until all living ranks have ended, killing sites on the way.

    Raises LabError where a rank fails, or where the run ends before a kill's round.
    """
    pending = sorted(kills, key=lambda kill: kill.after_round)
    waited_s = 0.0
    while federation.running():
        if pending and _applied(federation, pending[0]) >= pending[0].after_round:
            kill = pending.pop(0)
            federation.kill(kill.site_id, after_round=kill.after_round)
        pause_s = _ASK_S if pending else _TOLD_S
        if waited_s >= _TOLD_S or not pending:
            yield federation.samples_done()
            waited_s = 0.0
        federation.wait(pause_s)
        waited_s += pause_s
    if pending:
        kill = pending[0]
        raise LabError(
            f"the run ended before round {kill.after_round}, when {kill.site_id} was to die; name an earlier round"
        )
    yield federation.samples_done()


def _applied(federation: Federation, kill: Kill) -> int:
    """Return the last round that the first of those applied who will survive."""
    witness = next(site for site in federation.living if site.site_id != kill.site_id)
    try:
        return witness.control.status().applied_round
    except GatewayControlError:
        return 0  # it ended with its ranks, which `running` looks at
