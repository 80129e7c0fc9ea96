"""The routes of tenants: quote, submit, watch, cancel, fetch. Thin: load, ask the service, answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Final

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field, StringConstraints
from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from broker.advice import Advice, advise
from broker.api.answers import answers
from broker.api.chunks import OFFSET_MAX, ChunkQuery, artifact_state
from broker.api.context import the_market, the_tenant_id
from broker.api.documents import (
    ArtifactDocument,
    EventPage,
    JobDetail,
    JobDocument,
    artifact_document,
    event_document,
    job_detail,
    job_document,
)
from broker.api.downloads import send_artifact
from broker.api.idempotency import IdempotencyHeader, once
from broker.api.pages import CURSOR_LENGTH_MAX, PageQuery, decode_cursor, encode_cursor
from broker.api.problems import json_answer
from broker.cancel import request_cancel
from broker.database.tables import Event, Job, Lease
from broker.explanations import Explanation, explain
from broker.invoices import invoice
from broker.market import Market
from broker.queries.jobs import ArtifactRow, artifact_digest, job_row, list_artifacts
from broker.quote import QuotedRow, quote_job
from broker.streams import streams_of
from broker.submit import submit_job
from broker.transitions import JobState
from broker.uploads import check_workdir, progress_of, take_chunk, workdir_upload
from sites.protocol import ArtifactState
from training.goals import Goal
from training.spec import Digest, JobSpec, SiteId

# How many attempts of a job one answer of measurements looks through: the newest.
METRIC_LEASES_MAX: Final = 64
METRIC_ROWS_MAX: Final = 2000
_LINE_BYTES_MAX: Final = 64 * 1024

_tag = Tag(name="jobs", description="What tenants do.")
api = APIBlueprint("jobs", __name__, url_prefix="/v1", abp_tags=[_tag], abp_security=[{"token": []}])

RecordId = Annotated[str, StringConstraints(pattern=r"^[a-z]{1,12}_[a-z0-9]{1,51}$")]


class JobPath(BaseModel):
    """A job."""

    job_id: RecordId


class ArtifactPath(JobPath):
    """A file of a job."""

    name: str = Field(max_length=200, pattern=r"^[^\x00]+$")


class ArtifactQuery(BaseModel):
    """Which of a job's files of that name."""

    kind: str = Field(default="output", pattern=r"^(workdir|checkpoint|output)$")


class WorkdirPath(BaseModel):
    """A workdir, by the SHA-256 of its bytes."""

    digest: Digest


class WorkdirQuery(BaseModel):
    """The size of the whole, as far as it is known."""

    size: int = Field(default=0, ge=0, le=OFFSET_MAX)


class QuoteQuery(BaseModel):
    """What the job is to reach: the quote then also says what to ask for."""

    goal: Goal | None = None


class JobsQuery(PageQuery):
    """Which jobs."""

    state: JobState | None = None


class LogQuery(BaseModel):
    """Which site's log, of which attempt, from which byte on."""

    site: SiteId | None = None
    epoch: int | None = Field(default=None, ge=1, le=OFFSET_MAX)
    offset: int = Field(default=0, ge=0, le=OFFSET_MAX)


class MetricsQuery(BaseModel):
    """`next_since` of the last answer, to get what came after it."""

    since: str | None = Field(default=None, max_length=CURSOR_LENGTH_MAX)


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    items: list[JobDocument]
    next_cursor: str | None


class ArtifactList(BaseModel):
    """The files of a job."""

    items: list[ArtifactDocument]


class LogPiece(BaseModel):
    """A piece of a log. Ask again from `next_offset`; `sites` are those that have one."""

    site_id: str | None
    lease_id: str | None
    epoch: int | None
    offset: int
    next_offset: int
    text: str
    full: bool
    sites: list[str]


class MetricsPiece(BaseModel):
    """Measurements as the attempts wrote them, each with its site and epoch."""

    items: list[dict[str, object]]
    next_since: str


@api.get("/workdirs/<string:digest>", responses=answers(ArtifactState))
def get_workdir(path: WorkdirPath, query: WorkdirQuery) -> Response:
    """Say how much of a workdir is held, so that an upload can go on from there."""
    market = the_market()
    progress = progress_of(market, workdir_upload(market, the_tenant_id(), path.digest))
    size_bytes = progress.held_bytes if progress.complete else query.size
    return json_answer(artifact_state(path.digest, size_bytes, progress))


@api.put("/workdirs/<string:digest>", responses=answers(ArtifactState))
def put_workdir(path: WorkdirPath, query: ChunkQuery) -> Response:
    """Take a piece of a workdir; with the last one the whole is checked by the rules of bundles."""
    market = the_market()
    upload = workdir_upload(market, the_tenant_id(), path.digest, offset=query.offset, size_bytes=query.size)
    progress = take_chunk(market, upload, request.get_data(), check_workdir)
    return json_answer(artifact_state(path.digest, query.size, progress))


