"""T7 and T8: a site dies and the others hardly wait; the hub's site dies and another is the hub.

T7 runs three sites under `quorum` (two of them and the grace seal a round) in the laboratory, steps paced alike, and ends
all processes of one at once. A survivor's stall is what its session reports for each round; from the longest after the death
the usual one before it is taken off, since waiting for slower sites is no fault's. An inner step is lost where neither
its round nor a later one has a contribution of its site: what misses a round travels in the next one's carry.

T8 is the market's own: broker, agents, gateways and ranks as processes (`tests.journey`). Measured is from the cut of the
power of the hub's site to the first seal under the next hub. Its floor is the product's own patience: a hub counts as
absent once both its peers and the market have not heard it for `absent_s`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

from broker.settings import Settings
from tests.benchmarks.market.figures import Figure, verdict
from tests.benchmarks.training.jobs import WORKDIR, Size, job, rounds
from tests.journey.market import running_market
from tests.journey.rows import Chain
from training.lab.errors import LabError
from training.lab.federation import Federation

SIZE: Final = Size(width=32, layers=1, batch=4)
SITES: Final = 3
PERIOD_STEPS: Final = 10
STEP_S: Final = 0.1
ROUNDS_BEFORE, ROUNDS_AFTER = 5, 5
STALL_MARGIN_S: Final = 0.2
HUB_MOVES_S: Final = 3.0
_ASK_S: Final = 0.05


def site_dies() -> Iterator[Figure]:
    """Measure T7."""
    # Far more samples than are wanted: what sites do twice at a job's end is not what is looked for.
    samples = 100 * SITES * PERIOD_STEPS * SIZE.batch
    plan = {"strategy": "quorum", "quorum_sites": 2, "period_steps": PERIOD_STEPS, "patience_s": 60, "codec": "int8"}
    spec = job(SIZE, plan, samples=samples, sites=SITES, STEP_S=STEP_S)
    with Federation.of(spec, spec.market.sync, WORKDIR, sites=SITES, seed=1) as running:
        while len(rounds(running)) < ROUNDS_BEFORE:
            running.running()
            running.wait(_ASK_S)
        lost = running.sites[2]
        for process in (*lost.ranks, lost.gateway):
            assert process is not None
            process.kill()
        died_ms = time.time() * 1000
        survivors = range(2)
        while min(len(_since(rounds(running, site), died_ms)) for site in survivors) < ROUNDS_AFTER:
            if any(rank.poll() is not None for site in survivors for rank in running.sites[site].ranks):
                raise LabError(f"a survivor ended too\n{running.sites[0].log_tail()}")
            running.wait(_ASK_S)
        rows = [rounds(running, site) for site in survivors]
    usual_s, longest_s = _stalls(rows, died_ms)
    lost_steps = PERIOD_STEPS * sum(_lost_rounds(site) for site in rows)
    grace_s = spec.market.sync.grace_s
    stall_s = longest_s - usual_s
    yield Figure(
        "T7",
        f"stall when a site dies, quorum 2 of 3, grace {grace_s:g} s (load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores)",
        f"<= {grace_s + STALL_MARGIN_S:g} s",
        f"{stall_s:.2f} s",
        f"{usual_s:.2f} s a round before, taken off",
        "",
        verdict(reached=stall_s <= grace_s + STALL_MARGIN_S),
        {"longest_s": longest_s, "usual_s": usual_s},
    )
    yield Figure(
        "T7",
        f"inner steps that the survivors lost, of {sum(int(site[-1]['step']) for site in rows)}",
        "0",
        str(lost_steps),
        f"{sum(row['missed'] for site in rows for row in site):.0f} rounds went without one of them",
        "",
        verdict(reached=lost_steps == 0),
        {"rows": rows},
    )


def _since(rows: list[dict[str, Any]], moment_ms: float) -> list[dict[str, Any]]:
    return [row for row in rows if row["time_ms"] >= moment_ms]


def _lost_rounds(rows: list[dict[str, Any]]) -> int:
    """Return the rounds that a site missed and no later one made good: what misses a round travels in the next's carry."""
    counted = [number for number, row in enumerate(rows) if not row["missed"]]
    return len(rows) - 1 - max(counted, default=-1)


def _stalls(rows: list[list[dict[str, Any]]], died_ms: float) -> tuple[float, float]:
    """Return the usual stall of a round before the death, and the longest of a survivor after it."""
    before, after = list[float](), list[float]()
    for site in rows:
        for earlier, later in pairwise(site):
            stall_s = later["stall_s"] - earlier["stall_s"]
            (before if later["time_ms"] < died_ms else after).append(stall_s)
    return statistics.median(before), max(after)


def hub_dies() -> Iterator[Figure]:
    """Measure T8."""
    settings = Settings.model_fields
    absent_s = float(settings["absent_s"].default)
    with running_market(lambda: False) as market:
        chain = Chain()
        job_id = market.submit(slots=3, seconds=24)
        market.await_rounds(job_id, 3, chain)
        view = market.issued(job_id)[-1]
        others = [member.site_id for member in view.members if member.site_id != view.hub]
        ranks = {site_id: market.ranks(site_id) for site_id in others}
        cut_s = time.monotonic()
        market.cut_power(view.hub)
        dark_s = time.monotonic() - cut_s
        market.await_true(job_id, lambda: market.issued(job_id)[-1].hub != view.hub)
        moved_s = time.monotonic() - cut_s
        moved = market.issued(job_id)[-1]
        market.await_rounds_of_others(job_id, moved.base_round + 1, view.hub, chain)
        sealed_s = time.monotonic() - cut_s
        restarted = sum(market.ranks(site_id) != ranks[site_id] for site_id in others)
    yield Figure(
        "T8",
        f"hub's site killed, next seal elsewhere (load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores, {restarted} sites restarted)",
        f"<= {HUB_MOVES_S:g} s",
        f"{sealed_s:.2f} s",
        f"of it {absent_s:g} s absent_s, all dark after {dark_s:.2f} s, new view after {moved_s:.2f} s",
        "",
        verdict(reached=sealed_s <= HUB_MOVES_S and restarted == 0),
        {"new_view_s": moved_s, "absent_s": absent_s},
    )
