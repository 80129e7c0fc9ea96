"""What sites can do for a job beyond running it, and which of them a job can therefore use.

A site says it in its heartbeats; one that says nothing can nothing. Nothing here is a matter of price: a site that lacks
what a job needs is no place for it, and the job's own reason says so while it waits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.abilities import SiteAbilities
from broker.database.tables import Site
from broker.refusals import NOWHERE, Refused
from broker.transitions import SiteState, note_change
from sites.protocol import Heartbeat, Skill
from training.spec import JobSpec


@dataclass(frozen=True, slots=True)
class Ability:
    """What one site can do."""

    skills: frozenset[str] = frozenset()


NO_ABILITY = Ability()


def take_abilities(session: Session, site: Site, heartbeat: Heartbeat) -> None:
    """Keep what a heartbeat says that its site can do; where that is news, a round is due."""
    skills = " ".join(sorted(set(heartbeat.skills) & {str(skill) for skill in Skill}))
    row = session.get(SiteAbilities, site.site_id)
    if row is None:
        row = SiteAbilities(site_id=site.site_id, skills="")
        session.add(row)
    if row.skills != skills:
        row.skills = skills
        site.version += 1
        note_change(session)


def read_abilities(session: Session) -> dict[str, Ability]:
    """Return what each site of the market can do."""
    rows = session.execute(
        select(Site.site_id, SiteAbilities)
        .outerjoin(SiteAbilities, SiteAbilities.site_id == Site.site_id)
        .where(Site.state != SiteState.REMOVED)
    )
    return {
        site_id: NO_ABILITY if row is None else Ability(skills=frozenset(row.skills.split())) for site_id, row in rows
    }


def lacking(spec: JobSpec, abilities: Mapping[str, Ability], but: Collection[str] = ()) -> Refused:
    """Return the sites that lack what the job needs, as if they had refused it; `but` are those where it runs."""
    if not spec.secrets:
        return NOWHERE
    lacks = frozenset(site for site, ability in abilities.items() if Skill.SECRETS not in ability.skills)
    sites = lacks - set(but)
    reasons = (f"no private place for its secrets at {', '.join(sorted(sites))}",) if sites else ()
    return Refused(sites, gangs=False, reasons=reasons)