@api.post("/quote", responses=answers())
def post_quote(query: QuoteQuery, body: JobSpec) -> Response:
    """Say what the job could get at the last prices, without any effect; with a goal, also what it should ask for."""
    rows = quote_job(the_market(), body, the_tenant_id())
    document: dict[str, object] = {"items": [_quote_row(row) for row in rows]}
    if query.goal is not None:
        advice = advise(the_market(), body, the_tenant_id(), query.goal)
        document["advice"] = None if advice is None else _advice(advice)
    return json_answer(document)


@api.post("/jobs", responses=answers(JobDocument, 201))
def post_job(header: IdempotencyHeader, body: JobSpec) -> Response:  # noqa: ARG001  the header is for the documentation
    """Submit a job: its budget is held and it waits for the next round."""
    market, tenant_id = the_market(), the_tenant_id()
    key = once(market, f"tenant/{tenant_id}")

    def effect() -> Response:
        kept: list[str] = []

        def before_commit(session: Session, job: Job) -> None:
            text = job_document(job).model_dump_json()
            key.record(session, HTTPStatus.CREATED, text)
            kept[:] = [text]

        submit_job(market, tenant_id, body, before_commit)
        return Response(kept[0], status=HTTPStatus.CREATED, content_type="application/json")

    return key.run(effect)


@api.get("/jobs", responses=answers(JobPage))
def get_jobs(query: JobsQuery) -> Response:
    """List the tenant's jobs, newest first."""
    market, tenant_id = the_market(), the_tenant_id()
    listing = f"jobs/{tenant_id}/{query.state or ''}"
    wanted = select(Job).where(Job.tenant_id == tenant_id)
    if query.state is not None:
        wanted = wanted.where(Job.state == query.state)
    if query.cursor is not None:
        submitted_ms, job_id = decode_cursor(market, listing, query.cursor)
        wanted = wanted.where(
            or_(Job.submitted_ms < submitted_ms, and_(Job.submitted_ms == submitted_ms, Job.job_id < job_id))
        )
    wanted = wanted.order_by(Job.submitted_ms.desc(), Job.job_id.desc()).limit(query.limit + 1)
    rows = market.database.read(lambda session: list(session.scalars(wanted)))
    shown = rows[: query.limit]
    more = (
        encode_cursor(market, listing, [shown[-1].submitted_ms, shown[-1].job_id]) if len(rows) > len(shown) else None
    )
    return json_answer(JobPage(items=[job_document(job) for job in shown], next_cursor=more))


@api.get("/jobs/<string:job_id>", responses=answers(JobDetail))
def get_job(path: JobPath) -> Response:
    """Show one job: where it stands and why, what it won, how fast it is and what it has cost."""
    market, tenant_id = the_market(), the_tenant_id()
    now_ms = market.clock.now_ms()
    detail = market.database.read(lambda session: job_detail(session, job_row(session, path.job_id, tenant_id), now_ms))
    return json_answer(detail)


@api.post("/jobs/<string:job_id>/cancel", responses=answers(JobDocument))
def post_cancel(path: JobPath) -> Response:
    """End a job; what was delivered so far stays charged, the rest of its hold is released."""
    return json_answer(job_document(request_cancel(the_market(), the_tenant_id(), path.job_id)))


@api.get("/jobs/<string:job_id>/explanation", responses=answers(Explanation))
def get_explanation(path: JobPath) -> Response:
    """Say why a job stands where it does and what would change it, each change checked by solving the round again."""
    return json_answer(explain(the_market(), the_tenant_id(), path.job_id))


@api.get("/jobs/<string:job_id>/events", responses=answers(EventPage))
def get_events(path: JobPath, query: PageQuery) -> Response:
    """List what happened to a job, oldest first."""
    market, tenant_id = the_market(), the_tenant_id()
    listing = f"events/{path.job_id}"
    after = int(decode_cursor(market, listing, query.cursor)[0]) if query.cursor is not None else 0

    def work(session: Session) -> list[Event]:
        job_row(session, path.job_id, tenant_id)
        wanted = select(Event).where(Event.job_id == path.job_id, Event.event_id > after)
        return list(session.scalars(wanted.order_by(Event.event_id).limit(query.limit + 1)))

    rows = market.database.read(work)
    shown = rows[: query.limit]
    more = encode_cursor(market, listing, [shown[-1].event_id]) if len(rows) > len(shown) else None
    return json_answer(EventPage(items=[event_document(event) for event in shown], next_cursor=more))


