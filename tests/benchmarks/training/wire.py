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
from tests.benchmarks.training.jobs import WORKDIR, PlainRun, Size, await_end, job, plain_ddp, summary
from training.lab.federation import Federation, site_names
from training.lab.link import LinkSpec
from training.lab.wan import Wan

LINK: Final = LinkSpec.parse("200mbit,20ms")
# 105 MB of fp32 in one contribution.
SIZE: Final = Size(width=656, layers=5)
PERIOD_STEPS: Final = 50
ROUNDS: Final = 2
PAYLOAD_TARGET, WIRE_TARGET, DDP_TARGET = 205, 195, 10_000
# Small enough that two hundred steps of both sites take a minute or two, large enough that its contribution outweighs its headers.
WHOLE_SIZE: Final = Size(width=320, layers=4)
WHOLE_ROUNDS: Final = 4
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


def sparse_run(sites: int, rounds: int, period_steps: int, size: Size = SIZE) -> dict[str, Bytes]:
    """Train `rounds` rounds of sparse contributions and return the bytes of the hub's site and of a member's."""
    samples = sites * rounds * period_steps * size.batch
    plan = {"strategy": "sparse", "period_steps": period_steps, "patience_s": 600}
    spec = job(size, plan, samples=samples, sites=sites)
    names = site_names(sites)
    watched = {"the hub's site": 0, "a member's site": 1}
    with Wan(names, LINK, seed=1) as wan:
        running = Federation.of(spec, spec.market.sync, WORKDIR, sites=sites, seed=1, wan=wan)
        try:
            running.start_gateways()
            running.wait(_IDLE_S)
            before = {whose: _both_ways(wan, names[site]) for whose, site in watched.items()}
            running.wait(_IDLE_S)
            idle = {whose: (_both_ways(wan, names[site]) - before[whose]) / _IDLE_S for whose, site in watched.items()}
            running.start_ranks()
            started_s = time.monotonic()
            await_end(running)
            idle_s = time.monotonic() - started_s + 2 * _IDLE_S
            wire = {whose: _both_ways(wan, names[site]) for whose, site in watched.items()}
            told = {whose: summary(running, site) for whose, site in watched.items()}
        finally:
            running.close()
    found = {}
    for whose, site in watched.items():
        assert told[whose]["parameters"] == size.parameters, told[whose]["parameters"]
        # As member: its own up, all others' down. As hub: all others' up to it, and to each member all but its own.
        contributions = sites if site or sites == 2 else (sites - 1) + (sites - 1) ** 2
        found[whose] = Bytes(
            payload=contributions * told[whose]["bytes_posted"],
            wire=wire[whose],
            idle_per_s=idle[whose],
            idle_s=idle_s,
            fp32=contributions * 4 * size.parameters * told[whose]["rounds"],
            rounds=told[whose]["rounds"],
        )
    return found


def _both_ways(wan: Wan, site: str) -> int:
    return wan.sent_bytes(site) + wan.received_bytes(site)


def measured(*, period_steps: int, more_sites: tuple[int, ...]) -> Iterator[Figure]:
    """Measure T1 and T2; a round's bytes hardly depend on the `period_steps` that are really taken before it."""
    run = sparse_run(2, ROUNDS, period_steps)["the hub's site"]
    yield from _against_fp32(run, "one site of 2", f"{period_steps} steps before each of {run.rounds} rounds")
    yield from _against_ddp(run, 2, "one site", size=SIZE, taken_steps=period_steps)
    for sites in more_sites:
        steps = 2
        plain = plain_ddp(SIZE, LINK, sites=sites, steps=steps)
        for whose, few in sparse_run(sites, 1, steps).items():
            yield from _against_fp32(few, f"{whose} of {sites}", f"{steps} steps before one round", is_target=False)
            yield from _against_ddp(few, sites, whose, size=SIZE, taken_steps=steps, plain=plain)


def whole_periods() -> Iterator[Figure]:
    """Measure T2 once more with all fifty steps really taken before every round, of a model small enough for it."""
    run = sparse_run(2, WHOLE_ROUNDS, PERIOD_STEPS, WHOLE_SIZE)["the hub's site"]
    yield from _against_fp32(
        run, "one site of 2", f"{PERIOD_STEPS} steps before each of {run.rounds} rounds", is_target=False
    )
    yield from _against_ddp(run, 2, "one site", size=WHOLE_SIZE, taken_steps=PERIOD_STEPS)


def _against_fp32(run: Bytes, whose: str, steps: str, *, is_target: bool = True) -> Iterator[Figure]:
    """Yield T1: payload, what carries it, and all that crossed the cable."""
    detail = {"link": str(LINK), "steps": steps, **asdict(run)}
    exchange = run.wire - run.idle_per_s * run.idle_s
    rows = (
        (f"{whose}, {steps}: sparse payload against fp32", run.payload, PAYLOAD_TARGET),
        ("the same on the wire: Ethernet, IP, TCP, handshakes, TLS, HTTP, signatures, seals", exchange, WIRE_TARGET),
        (
            f"and with {run.idle_per_s:.0f} bytes/s for {run.idle_s:.0f} s, by which sites learn that the hub lives",
            run.wire,
            None,
        ),
    )
    for what, sent, target in rows:
        ratio = run.fp32 / sent
        counts = is_target and target is not None
        yield Figure(
            "T1",
            what,
            f">= {target} x" if counts else "shown",
            f"{sent:,.0f} bytes",
            f"{run.fp32:,} bytes",
            f"{ratio:.1f} x",
            verdict(reached=ratio >= target) if counts and target is not None else "shown",
            detail,
        )


def _against_ddp(
    run: Bytes, sites: int, whose: str, *, size: Size, taken_steps: int, plain: PlainRun | None = None
) -> Iterator[Figure]:
    steps = 2
    plain = plain or plain_ddp(size, LINK, sites=sites, steps=steps)
    ours = run.wire / run.rounds
    reference = plain.wire_bytes / steps * PERIOD_STEPS
    ring = 2 * 2 * (sites - 1) / sites * 4 * size.parameters
    ratio, is_target = reference / ours, sites == 2 and size is SIZE
    yield Figure(
        "T2",
        f"{whose} of {sites}, {size.parameters:,} parameters: one sparse round ({taken_steps} steps taken) against "
        f"{PERIOD_STEPS} steps of DDP, both on the wire",
        f">= {DDP_TARGET:,} x" if is_target else "shown",
        f"{ours:,.0f} bytes",
        f"{reference:,.0f} bytes",
        f"{ratio:,.0f} x",
        verdict(reached=ratio >= DDP_TARGET) if is_target else "shown",
        {"ring_formula_bytes_per_step": ring, "measured_bytes_per_step": plain.wire_bytes / steps},
    )
