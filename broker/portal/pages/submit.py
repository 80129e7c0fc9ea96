"""Submitting a job: by form or by job file, with what it would get shown before it is confirmed.

Sending the form twice submits one job: its key is kept in the transaction that writes the job.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

from flask import redirect, request, url_for
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from broker.advice import Advice, NoDeadlineError, advise
from broker.api.context import the_market
from broker.database.idempotency import IdempotencyKey
from broker.database.tables import Job
from broker.errors import BrokerError
from broker.portal.blueprint import Access, page, show, the_person
from broker.portal.forms import (
    GPU_ROWS,
    NO_WORKDIR,
    Filled,
    example_text,
    example_values,
    read_values,
    spec_of,
    with_advice,
)
from broker.portal.job_text import spec_of_text
from broker.portal.workdirs import Workdir, keep_example, keep_upload
from broker.quote import QuotedRow, quote_job, reason_never_possible
from broker.submit import submit_job
from sites.bundle import PACKED_BYTES_MAX
from training.catalogue import GPU_TYPES
from training.goals import Goal
from training.spec import JobSpec

FORM_OVERHEAD_BYTES: Final = 400_000
QUOTE_ROWS_MAX: Final = 12
JOB_TEXT_BYTES_MAX: Final = 64 * 1024
GOALS: Final = {
    "": "none: only show what there is",
    Goal.DEADLINE: "in time, as cheap as possible",
    Goal.BUDGET: "as fast as the budget allows",
    Goal.VALUE: "the best value for its price",
}
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_KEY: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class Quoted:
    """What a job would get now; `never` says why it never could, where that is so.

    `advice` is what to ask for by the goal, None without one and where nothing could run it now; `no_advice` says why
    the goal cannot be weighed.
    """

    rows: list[QuotedRow]
    never: str | None
    goal: Goal | None = None
    advice: Advice | None = None
    no_advice: str = ""


@dataclass(slots=True)
class Draft:
    """A job as far as its sender has come."""

    values: dict[str, str]
    text: str
    by: str = "form"
    submission: str = field(default_factory=lambda: secrets.token_hex(16))
    workdir: Workdir | None = None
    faults: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    quoted: Quoted | None = None

    @property
    def goal(self) -> Goal | None:
        """What the tenant wants of the job; None where the form does not say."""
        named = self.values.get("goal", "")
        return Goal(named) if named in set(Goal) else None


@page("/jobs/new", Access.TENANT)
def new_job() -> Response:
    """Show the form, filled as the bundled example."""
    by = "file" if request.args.get("by") == "file" else "form"
    return _show(Draft(example_values(), example_text(), by=by))


@page("/jobs/quote", Access.TENANT, method="POST")
def quote() -> Response:
    """Show what the job in the form would get now, beside it."""
    draft = _sent()
    filled = _filled(draft, NO_WORKDIR)
    draft.faults = filled.faults
    if filled.spec is not None:
        draft.quoted = _quoted(filled.spec, the_person().tenant_id or "", draft.goal)
    return show("quote.html", draft=draft, alone=True)


@page("/jobs/new", Access.TENANT, method="POST", body_bytes_max=PACKED_BYTES_MAX + FORM_OVERHEAD_BYTES)
def take_job() -> Response:
    """Quote or submit the job, as the pressed button says."""
    market = the_market()
    tenant_id = the_person().tenant_id
    assert tenant_id is not None, "only tenants come here"
    draft = _sent()
    try:
        draft.workdir = _workdir(tenant_id)
        filled = _filled(draft, draft.workdir.digest if draft.workdir else NO_WORKDIR)
        draft.faults = filled.faults
        if filled.spec is None:
            return _show(draft, HTTPStatus.UNPROCESSABLE_ENTITY)
        if request.form.get("step") != "submit":
            draft.quoted = _quoted(filled.spec, tenant_id, draft.goal)
            if request.form.get("step") == "take" and draft.by == "form":
                _take_advice(draft, tenant_id)
            return _show(draft)
        if draft.workdir is None:
            draft.faults["workdir"] = "choose a .tar.gz of the job's folder, or the example"
            return _show(draft, HTTPStatus.UNPROCESSABLE_ENTITY)
        job_id = _submit(tenant_id, draft.submission, filled.spec)
    except BrokerError as error:
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise
        draft.refused = str(error)
        return _show(draft, error.status)
    market.doorbell.wake_watchers(job_id)
    return redirect(url_for("portal.job", job_id=job_id), HTTPStatus.SEE_OTHER)


def _sent() -> Draft:
    key = request.form.get("submission", "")
    return Draft(
        values=read_values(request.form),
        text=request.form.get("job_text", "")[:JOB_TEXT_BYTES_MAX],
        by="file" if request.form.get("by") == "file" else "form",
        submission=key if _KEY.fullmatch(key) else secrets.token_hex(16),
        workdir=_kept_workdir(),
    )


def _filled(draft: Draft, workdir_digest: str) -> Filled:
    if draft.by == "file":
        return spec_of_text(draft.text, workdir_digest)
    return spec_of(draft.values, workdir_digest)


def _workdir(tenant_id: str) -> Workdir | None:
    sent = request.files.get("workdir_file")
    if sent is not None and sent.filename:
        return keep_upload(the_market(), tenant_id, sent)
    if request.form.get("workdir") == "example":
        return keep_example(the_market(), tenant_id)
    return _kept_workdir()


def _kept_workdir() -> Workdir | None:
    """Return the workdir that an earlier send of this form has uploaded."""
    digest = request.form.get("workdir_digest", "")
    if request.form.get("workdir") == "example" or not _DIGEST.fullmatch(digest):
        return None
    return Workdir(digest, request.form.get("workdir_name", "")[:100])


def _quoted(spec: JobSpec, tenant_id: str, goal: Goal | None) -> Quoted:
    market = the_market()
    rows = quote_job(market, spec, tenant_id)[:QUOTE_ROWS_MAX]
    never = None if rows else market.database.read(lambda session: reason_never_possible(session, spec))
    if goal is None:
        return Quoted(rows, never)
    try:
        return Quoted(rows, never, goal, advise(market, spec, tenant_id, goal))
    except NoDeadlineError as error:
        return Quoted(rows, never, goal, no_advice=str(error))


def _take_advice(draft: Draft, tenant_id: str) -> None:
    """Change the form to what its quote advises, and quote that."""
    if draft.quoted is None or draft.quoted.advice is None:
        return
    draft.values = with_advice(draft.values, draft.quoted.advice)
    filled = _filled(draft, NO_WORKDIR)
    draft.faults = filled.faults
    draft.quoted = None if filled.spec is None else _quoted(filled.spec, tenant_id, draft.goal)


def _submit(tenant_id: str, submission: str, spec: JobSpec) -> str:
    market = the_market()
    owner, key = f"tenant/{tenant_id}", f"portal/{submission}"

    def submitted(session: Session) -> str | None:
        row = session.get(IdempotencyKey, (owner, key))
        return None if row is None else row.body

    def before_commit(session: Session, job: Job) -> None:
        session.add(
            IdempotencyKey(
                owner=owner,
                key=key,
                request_digest=hashlib.sha256(job.spec.encode()).hexdigest(),
                status=int(HTTPStatus.CREATED),
                body=job.job_id,
                created_ms=market.clock.now_ms(),
            )
        )

    former = market.database.read(submitted)
    if former is not None:
        return former
    return submit_job(market, tenant_id, spec, before_commit).job_id


def _show(draft: Draft, status: int = HTTPStatus.OK) -> Response:
    return show("new_job.html", status, draft=draft, gpu_rows=GPU_ROWS, gpu_types=["", *GPU_TYPES], goals=GOALS)
