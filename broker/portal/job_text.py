"""The job file as text in a browser: the same file that the command line takes, faults named by their lines."""

from __future__ import annotations

from broker.portal.forms import Filled
from training.errors import SpecError
from training.jobfile import read_job_file


def spec_of_text(text: str, workdir_digest: str) -> Filled:
    """Return the job that the text spells, or its faults by line; where its workdir lies does not count here."""
    try:
        return Filled(read_job_file(text).spec(workdir_digest), {})
    except SpecError as error:
        return Filled(None, _by_line(error))


def _by_line(error: SpecError) -> dict[str, str]:
    faults: dict[str, str] = {}
    for pointer, what in error.problems:
        line = error.lines.get(pointer)
        place = pointer.strip("/").replace("/", ".") or "the file"
        faults.setdefault(f"line {line}, {place}" if line else place, what)
    return faults
