"""A run of threads over real gateways as `hansa lab run --record` would have kept it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training.small_job import SAMPLES, Site
from training.lab.run_record import START, Fault, RunRecord, SiteEnd
from training.roundlog.signing import public_hex


def start_folder(federation: Any) -> str:
    return str(federation.record / START)


def write_run(federation: Any, *ended: Site, samples: int = SAMPLES, faults: tuple[Fault, ...] = ()) -> Path:
    """Complete the record that the gateways wrote; `ended` are the sites that came to their end."""
    ends = {
        each.attempt.site_id: SiteEnd(round_number=each.session.rounds, outer_hash=each.session.outer_hash)
        for each in ended
        if each.session is not None
    }
    RunRecord(
        job="small",
        job_id=next(iter(federation.sites.values())).config.job_id,
        seed=5,
        sites=tuple(federation.sites),
        plan=ended[0].attempt.sync,
        samples=samples,
        authority_key=public_hex(federation.authority.views),
        contribution_bytes_max=80_000_000,
        record_bytes_max=federation.record_bytes_max,
        faults=faults,
        ends=ends,
    ).write(federation.record)
    folder: Path = federation.record
    return folder
