"""T1 and T2: what sparse contributions weigh, as payload and on the wire, beside fp32 and beside DDP in every step.

Two sites train on an emulated network, through their gateways, contributions of more than 100 MB of fp32. Counted is
everything that crosses one site's cable from before the gateways' first connection to the end of the job, in both
directions: Ethernet, IP and TCP headers, acknowledgements, TLS, HTTP, signatures. The polls by which a member learns that its
hub lives are bytes per second, not per contribution: T1 says its ratio with and without them, T2 counts them. Against it stands fp32 without any header, for T1, and what torch's DDP put on the same cable, for T2.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

from tests.benchmarks.market.figures import Figure, verdict
from tests.benchmarks.training.jobs import WORKDIR, Size, await_end, job, plain_ddp, summary
from training.lab.federation import Federation, site_names
from training.lab.link import LinkSpec
from training.lab.wan import Wan

LINK: Final = LinkSpec.parse("200mbit,20ms")
# 105 MB of fp32 in one contribution.
SIZE: Final = Size(width=656, layers=5)
PERIOD_STEPS: Final = 50
ROUNDS: Final = 2
PAYLOAD_TARGET, WIRE_TARGET, DDP_TARGET = 205, 195, 10_000
_IDLE_S: Final = 4.0


@dataclass(frozen=True, slots=True)
class Bytes:
    """The bytes of one site in a whole run, up and down together."""

    payload: int
    wire: int
    idle_per_s: float
    idle_s: float
    fp32: int
    rounds: int


def sparse_run(sites: int, rounds: int, period_steps: int, *, member: bool = False) -> Bytes:
    """Train `rounds` rounds of sparse contributions and return the bytes of the hub's site, or of a member's."""
    samples = sites * rounds * period_steps * SIZE.batch
    plan = {"strategy": "sparse", "period_steps": period_steps, "patience_s": 300}
    spec = job(SIZE, plan, samples=samples, sites=sites)
    names = site_names(sites)
    watched = 1 if member else 0
    with Wan(names, LINK, seed=1) as wan:
        running = Federation.of(spec, spec.market.sync, WORKDIR, sites=sites, seed=1, wan=wan)
        try:
            running.start_gateways()
            running.wait(_IDLE_S)
            before = _both_ways(wan, names[watched])
            running.wait(_IDLE_S)
            idle = (_both_ways(wan, names[watched]) - before) / _IDLE_S
            running.start_ranks()
            started_s = time.monotonic()
            await_end(running)
            idle_s = time.monotonic() - started_s + 2 * _IDLE_S
            wire = _both_ways(wan, names[watched])
            told = summary(running, watched)
        finally:
            running.close()
    assert told["parameters"] == SIZE.parameters, told["parameters"]
    fp32 = 4 * SIZE.parameters * told["rounds"]
    # As member: its own up, all others' down. As hub: all others' up to it, and to each member all but its own.
    contributions = sites if member or sites == 2 else (sites - 1) + (sites - 1) ** 2
    return Bytes(
        payload=contributions * told["bytes_posted"],
        wire=wire,
        idle_per_s=idle,
        idle_s=idle_s,
        fp32=contributions * fp32,
        rounds=told["rounds"],
    )


def _both_ways(wan: Wan, site: str) -> int:
    return wan.sent_bytes(site) + wan.received_bytes(site)


def measured(*, period_steps: int, more_sites: tuple[int, ...]) -> Iterator[Figure]:
    """Measure T1 and T2; a round's bytes hardly depend on the `period_steps` that are really taken before it."""
    run = sparse_run(2, ROUNDS, period_steps)
    payload, wire = run.fp32 / run.payload, run.fp32 / run.wire
    detail = {"link": str(LINK), "parameters": SIZE.parameters, "period_steps": period_steps, **asdict(run)}
    yield Figure(
        "T1",
        f"sparse against fp32 of the same {run.fp32 / 2e6:.0f} MB up and as much down, payload",
        f">= {PAYLOAD_TARGET} x",
        f"{run.payload:,} bytes",
        f"{run.fp32:,} bytes",
        f"{payload:.1f} x",
        verdict(reached=payload >= PAYLOAD_TARGET),
        detail,
    )
    exchange = run.wire - run.idle_per_s * run.idle_s
    yield Figure(
        "T1",
        "the same on the wire: Ethernet, IP, TCP, acknowledgements, handshakes, TLS, HTTP, signatures and seals",
        f">= {WIRE_TARGET} x",
        f"{exchange:,.0f} bytes",
        f"{run.fp32:,} bytes",
        f"{run.fp32 / exchange:.1f} x",
        verdict(reached=run.fp32 / exchange >= WIRE_TARGET),
        detail,
    )
    yield Figure(
        "T1",
        f"and with {run.idle_per_s:.0f} bytes/s for {run.idle_s:.0f} s, by which a member learns that its hub lives",
        "shown",
        f"{run.wire:,} bytes",
        f"{run.fp32:,} bytes",
        f"{wire:.1f} x",
        "shown",
        detail,
    )
    yield from _against_ddp(run, 2, "one site")
    for sites in more_sites:
        for member in (True, False):
            few = sparse_run(sites, 1, 2, member=member)
            yield from _against_ddp(few, sites, "a member's site" if member else "the hub's site")


def _against_ddp(run: Bytes, sites: int, whose: str) -> Iterator[Figure]:
    steps = 2
    plain = plain_ddp(SIZE, LINK, sites=sites, steps=steps)
    ours = run.wire / run.rounds
    reference = plain.wire_bytes / steps * PERIOD_STEPS
    ring = 2 * 2 * (sites - 1) / sites * 4 * SIZE.parameters
    yield Figure(
        "T2",
        f"{whose} of {sites}, {PERIOD_STEPS} steps: one sparse round against DDP in every step, both on the wire",
        f">= {DDP_TARGET:,} x" if sites == 2 else "shown",
        f"{ours:,.0f} bytes",
        f"{reference:,.0f} bytes",
        f"{reference / ours:,.0f} x",
        verdict(reached=reference / ours >= DDP_TARGET) if sites == 2 else "shown",
        {"ring_formula_bytes_per_step": ring, "measured_bytes_per_step": plain.wire_bytes / steps},
    )
