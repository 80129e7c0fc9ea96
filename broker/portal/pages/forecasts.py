"""How forecasts came out: for each kind the share inside its interval, which should be nine tenths."""

from __future__ import annotations

from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from broker.api.context import the_market
from broker.intervals import COVERED, RECORD_MIN
from broker.portal.blueprint import Access, page, show
from broker.queries.forecasts import calibrations, recent_forecasts


@page("/admin/forecasts", Access.ADMIN)
def forecasts() -> Response:
    """Show the calibration of starts and finishes."""

    def work(session: Session) -> dict[str, object]:
        return {"families": calibrations(session), "recent": recent_forecasts(session)}

    values = the_market().database.read(work)
    return show("forecasts.html", promised=COVERED, record_min=RECORD_MIN, **values)
