"""A tenant's jobs: the list, one job live, its logs and files, and cancelling it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from flask import Response as Answer
from flask import jsonify, redirect, request, url_for
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from broker.api.context import the_market
from broker.api.downloads import send_artifact
from broker.api.pages import decode_cursor, encode_cursor
from broker.cancel import request_cancel
from broker.database.tables import Lease
from broker.errors import NotFoundError
from broker.explanations import explain
from broker.portal.blueprint import Access, is_fragment, own_tenant_id, page, show, the_person
from broker.portal.curves import Curves, read_curves
from broker.portal.log_tail import Tail, read_tail
from broker.queries.jobs import (
    JOBS_PER_PAGE,
    JobView,
    artifact_digest,
    count_jobs,
    job_row,
    list_jobs,
    read_job,
)
from broker.queries.money import tenant_balance
from broker.streams import READ_BYTES_MAX, streams_of
from broker.tickets import stream_url
from broker.transitions import JobState

LOGS_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class LogView:
    """The end of one site's log."""

    lease: Lease
    tail: Tail


@page("/jobs", Access.TENANT)
def jobs() -> Response:
    """List the tenant's jobs, newest first."""
    market, tenant_id = the_market(), own_tenant_id()
    assert tenant_id is not None, "only tenants come here"
    state = request.args.get("state") or None
    if state not in {None, *JobState}:
        raise NotFoundError(f"no job is ever {state!r}; the states are {', '.join(JobState)}")
    listing = f"portal/jobs/{tenant_id}/{state}"
    cursor = request.args.get("after")
    after = None
    if cursor:
        submitted_ms, job_id = decode_cursor(market, listing, cursor)
        after = (int(submitted_ms), str(job_id))

    def work(session: Session) -> dict[str, object]:
        rows = list_jobs(session, tenant_id, state=state, after=after)
        last = rows[JOBS_PER_PAGE - 1] if len(rows) > JOBS_PER_PAGE else None
        return {
            "rows": rows[:JOBS_PER_PAGE],
            "counts": count_jobs(session, tenant_id),
            "balance": tenant_balance(session, tenant_id),
            "next": None if last is None else encode_cursor(market, listing, [last.submitted_ms, last.job_id]),
        }

    return show("jobs.html", state=state, states=list(JobState), **market.database.read(work))


@page("/jobs/<job_id>", Access.READER)
def job(job_id: str) -> Response:
    """Show one job."""
    market = the_market()
    view = _read(job_id)
    stream = "" if view.is_final else stream_url(market, "job", job_id) or ""
    return show("job.html", stream=stream, **_live_values(view))


@page("/jobs/<job_id>/live", Access.READER)
def job_live(job_id: str) -> Response:
    """Show the part of a job's page that changes while it is watched."""
    return show("job_live.html", **_live_values(_read(job_id)))


@page("/jobs/<job_id>/explanation", Access.READER)
def job_explanation(job_id: str) -> Response:
    """Say what would place a waiting job, each change tried on the last round."""
    found = explain(the_market(), own_tenant_id(), job_id)
    return show("explanation.html" if is_fragment() else "explanation_page.html", explanation=found)


@page("/jobs/<job_id>/curves.json", Access.READER)
def job_curves(job_id: str) -> Answer:
    """Return the job's curves as uPlot takes them."""
    return jsonify(_curves(_read(job_id)).as_json())


@page("/jobs/<job_id>/logs/<lease_id>", Access.READER)
def job_log(job_id: str, lease_id: str) -> Response:
    """Send a site's whole log as plain text."""
    market = the_market()

    def work(session: Session) -> Lease:
        job_row(session, job_id, own_tenant_id())
        lease = session.get(Lease, lease_id)
        if lease is None or lease.job_id != job_id:
            raise NotFoundError(f"this job has no lease {lease_id[:64]!r}")
        return lease

    lease = market.database.read(work)
    streams = streams_of(market)

    def chunks() -> Iterator[bytes]:
        offset = 0
        while chunk := streams.read(lease.lease_id, "log", offset, READ_BYTES_MAX):
            offset += len(chunk)
            yield chunk

    response = Answer(chunks(), content_type="text/plain; charset=utf-8")
    response.headers["Content-Disposition"] = f'attachment; filename="{lease.site_id}-{lease.epoch}.log"'
    return response


@page("/jobs/<job_id>/files/<kind>/<path:name>", Access.READER)
def job_file(job_id: str, kind: str, name: str) -> Response:
    """Send a file of the job, whole or by range."""
    market = the_market()

    def work(session: Session) -> str:
        job_row(session, job_id, own_tenant_id())
        return artifact_digest(session, job_id, kind, name)

    digest = market.database.read(work)
    return send_artifact(market.artifacts, digest, name.rpartition("/")[2])


@page("/jobs/<job_id>/cancel", Access.TENANT, method="POST")
def cancel_job(job_id: str) -> Response:
    """Cancel a job of one's own."""
    tenant_id = the_person().tenant_id
    assert tenant_id is not None, "only tenants come here"
    request_cancel(the_market(), tenant_id, job_id)
    return redirect(url_for("portal.job", job_id=job_id), HTTPStatus.SEE_OTHER)


def _read(job_id: str) -> JobView:
    return the_market().database.read(lambda session: read_job(session, job_id, own_tenant_id()))


def _live_values(view: JobView) -> dict[str, object]:
    streams = streams_of(the_market())
    leases = _leases(view)
    logs = [LogView(lease, read_tail(streams, lease.lease_id)) for lease in leases[:LOGS_SHOWN]]
    return {
        "view": view,
        "job": view.row,
        "curves": _curves(view),
        "logs": [log for log in logs if log.tail.size_bytes],
        "may_cancel": the_person().tenant_id == view.row.tenant_id and view.row.ended_ms is None,
    }


def _curves(view: JobView) -> Curves:
    newest = next(iter(view.placements), None)
    predicted = None if newest is None else newest.row.samples_per_s_predicted
    return read_curves(streams_of(the_market()), _leases(view), predicted)


def _leases(view: JobView) -> list[Lease]:
    return [lease.row for placement in view.placements for lease in placement.leases]
