"""What sites can do for a job beyond running it, and which of them a job can therefore use.

A site says it in its heartbeats; one that says nothing can nothing. Nothing here is a matter of price: a site that lacks
what a job needs is no place for it, and the job's own reason says so while it waits. What bringing data costs where it can
be brought is `broker.staging`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.abilities import SiteAbilities
from broker.database.tables import Site
from broker.refusals import NOWHERE, Refused
from broker.transitions import SiteState, note_change
from sites.data_source import source_allowed
from sites.protocol import Heartbeat, Offer, SiteData, Skill
from training.spec import DataReference, JobSpec

_BYTES_PER_GB: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Ability:
    """What one site can do; `data` is None where it takes no part in datasets."""

    skills: frozenset[str] = frozenset()
    data: SiteData | None = None
    offer: Offer = field(default_factory=lambda: Offer(pools=()))

    def holds(self, reference: DataReference) -> bool:
        """Return whether the site has a dataset."""
        return self.data is not None and reference.sha256 in self.data.held


def take_abilities(session: Session, site: Site, heartbeat: Heartbeat) -> None:
    """Keep what a heartbeat says that its site can do; where that is news, a round is due."""
    skills = " ".join(sorted(set(heartbeat.skills) & {str(skill) for skill in Skill}))
    data = "" if heartbeat.data is None else heartbeat.data.model_dump_json()
    row = session.get(SiteAbilities, site.site_id)
    if row is None:
        row = SiteAbilities(site_id=site.site_id, skills="", data="")
        session.add(row)
    if (row.skills, row.data) != (skills, data):
        row.skills, row.data = skills, data
        site.version += 1
        note_change(session)


def read_abilities(session: Session) -> dict[str, Ability]:
    """Return what each site of the market can do."""
    rows = session.execute(
        select(Site, SiteAbilities)
        .outerjoin(SiteAbilities, SiteAbilities.site_id == Site.site_id)
        .where(Site.state != SiteState.REMOVED)
        .order_by(Site.site_id)
    )
    return {
        site.site_id: Ability(
            skills=frozenset() if row is None else frozenset(row.skills.split()),
            data=SiteData.model_validate_json(row.data) if row is not None and row.data else None,
            offer=Offer.model_validate_json(site.offer),
        )
        for site, row in rows
    }


def needs_abilities(spec_json: str) -> bool:
    """Return whether a stored specification names secrets or data; cheaper than reading it, for rounds of many jobs."""
    return '"secrets":[' in spec_json or '"data":[' in spec_json


def lacking(spec: JobSpec, abilities: Mapping[str, Ability], but: Collection[str] = ()) -> Refused:
    """Return the sites that lack what the job needs, as if they had refused it; `but` are those where it runs."""
    if not spec.secrets and not spec.data:
        return NOWHERE
    lacks: dict[str, list[str]] = {}
    for site_id in sorted(set(abilities) - set(but)):
        reason = _lack(spec, site_id, abilities[site_id])
        if reason is not None:
            lacks.setdefault(reason, []).append(site_id)
    reasons = tuple(f"{reason} at {', '.join(sites)}" for reason, sites in sorted(lacks.items()))
    return Refused(frozenset(site for sites in lacks.values() for site in sites), gangs=False, reasons=reasons)


def _lack(spec: JobSpec, site_id: str, ability: Ability) -> str | None:
    if spec.secrets and Skill.SECRETS not in ability.skills:
        return "no private place for its secrets"
    for reference in spec.data or ():
        reason = _data_lack(reference, site_id, ability)
        if reason is not None:
            return reason
    return None


def _data_lack(reference: DataReference, site_id: str, ability: Ability) -> str | None:
    """Return why a dataset cannot be had at a site, None where it is there or can be brought."""
    name, here = reference.name, ability.data
    if here is None or Skill.DATA not in ability.skills:
        return "no place for datasets"
    if reference.sites is not None and site_id not in reference.sites:
        return f"the dataset {name} may not be"
    if ability.holds(reference):
        return None
    source = reference.source
    hindrances = (
        (not reference.egress_ok, f"the dataset {name}, which may not leave where it lies, is not"),
        (source is None, f"the dataset {name}, for which the job names no source, is not"),
        (
            source is not None and not source_allowed(source, here.sources),
            f"the owner's policy does not cover the source of the dataset {name}",
        ),
        (reference.size_gb * _BYTES_PER_GB > here.cache_bytes, f"not enough is kept for the dataset {name}"),
    )
    return next((sentence for stands, sentence in hindrances if stands), None)