@api.get("/jobs/<string:job_id>/log", responses=answers(LogPiece))
def get_log(path: JobPath, query: LogQuery) -> Response:
    """Send a piece of the log that a site's attempt wrote; without a site, of the first that has a lease."""
    market, tenant_id = the_market(), the_tenant_id()
    leases = market.database.read(lambda session: _leases(session, tenant_id, path.job_id))
    # A site that joined a running gang has an epoch of its own: who trains together shares a placement.
    wanted = next((lease for lease in reversed(leases) if query.epoch in (None, lease.epoch)), None)
    gang = [lease for lease in leases if wanted is not None and lease.placement_id == wanted.placement_id]
    sites = sorted(lease.site_id for lease in gang)
    lease = next((lease for lease in gang if query.site in (None, lease.site_id)), None)
    if lease is None:
        return json_answer(
            LogPiece(
                site_id=query.site,
                lease_id=None,
                epoch=None,
                offset=query.offset,
                next_offset=query.offset,
                text="",
                full=False,
                sites=sites,
            )
        )
    streams = streams_of(market)
    piece = streams.read(lease.lease_id, "log", query.offset)
    return json_answer(
        LogPiece(
            site_id=lease.site_id,
            lease_id=lease.lease_id,
            epoch=lease.epoch,
            offset=query.offset,
            next_offset=query.offset + len(piece),
            text=piece.decode("utf-8", "replace"),
            full=streams.state(lease.lease_id, "log").full,
            sites=sites,
        )
    )


@api.get("/jobs/<string:job_id>/metrics", responses=answers(MetricsPiece))
def get_metrics(path: JobPath, query: MetricsQuery) -> Response:
    """Send the measurements that came after `since`, of every site and attempt."""
    market, tenant_id = the_market(), the_tenant_id()
    listing = f"metrics/{path.job_id}"
    leases = market.database.read(lambda session: _leases(session, tenant_id, path.job_id))[-METRIC_LEASES_MAX:]
    read_so_far: dict[str, int] = {}
    if query.since is not None:
        position = decode_cursor(market, listing, query.since)
        read_so_far = {str(name): int(offset) for name, offset in zip(position[::2], position[1::2], strict=True)}
    offsets: dict[str, int] = {}
    items: list[dict[str, object]] = []
    for lease in leases:
        offsets[lease.lease_id] = _read_metrics(market, lease, read_so_far.get(lease.lease_id, 0), items)
    since = encode_cursor(market, listing, [part for pair in offsets.items() for part in pair])
    return json_answer(MetricsPiece(items=items, next_since=since))


@api.get("/jobs/<string:job_id>/artifacts", responses=answers(ArtifactList))
def get_artifacts(path: JobPath) -> Response:
    """List the files of a job: outputs, checkpoints, workdir."""
    market, tenant_id = the_market(), the_tenant_id()

    def work(session: Session) -> tuple[ArtifactRow, ...]:
        job_row(session, path.job_id, tenant_id)
        return list_artifacts(session, path.job_id)

    return json_answer(ArtifactList(items=[artifact_document(artifact) for artifact in market.database.read(work)]))


@api.get("/jobs/<string:job_id>/artifacts/<path:name>", responses=answers())
def get_artifact(path: ArtifactPath, query: ArtifactQuery) -> Response:
    """Send a file of a job, whole or by range."""
    market, tenant_id = the_market(), the_tenant_id()

    def work(session: Session) -> str:
        job_row(session, path.job_id, tenant_id)
        return artifact_digest(session, path.job_id, query.kind, path.name)

    return send_artifact(market.artifacts, market.database.read(work), path.name)


@api.get("/jobs/<string:job_id>/invoice", responses=answers())
def get_invoice(path: JobPath) -> Response:
    """Show what a job has cost, line by line; final once its hold is closed."""
    market, tenant_id = the_market(), the_tenant_id()

    def work(session: Session) -> dict[str, object]:
        job_row(session, path.job_id, tenant_id)
        return invoice(session, path.job_id).as_json()

    return json_answer(market.database.read(work))


def _leases(session: Session, tenant_id: str, job_id: str) -> list[Lease]:
    job_row(session, job_id, tenant_id)
    return list(session.scalars(select(Lease).where(Lease.job_id == job_id).order_by(Lease.epoch, Lease.site_id)))


def _read_metrics(market: Market, lease: Lease, offset: int, items: list[dict[str, object]]) -> int:
    """Add the whole lines from `offset` on and return where they end; a line in the making is left for later."""
    piece = streams_of(market).read(lease.lease_id, "metrics", offset)
    for line in piece.splitlines(keepends=True):
        if len(items) >= METRIC_ROWS_MAX or (not line.endswith(b"\n") and len(line) < _LINE_BYTES_MAX):
            break
        offset += len(line)
        try:
            row = json.loads(line, parse_constant=lambda _word: None)
        except (ValueError, RecursionError):
            continue  # the job's own file: what is no measurement is passed over
        if isinstance(row, dict):
            items.append({**row, "site_id": lease.site_id, "epoch": lease.epoch})
    return offset


def _advice(advice: Advice) -> dict[str, object]:
    return {
        **asdict(advice),
        "row": _quote_row(advice.row),
        "sync": advice.sync.model_dump(mode="json"),
    }


def _quote_row(row: QuotedRow) -> dict[str, object]:
    return {
        **asdict(row),
        "configuration": row.configuration.model_dump(mode="json"),
        "sites": row.configuration.site_ids,
    }
