"""The sites as their admin sees them: the list, one site, inviting a new one, removing one."""

from __future__ import annotations

import json
from http import HTTPStatus

from flask import redirect, request, url_for
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from broker.api.context import the_market
from broker.enrol import remove_site
from broker.errors import BrokerError
from broker.identity.join import LIFE_S, invite_site
from broker.portal.blueprint import Access, page, show, the_actor
from broker.queries.market import last_round
from broker.queries.sites import SITES_PER_PAGE, SiteView, list_sites, read_site


@page("/admin/sites", Access.ADMIN)
def sites() -> Response:
    """List the sites."""
    return show("sites.html", **_listed())


@page("/admin/sites/invite", Access.ADMIN, method="POST")
def invite() -> Response:
    """Invite a site and show its join string, this once."""
    site_id = request.form.get("site_id", "").strip()[:64]
    try:
        join_string = invite_site(the_market(), site_id, actor=the_actor())
    except BrokerError as error:
        return show("sites.html", error.status, refused=str(error), site_id=site_id, **_listed())
    return show("sites.html", site_id=site_id, join_string=join_string, join_life_s=LIFE_S, **_listed())


@page("/admin/sites/<site_id>", Access.ADMIN)
def site(site_id: str) -> Response:
    """Show one site: its offer, leases, links and history."""

    def work(session: Session) -> SiteView:
        newest = last_round(session)
        return read_site(session, site_id, {} if newest is None else json.loads(newest.prices))

    return show("site.html", view=the_market().database.read(work))


@page("/admin/sites/<site_id>/remove", Access.ADMIN, method="POST")
def remove(site_id: str) -> Response:
    """Remove a site for good; its name must be typed, since nothing brings it back."""
    if request.form.get("confirmed") != site_id:
        return redirect(url_for("portal.site", site_id=site_id), HTTPStatus.SEE_OTHER)
    remove_site(the_market(), site_id, actor=the_actor())
    return redirect(url_for("portal.sites"), HTTPStatus.SEE_OTHER)


def _listed() -> dict[str, object]:
    after = request.args.get("after", "")
    rows = the_market().database.read(lambda session: list_sites(session, after=after))
    shown = rows[:SITES_PER_PAGE]
    return {"rows": shown, "next": shown[-1].row.site_id if len(rows) > SITES_PER_PAGE else None}
