"""A tenant's job file and workdir, made into what the wire carries. Works with `training.jobfile` and `sites.bundle`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from training.jobfile import JobFileError, load_job

from broker.cli.errors import UsageError
from sites.bundle import pack
from sites.errors import SiteError
from training.spec import JobSpec

FIELD_ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class JobDocument:
    """A job ready to be submitted: its spec as JSON values, and its packed workdir."""

    spec: dict[str, Any]
    packed: bytes


def read_job(path: Path) -> JobDocument:
    """Read `path`, pack the workdir that it names, and check all that can be checked here.

    Raises UsageError, with the line or the field, for what a broker would refuse anyway.
    """
    try:
        job = load_job(path)
        packed = pack(job.workdir)
    except FileNotFoundError as error:
        raise UsageError(f"there is no {error.filename}") from None
    except JobFileError as error:
        raise UsageError(str(error), code=error.code) from None
    except SiteError as error:
        raise UsageError(str(error), code=error.code) from None
    document = {**job.spec, "workdir_digest": hashlib.sha256(packed).hexdigest()}
    try:
        spec = JobSpec.model_validate(document)
    except ValidationError as error:
        raise UsageError(f"{path}: {_in_words(error)}", code="job.invalid") from None
    return JobDocument(spec.model_dump(mode="json"), packed)


def _in_words(error: ValidationError) -> str:
    rows = error.errors(include_url=False, include_input=False, include_context=False)
    shown = [f"{'.'.join(str(part) for part in row['loc'])}: {row['msg']}" for row in rows[:FIELD_ERRORS_SHOWN]]
    return "; ".join(shown) + (f"; and {len(rows) - len(shown)} more" if len(rows) > len(shown) else "")
