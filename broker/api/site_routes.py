"""The routes of sites (`sites.protocol`): thin ends of signed requests.

Each spends its request's sequence number in the write transaction of its effect, or in one of its
own before an effect on files: a replayed request changes nothing.
"""

from __future__ import annotations

import re
from typing import Final, TypeVar

from flask import Blueprint, Response, request
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.api.chunks import OFFSET_MAX, ChunkQuery, artifact_state
from broker.api.context import the_market, the_site_request
from broker.api.downloads import send_artifact
from broker.api.errors import MalformedRequestError, MediaTypeError, RouteError
from broker.api.problems import invalid, json_answer
from broker.artifacts import ArtifactMissingError
from broker.database.standing import LEASE_STANDS
from broker.database.tables import JobArtifact, Lease, LeasedGpu
from broker.earnings import site_statement
from broker.enrol import enrol
from broker.errors import NotFoundError, StaleEpochError
from broker.heartbeat import receive
from broker.identity.site_requests import spend_sequence
from broker.market import Market
from broker.streams import STREAM_NAMES, streams_of
from broker.tenant_secrets import box_for_site
from broker.uploads import site_upload, take_chunk
from sites.protocol import ROUTE_PREFIX, Enrolment, Heartbeat, SecretsAnswer, SecretsRequest

DIGEST: Final = re.compile(r"[0-9a-f]{64}")

blueprint = Blueprint("site", __name__, url_prefix=ROUTE_PREFIX)
M = TypeVar("M", bound=BaseModel)


class StreamQuery(BaseModel):
    """Where a chunk of a stream begins."""

    offset: int = Field(ge=0, le=OFFSET_MAX)


class StatementQuery(BaseModel):
    """How far back a statement reaches."""

    days: int = Field(default=30, ge=1, le=366)


@blueprint.post("/enrol")
def post_enrol() -> Response:
    """Let a new site in by its one-time token."""
    return json_answer(enrol(the_market(), _body(Enrolment)))


@blueprint.post("/heartbeat")
def post_heartbeat() -> Response:
    """Take all that a site says and answer all that is wanted of it."""
    market, signed = the_market(), the_site_request()
    heartbeat = _body(Heartbeat)
    answer = receive(
        market,
        signed.site_id,
        heartbeat,
        sequence=signed.sequence,
        before_effect=lambda session: spend_sequence(session, market, signed),
    )
    # Without what is not said: an agent of an older version refuses a field that it does not know.
    return json_answer(answer.model_dump(mode="json", exclude_none=True))


@blueprint.get("/statement")
def get_statement() -> Response:
    """Tell a site what it earned, what its customers spent, and what sharing was worth."""
    query = _query(StatementQuery)
    market = the_market()
    _spend(market)
    site_id = the_site_request().site_id
    return json_answer(market.database.read(lambda session: site_statement(session, market, site_id, days=query.days)))


@blueprint.get("/artifacts/<digest>")
def get_artifact(digest: str) -> Response:
    """Send an artifact, or a range of it, of a job whose lease this site holds."""
    _require_digest(digest)
    market = the_market()
    _spend(market)
    site_id = the_site_request().site_id
    if not market.database.read(lambda session: _may_read(session, site_id, digest)):
        raise ArtifactMissingError("no job under a lease of this site has this artifact")
    return send_artifact(market.artifacts, digest, "artifact")


@blueprint.put("/artifacts/<digest>")
def put_artifact(digest: str) -> Response:
    """Take a piece of a checkpoint or an output; only from a site that holds a lease."""
    _require_digest(digest)
    query = _query(ChunkQuery)
    market = the_market()
    _spend(market)
    site_id = the_site_request().site_id
    if not market.database.read(lambda session: _holds_any_lease(session, site_id)):
        raise NotFoundError("this site holds no lease, so there is no job that the artifact could be of")
    upload = site_upload(market, site_id, digest, offset=query.offset, size_bytes=query.size)
    progress = take_chunk(market, upload, request.get_data())
    return json_answer(artifact_state(digest, query.size, progress))


@blueprint.post("/leases/<lease_id>/<int:epoch>/streams/<name>")
def post_stream(lease_id: str, epoch: int, name: str) -> Response:
    """Take a piece of an attempt's log or measurements."""
    if name not in STREAM_NAMES:
        raise RouteError(f"a lease has the streams {' and '.join(sorted(STREAM_NAMES))}, not this one")
    query = _query(StreamQuery)
    market, signed = the_market(), the_site_request()

    def work(session: Session) -> None:
        spend_sequence(session, market, signed)
        lease = session.get(Lease, lease_id) if "\0" not in lease_id else None
        if lease is None or lease.site_id != signed.site_id:
            raise NotFoundError("this site has no such lease; forget it")
        if lease.epoch != epoch:
            raise StaleEpochError("the lease has another epoch by now; stop what runs under the old one")

    market.database.write("stream", work)
    return json_answer(streams_of(market).append(lease_id, name, query.offset, request.get_data()))


@blueprint.post("/leases/<lease_id>/<int:epoch>/secrets")
def post_secrets(lease_id: str, epoch: int) -> Response:
    """Give a site the secrets of a lease that it is about to start, in a box that it alone opens."""
    market, signed = the_market(), the_site_request()
    asked = _body(SecretsRequest)

    def work(session: Session) -> bytes:
        spend_sequence(session, market, signed)
        return box_for_site(
            session, market, site_id=signed.site_id, lease_id=lease_id, epoch=epoch, public_key=asked.public_key
        )

    return json_answer(SecretsAnswer(box=market.database.write("secrets", work).hex()))


def _spend(market: Market) -> None:
    signed = the_site_request()
    market.database.write("site request", lambda session: spend_sequence(session, market, signed))


def _may_read(session: Session, site_id: str, digest: str) -> bool:
    held = (
        select(Lease.lease_id)
        .join(JobArtifact, JobArtifact.job_id == Lease.job_id)
        .where(JobArtifact.digest == digest, Lease.site_id == site_id, LEASE_STANDS)
    )
    return session.scalar(held.limit(1)) is not None


def _holds_any_lease(session: Session, site_id: str) -> bool:
    # A lease that has ended still counts while its processes live: its last checkpoint is on its way.
    standing = select(Lease.lease_id).where(Lease.site_id == site_id, LEASE_STANDS)
    stopping = select(LeasedGpu.lease_id).where(LeasedGpu.site_id == site_id, LeasedGpu.live)
    return any(session.scalar(query.limit(1)) is not None for query in (standing, stopping))


def _body(model: type[M]) -> M:
    if request.mimetype != "application/json":
        raise MediaTypeError("send the body as JSON, with Content-Type: application/json")
    body = request.get_data()
    if b"\\u0000" in body:
        raise MalformedRequestError("the body holds a NUL character; leave it out")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if error.errors(include_url=False, include_input=False)[0]["type"] == "json_invalid":
            raise MalformedRequestError("the body is not JSON") from None
        raise invalid(error) from None


def _query(model: type[M]) -> M:
    try:
        return model.model_validate(request.args.to_dict())
    except ValidationError as error:
        raise invalid(error) from None


def _require_digest(digest: str) -> None:
    if not DIGEST.fullmatch(digest):
        raise RouteError("an artifact is named by 64 lower-case hexadecimal digits")
