"""What it takes to bring a job's datasets to a site: seconds before it can start, bytes, and what their egress costs.

A job waits for a site that has its data at most as long as bringing it elsewhere would take: a site is offered once the
job has waited for what it needs longer than the quickest one. So a job is at its start never later than twice
what the best choice in hindsight would have taken, whatever the others do meanwhile (the argument of ski rental).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.abilities import Ability, lacking, read_abilities
from broker.allocation.snapshot import DataState
from broker.database.tables import Job, Round
from broker.errors import RefusedError
from broker.refusals import NOWHERE, Refused
from broker.transitions import JobState, note_change
from pricing.money import divide_up
from training.spec import DataReference, JobSpec

BYTES_PER_GB: Final = 1_000_000_000
# What a snapshot takes for one sample (`broker.allocation.snapshot`).
_BYTES_PER_SAMPLE_MAX: Final = 1e12


class UnknownDataSiteError(RefusedError):
    """A dataset that may be at a site which this market does not have."""

    code: ClassVar[str] = "data.unknown_site"


@dataclass(frozen=True, slots=True)
class Staging:
    """What must be brought to a site before the job can start there."""

    seconds: float = 0.0
    size_bytes: int = 0
    egress_micros: int = 0

    def __add__(self, other: Staging) -> Staging:
        """Return both, one after the other."""
        size_bytes = self.size_bytes + other.size_bytes
        return Staging(self.seconds + other.seconds, size_bytes, self.egress_micros + other.egress_micros)


def require_known_sites(spec: JobSpec, abilities: Mapping[str, Ability]) -> None:
    """Check that every site named with a dataset is one of the market. Raises UnknownDataSiteError."""
    for reference in spec.data or ():
        unknown = sorted(set(reference.sites or ()) - set(abilities))
        if unknown:
            known = ", ".join(sorted(abilities)[:20]) or "none yet"
            raise UnknownDataSiteError(
                f"the dataset {reference.name} names {', '.join(unknown[:5])}, no site of this market; the sites are: {known}"
            )


def staging_at(spec: JobSpec, site_id: str, abilities: Mapping[str, Ability]) -> Staging:
    """Return what must be brought to a site that can have the job's data; nothing where it has them."""
    total, here = Staging(), abilities[site_id]
    for reference in spec.data or ():
        if here.holds(reference) or here.data is None:
            continue
        size_bytes = round(reference.size_gb * BYTES_PER_GB)
        price = _egress_micros_per_gb(reference, here, abilities)
        seconds = size_bytes * 8 / here.data.fetch_bits_per_s
        total += Staging(seconds, size_bytes, divide_up(size_bytes * price, BYTES_PER_GB))
    return total


def too_early(spec: JobSpec, abilities: Mapping[str, Ability], *, waited_s: float, left_s: float | None) -> Refused:
    """Return the sites at which the job should not start yet, since one that has its data may come free sooner.

    Also those where its data would come too late for its deadline, in `left_s`.
    """
    if not spec.data:
        return NOWHERE
    needed_s = _needed_s(spec, abilities)
    least_s = min(needed_s.values(), default=0.0)
    early = {site for site, seconds in needed_s.items() if seconds - least_s > waited_s}
    late = {site for site, seconds in needed_s.items() if left_s is not None and seconds > left_s}
    reasons = []
    if early:
        longest_s = max(needed_s[site] - least_s for site in early)
        reasons.append(
            f"its data would have to be brought to {_named(early)} first, so it waits up to {longest_s:.0f} s"
        )
    if late:
        reasons.append(f"its data would reach {_named(late)} too late for its deadline")
    return Refused(frozenset(early | late), gangs=False, reasons=tuple(reasons))


def least_elsewhere_s(spec: JobSpec, abilities: Mapping[str, Ability], standing: set[str]) -> float:
    """Return how long a job that runs would at least wait for its data at any other site."""
    if not spec.data:
        return 0.0
    elsewhere = [seconds for site, seconds in _needed_s(spec, abilities).items() if site not in standing]
    return min(elsewhere, default=0.0)


def read_from(spec: JobSpec, abilities: Mapping[str, Ability]) -> DataState | None:
    """Return a job's data as read from the one site that holds them all, so that its egress weighs in a round.

    What is brought once counts as read sample by sample: over the whole job that is the same. None where several
    sites hold them, or none: then nothing, or no site's egress, is to be paid for.
    """
    if not spec.data or spec.market.data is not None:
        return None
    holders = [site for site, ability in sorted(abilities.items()) if all(map(ability.holds, spec.data))]
    if len(holders) != 1:
        return None
    size_bytes = sum(reference.size_gb for reference in spec.data) * BYTES_PER_GB
    per_sample = min(size_bytes / spec.market.workload.samples, _BYTES_PER_SAMPLE_MAX)
    return DataState(home_site=holders[0], residency="world", bytes_per_sample=per_sample)


def note_waits_over(session: Session, now_ms: int) -> None:
    """Ask for a round where a job has waited long enough for a site to be offered that must bring its data first."""
    last_ms = session.scalar(select(Round.taken_ms).order_by(Round.round_number.desc()).limit(1))
    waiting = list(session.scalars(select(Job).where(Job.state == JobState.QUEUED, Job.spec.like('%"data":[{%'))))
    if last_ms is None or not waiting:
        return
    abilities = read_abilities(session)
    for job in waiting:
        needed_s = _needed_s(JobSpec.model_validate_json(job.spec), abilities)
        least_s = min(needed_s.values(), default=0.0)
        due_ms = (job.submitted_ms + (seconds - least_s) * 1000 for seconds in needed_s.values())
        if any(last_ms < due <= now_ms for due in due_ms):
            note_change(session)
            return


def _needed_s(spec: JobSpec, abilities: Mapping[str, Ability]) -> dict[str, float]:
    able = set(abilities) - lacking(spec, abilities).sites
    return {site: staging_at(spec, site, abilities).seconds for site in sorted(able)}


def _egress_micros_per_gb(reference: DataReference, here: Ability, abilities: Mapping[str, Ability]) -> int:
    """Return what the cheapest holder asks for a GB that leaves it for `here`; 0 where the source is no site's."""
    asked = []
    for ability in abilities.values():
        if not ability.holds(reference):
            continue
        home, there = ability.offer, here.offer
        if home.region is not None and home.region == there.region:
            asked.append(home.data_egress_to_region)
        elif home.continent is not None and home.continent == there.continent:
            asked.append(home.data_egress_to_continent)
        else:
            asked.append(home.data_egress_beyond)
    return min(asked, default=0)


def _named(sites: set[str]) -> str:
    return ", ".join(sorted(sites))
