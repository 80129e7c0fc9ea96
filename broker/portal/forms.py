"""The submit form: what its fields are called, what they begin with, and the job that they spell.

A field is text until `spec_of` reads all of them as one JobSpec; what cannot be read is said at its
field. The form begins as the bundled example, so that a first job needs no typing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, Final

from pydantic import ValidationError

from broker.advice import Advice
from pricing.errors import AmountError
from pricing.money import format_credits, parse_credits
from training.jobfile import read_job_file
from training.spec import JobSpec

GPU_ROWS: Final = (1, 2, 3)
TEXT_LENGTH_MAX: Final = 8_192
# Stands in for the workdir in a quote, which does not depend on it.
NO_WORKDIR: Final = "0" * 64
EXAMPLE: Final = files("training") / "examples" / "stdlib_lm"

_WORKLOAD: Final = ("samples", "batch_per_gpu", "parameters", "flops_per_sample")
_SYNC: Final = (
    "strategy",
    "codec",
    "period_steps",
    "outer_learning_rate",
    "outer_momentum",
    "checkpoint_rounds",
    "patience_s",
)
_PLAIN: Final = ("name", "run", "setup", "sites_max", *_WORKLOAD, *_SYNC)
_GPU: Final = {"gpu_type": "gpu_type", "count_min": "gpu_min", "count_max": "gpu_max"}
_FIELD_OF: Final = {
    "budget_micros": "budget",
    "bid_micros_per_million_samples": "bid",
    "deadline_ms": "deadline",
    "sites_allowed": "sites_allowed",
    **{name: name for name in _PLAIN},
}
FIELDS: Final = (
    *_PLAIN,
    *("budget", "bid", "deadline", "sites_allowed"),
    # Of the quote, not of the job.
    "goal",
    *(f"{name}_{row}" for row in GPU_ROWS for name in _GPU.values()),
)


@dataclass(frozen=True, slots=True)
class Filled:
    """A form as it was sent: the job, or what is wrong, by field; "" is for the whole."""

    spec: JobSpec | None
    faults: dict[str, str]


def example_text() -> str:
    """Return the bundled example's job file."""
    return (EXAMPLE / "job.yaml").read_text("utf-8")


def example_values() -> dict[str, str]:
    """Return the form filled as the bundled example."""
    job = read_job_file(example_text()).spec(NO_WORKDIR)
    (gpus,) = job.resources.accelerators
    values: dict[str, object] = {
        "name": job.name,
        "run": job.run,
        "sites_max": job.market.sites_max,
        "budget": format_credits(job.market.budget_micros),
        "gpu_type_1": gpus.gpu_type,
        "gpu_min_1": gpus.count_min,
        "gpu_max_1": gpus.count_max,
        **job.market.workload.model_dump(),
        **job.market.sync.model_dump(),
    }
    return {name: str(value) for name, value in values.items()}


def read_values(form: Mapping[str, str]) -> dict[str, str]:
    """Return the fields of the form that were sent, bounded."""
    return {name: form.get(name, "").strip()[:TEXT_LENGTH_MAX] for name in FIELDS}


def spec_of(values: Mapping[str, str], workdir_digest: str) -> Filled:
    """Return the job that the fields spell, or what is wrong with them."""
    faults: dict[str, str] = {}
    rows = [row for row in GPU_ROWS if any(values.get(f"{name}_{row}") for name in _GPU.values())]
    document: dict[str, Any] = {
        **{name: values[name] for name in ("name", "run")},
        **({"setup": values["setup"]} if values.get("setup") else {}),
        "workdir_digest": workdir_digest,
        "resources": {"accelerators": [_gpu(values, row) for row in rows]},
        "market": {
            **_optional(values, ("sites_max",)),
            **_money(values, faults),
            **_deadline(values, faults),
            **_sites_allowed(values),
            "workload": _optional(values, _WORKLOAD),
            "sync": _optional(values, _SYNC),
        },
    }
    try:
        spec = JobSpec.model_validate(document)
    except ValidationError as error:
        for details in error.errors(include_url=False, include_input=False, include_context=False):
            message = details["msg"].removeprefix("Value error, ")
            faults.setdefault(_field(details["loc"], rows), message)
        return Filled(None, faults)
    return Filled(None if faults else spec, faults)


def with_advice(values: Mapping[str, str], advice: Advice) -> dict[str, str]:
    """Return the fields changed so that they ask for just what was advised; where, stays as it was."""
    sold = advice.row.configuration
    counts: dict[str, int] = {}
    for part in sold.parts:
        counts[part.gpu_type] = counts.get(part.gpu_type, 0) + part.gpus
    changed = {f"{name}_{row}": "" for row in GPU_ROWS for name in _GPU.values()}
    for row, (gpu_type, count) in zip(GPU_ROWS, sorted(counts.items()), strict=False):
        changed |= {f"gpu_type_{row}": gpu_type, f"gpu_min_{row}": str(count), f"gpu_max_{row}": str(count)}
    changed |= {"sites_max": str(len(sold.parts)), "batch_per_gpu": str(advice.batch_per_gpu)}
    if len(sold.parts) > 1:
        changed |= {name: str(getattr(advice.sync, name)) for name in ("strategy", "codec", "period_steps")}
    return {**values, **changed}


def _gpu(values: Mapping[str, str], row: int) -> dict[str, str]:
    least = values.get(f"gpu_min_{row}", "")
    return {
        "gpu_type": values.get(f"gpu_type_{row}", ""),
        "count_min": least,
        "count_max": values.get(f"gpu_max_{row}", "") or least,
    }


def _optional(values: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: values[name] for name in names if values.get(name)}


def _money(values: Mapping[str, str], faults: dict[str, str]) -> dict[str, int]:
    amounts: dict[str, int] = {}
    for name, key in (("budget", "budget_micros"), ("bid", "bid_micros_per_million_samples")):
        if not values.get(name):
            continue
        try:
            amounts[key] = parse_credits(values[name])
        except AmountError as error:
            faults[name] = str(error)
            amounts[key] = 1  # so that the other fields are judged too
    return amounts


def _deadline(values: Mapping[str, str], faults: dict[str, str]) -> dict[str, int]:
    text = values.get("deadline", "")
    if not text:
        return {}
    try:
        return {"deadline_ms": round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)}
    except ValueError:
        faults["deadline"] = "write a UTC time such as 2027-01-31T18:00"
        return {}


def _sites_allowed(values: Mapping[str, str]) -> dict[str, list[str]]:
    names = values.get("sites_allowed", "").replace(",", " ").split()
    return {"sites_allowed": names} if names else {}


def _field(loc: tuple[int | str, ...], rows: list[int]) -> str:
    match loc:
        case ("resources", "accelerators", int(index), *rest):
            name = _GPU[str(rest[0])] if rest else "gpu_max"
            return f"{name}_{rows[index]}"
        case ("resources", *_):
            return "gpu_type_1"
        case ("market", "sites_allowed", *_):
            return "sites_allowed"
    return _FIELD_OF.get(str(loc[-1]) if loc else "", "")
