"""What the site sells, as an offer; a CPU slot's speed is measured once and kept in the site's folder.

A GPU's speed is taken from the market's catalogue. A CPU slot stands in for a GPU on hosts without
one, and hosts differ too much for a catalogue: half a second of fp32 matrix products on one thread
says what one slot does. Where a host sells more slots than it has cores, the figure is a slot's share
when all slots are busy.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from sites.asks import Curve, first_gpus
from sites.hours import Span
from sites.identity import write_private
from sites.policy import Policy
from sites.protocol import (
    GPUS_PER_POOL_MAX,
    RESERVATIONS_MAX,
    AskStepOffer,
    LinkOffer,
    Offer,
    PoolOffer,
    ReservedOffer,
)
from sites.settings import PoolSettings, SiteSettings

CPU_SLOT: Final = "cpu-slot"
MEASURED_FILE: Final = "measured.json"
_PROBE_TIMEOUT_S: Final = 60.0
# How far ahead closed hours are announced: longer than any usual term.
_ANNOUNCED: Final = dt.timedelta(days=3)

# Runs under the ranks' interpreter: it tells what that has, and how fast one thread of it multiplies.
_PROBE: Final = """
import importlib.metadata as metadata, json, platform, time
found = {"python": platform.python_version()}
for name in ("torch", "numpy", "safetensors", "hansa"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
flops = None
try:
    import numpy
    a = numpy.ones((256, 256), dtype=numpy.float32)
    a @ a
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        a @ a
        count += 1
    flops = count * 2 * 256**3 / (time.perf_counter() - start)
except ImportError:
    pass
print(json.dumps({"environment": found, "flops_per_s": flops}))
"""


class Measured(BaseModel):
    """What the probe found under one interpreter."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    environment: dict[str, str] = {}
    flops_per_s: float | None = None
    python: str = ""
    cores: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """What of an offer may be another with each heartbeat: policy, asks by GPU type, whether the site drains."""

    policy: Policy
    asks: Mapping[str, Curve]
    draining: bool
    now: dt.datetime
    mismatch: str = ""


def measure(settings: SiteSettings) -> Measured:
    """Return what the ranks' interpreter offers, measured now or as kept in the site's folder."""
    path = settings.folder / MEASURED_FILE
    cores = len(os.sched_getaffinity(0))
    kept = _kept(path)
    if kept is not None and (kept.python, kept.cores) == (settings.python, cores):
        return kept
    if not settings.calibrate:
        return Measured(python=settings.python, cores=cores)
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        probe = subprocess.run(
            [settings.python, "-I", "-c", _PROBE],
            env={"PATH": os.defpath, **threads},
            capture_output=True,
            check=True,
            timeout=_PROBE_TIMEOUT_S,
        )
        found = Measured.model_validate_json(probe.stdout).model_copy(
            update={"python": settings.python, "cores": cores}
        )
    except (OSError, subprocess.SubprocessError, ValidationError):
        return Measured(python=settings.python, cores=cores)
    write_private(path, found.model_dump_json().encode())
    return found


def offer(settings: SiteSettings, measured: Measured, terms: Terms) -> Offer:
    """Return the offer for the next heartbeat.

    What the owner's policy says of a pool or of peers as a whole is announced here: nothing is proposed to be vetoed.
    """
    policy = terms.policy
    closed = _closed(policy, terms.now)
    return Offer(
        pools=tuple(
            _pool_offer(settings, measured, pool, terms, closed)
            for pool in settings.pools
            if terms.policy.lendable(len(pool.gpu_ids)) > 0
        ),
        links=tuple(
            LinkOffer(
                target=link.target,
                bandwidth_bits_per_s=link.bandwidth,
                delay_s=link.delay_ms / 1000,
                egress_price_micros_per_gb=link.egress_price,
            )
            for link in settings.links
            if link.target not in policy.peers_refused
        ),
        listens=settings.listen is not None,
        draining=terms.draining,
        drains_at_ms=None if settings.drain_at is None else _ms(settings.drain_at),
        region=settings.region,
        continent=settings.continent,
        data_egress_to_region=settings.data_egress.region,
        data_egress_to_continent=settings.data_egress.continent,
        data_egress_beyond=settings.data_egress.beyond,
        environment=measured.environment,
        mismatch=terms.mismatch[:1000],
        policy_digest=None if policy == Policy() else policy.digest,
    )


def sells_gpus(settings: SiteSettings) -> bool:
    """Return whether anything but CPU slots is for sale."""
    return any(pool.gpu_type != CPU_SLOT for pool in settings.pools)


def lent_shares(pools: Sequence[PoolSettings], policy: Policy, lent: Mapping[str, int]) -> dict[str, float]:
    """Return by GPU type which share is lent of what the owner lets be lent."""
    lendable = {pool.gpu_type: policy.lendable(len(pool.gpu_ids)) for pool in pools}
    return {kind: min(1.0, lent.get(kind, 0) / count) if count else 1.0 for kind, count in lendable.items()}


def _pool_offer(
    settings: SiteSettings, measured: Measured, pool: PoolSettings, terms: Terms, closed: list[Span]
) -> PoolOffer:
    lendable = terms.policy.lendable(len(pool.gpu_ids))
    curve = first_gpus(terms.asks.get(pool.gpu_type, pool.ask_curve), lendable)
    quotas = [quota for quota in (pool.gpus_max_per_job, terms.policy.gpus_max_per_lease) if quota is not None]
    quota = min(quotas)
    reserved = [(kept.begins, kept.ends, kept.gpus) for kept in pool.reserved]
    reserved += [(begins, ends, len(pool.gpu_ids)) for begins, ends in closed]
    return PoolOffer(
        gpu_type=pool.gpu_type,
        gpu_ids=pool.gpu_ids[:lendable],
        ask_micros_per_gpu_hour=curve[0].price,
        ask_steps=tuple(AskStepOffer(gpus=part.gpus, ask_micros_per_gpu_hour=part.price) for part in curve[1:]),
        job_gpus_max=None if quota >= GPUS_PER_POOL_MAX else quota,
        reserved=tuple(
            ReservedOffer(from_ms=_ms(begins), to_ms=_ms(ends), gpus=gpus)
            for begins, ends, gpus in reserved[:RESERVATIONS_MAX]
        ),
        flops_per_s=_slot_share(measured, settings.cores, len(pool.gpu_ids)) if pool.gpu_type == CPU_SLOT else None,
    )


def _closed(policy: Policy, now: dt.datetime) -> list[Span]:
    """Return when the owner takes no leases, from yesterday's midnight on: the same through the day, so that no round is due."""
    if policy.hours is None:
        return []
    midnight = now.astimezone(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    ahead = policy.hours.closed(midnight - dt.timedelta(days=1), midnight + _ANNOUNCED)
    return [(begins, ends) for begins, ends in ahead if ends > now]


def _ms(moment: dt.datetime) -> int:
    return round(moment.timestamp() * 1000)


def _slot_share(measured: Measured, cores_own: float | None, slots: int) -> float | None:
    cores = min(measured.cores, cores_own or measured.cores)
    if measured.flops_per_s is None or not cores:
        return None
    return measured.flops_per_s * min(1.0, cores / slots)


def _kept(path: Path) -> Measured | None:
    try:
        return Measured.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None
