"""Step 6, the decision: which sites a job's round log should consist of now, and who its hub is.

Pure. `broker.views` brings what is known of the sites and writes down what follows. The reasons, and
why a site may be left out before its lease has ended, are in training/roundlog/README.md, "When
the membership changes". Leases are not decided on here: a site that is left out keeps its lease and
its GPUs until its own clock ends them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Standing:
    """One leased site, by what the market and its peers last heard of it.

    `unheard_s` is how long the market has not heard it. `view_number` is the view that its gateway
    spoke of, None where it has no gateway that answers; `hub_lost_s` and `members_lost_s` are that
    gateway's complaints: for how long it has not reached the hub, or the hub not been reached.
    """

    site_id: str
    listens: bool
    unheard_s: float
    view_number: int | None = None
    hub_lost_s: float | None = None
    members_lost_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Membership:
    """The newest view: `issued`, or still being promised; `members` and `standby` are of the last issued one."""

    sites: tuple[str, ...]
    hub: str
    is_issued: bool
    issued_number: int
    issued_sites: tuple[str, ...]
    issued_hub: str
    standby: str | None


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long a site may be out of reach.

    `absent_s`: of its peers and of the market, before a view goes on without it. `hub_lost_s`: a hub
    of its peers only. `heartbeat_s` is the pace at which sites without trouble are heard.
    """

    absent_s: float
    hub_lost_s: float
    heartbeat_s: float


@dataclass(frozen=True, slots=True)
class Change:
    """The view that is needed: its sites in order, its hub, and a sentence why."""

    sites: tuple[str, ...]
    hub: str
    cause: str


def needed_change(now: Membership, gang: Sequence[Standing], patience: Patience) -> Change | None:
    """Return the view that `gang`, the sites with an active lease, needs instead of `now`; None where it stands well.

    At least one member of the last issued view must remain: only these know what was sealed.
    """
    by_site = {standing.site_id: standing for standing in gang}
    hub_is_lost = _hub_is_lost(now, by_site, patience)
    absent = _absent(now, by_site, patience)
    staying = [site_id for site_id in now.sites if site_id in by_site and site_id not in absent]
    if not set(staying) & set(now.issued_sites):
        return None
    # One change at a time: whoever comes back waits until the view that is being promised stands.
    back = [standing.site_id for standing in gang if now.is_issued and _is_back(standing, now, absent, patience)]
    sites = tuple(sorted({*staying, *back}))
    avoid = now.issued_hub if hub_is_lost and now.is_issued else None
    hub = _choose_hub(now, [by_site[site_id] for site_id in sites], avoid)
    if hub is None or (sites == tuple(now.sites) and hub == now.hub):
        return None
    return Change(sites, hub, _cause(now, sites, by_site, absent))


def _hub_is_lost(now: Membership, gang: Mapping[str, Standing], patience: Patience) -> bool:
    """Say whether most members have not reached a hub, which the market may still hear, for long."""
    return _complain(now, gang, patience, patience.hub_lost_s)


def _absent(now: Membership, gang: Mapping[str, Standing], patience: Patience) -> set[str]:
    """Return the sites that neither their peers nor the market reach."""
    hub = gang.get(now.issued_hub)
    if hub is None:
        return set()
    absent = set()
    hub_is_absent = hub.unheard_s >= patience.absent_s and _complain(now, gang, patience, patience.absent_s)
    if hub_is_absent:
        absent.add(hub.site_id)
    for site_id in now.issued_sites:
        if site_id == hub.site_id or site_id not in gang or not _is_silent(gang[site_id], patience):
            continue
        missed_s = hub.members_lost_s.get(site_id, 0.0) if hub.view_number == now.issued_number else 0.0
        # With the hub gone, nobody is left who could have reached a site that is silent too.
        if hub_is_absent or (not _is_silent(hub, patience) and missed_s >= patience.hub_lost_s):
            absent.add(site_id)
    return absent


def _complain(now: Membership, gang: Mapping[str, Standing], patience: Patience, lost_s: float) -> bool:
    """Say whether most of the other members that are heard have lost the hub for at least `lost_s`."""
    others = [gang[site_id] for site_id in now.issued_sites if site_id in gang and site_id != now.issued_hub]
    witnesses = [standing for standing in others if not _is_silent(standing, patience)]
    complaints = [
        standing
        for standing in witnesses
        if standing.view_number == now.issued_number
        and standing.hub_lost_s is not None
        and standing.hub_lost_s >= lost_s
    ]
    return len(complaints) * 2 > len(witnesses)


def _is_silent(standing: Standing, patience: Patience) -> bool:
    """Say whether a site has missed its heartbeat."""
    return standing.unheard_s >= patience.heartbeat_s + patience.absent_s


def _is_back(standing: Standing, now: Membership, absent: set[str], patience: Patience) -> bool:
    """Say whether a site that was left out is heard again, with a gateway that answers."""
    return (
        standing.site_id not in now.sites
        and standing.site_id not in absent
        and standing.view_number is not None
        and standing.unheard_s < patience.absent_s
    )


def _choose_hub(now: Membership, sites: Sequence[Standing], avoid: str | None) -> str | None:
    """Return the hub that is, else the standby, else the first that listens; None where nobody may be."""
    if len(sites) == 1:
        return sites[0].site_id
    fit = [standing.site_id for standing in sites if standing.listens and standing.site_id != avoid]
    for preferred in (now.hub, now.standby):
        if preferred in fit:
            return preferred
    # Whoever has just come back has the chain to fetch yet.
    return next((site_id for site_id in fit if site_id in now.sites), fit[0] if fit else None)


def _cause(now: Membership, sites: Sequence[str], gang: Mapping[str, Standing], absent: set[str]) -> str:
    lost = sorted(set(now.sites) - gang.keys())
    out = sorted(set(now.sites) & absent)
    back = sorted(set(sites) - set(now.sites))
    reasons = [
        f"lost {', '.join(lost)}" if lost else "",
        f"neither its peers nor the market reach {', '.join(out)}" if out else "",
        f"{', '.join(back)} is back" if back else "",
    ]
    return "; ".join(reason for reason in reasons if reason) or f"hub {now.issued_hub} cannot be reached"
