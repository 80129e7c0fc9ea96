"""Beside peers: torchft's DiLoCo and hivemind's averaging, on the same links, model, text, pace and outer step, in the same run.

Three sites of one rank each. Told of each: the stall of a round (from the last inner step until the model has the merged
parameters), the bytes that a site sends in a round (all that leaves its cable, the mean of the three), and what happens when
a site's processes are killed between two rounds: the longest stall of a survivor, and how many sites its later rounds had.
Hansa and hivemind are told to give a lost site up after a second or two, torchft after its own five. torchft sends no codec but fp32 on CPUs and no encryption; hivemind
sends fp16 over TLS or Noise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.market.figures import Figure
from tests.benchmarks.training.jobs import WORKDIR, Size, job, rounds
from training.lab.errors import LabError
from training.lab.federation import Federation, read_rows, site_names
from training.lab.link import LinkSpec
from training.lab.wan import Wan
from training.spec import Codec

LINK: Final = LinkSpec.parse("100mbit,20ms")
SIZE: Final = Size(width=192, layers=3)
SITES: Final = 3
PERIOD_STEPS: Final = 5
STEP_S: Final = 0.2
WARM_ROUNDS, ROUNDS_BEFORE, ROUNDS_AFTER = 2, 6, 4
# A round's, and the start's: on a busy machine a site takes minutes to import torch and its peer.
_LIMIT_S, _START_LIMIT_S = 300.0, 900.0
_LOG_TAIL: Final = 1500
_ASK_S: Final = 0.02
PEERS: Final = {
    "torchft": ("torchft_diloco.py", "DiLoCo, fp32"),
    "hivemind": ("hivemind_averaging.py", "averager, fp16"),
}


@dataclass(frozen=True, slots=True)
class Contest:
    """What one contestant did."""

    stall_s: float
    sent_bytes: float
    killed_stall_s: float
    members_before: tuple[int, ...]
    members_after: tuple[int, ...]

    @property
    def went_on(self) -> str:
        """Say how many rounds of the survivors had how many sites."""
        return self._merged(self.members_after)

    @property
    def ran(self) -> str:
        """Say the same of all sites' rounds before the kill: what was not merged also was not sent."""
        return self._merged(self.members_before)

    def _merged(self, members: tuple[int, ...]) -> str:
        merged = [each for each in members if each]
        return f"{len(merged)} of {len(members)} rounds merged, of {min(merged, default=0)} to {max(merged, default=0)} sites"


@dataclass(slots=True)
class _Watch:
    """Follows rounds as the sites tell them, takes the bytes between two of them, and has a site killed."""

    wan: Wan
    rows: Callable[[int], list[dict[str, Any]]]
    check: Callable[[int], None]
    kill: Callable[[], None]
    log: Callable[[], str]

    def contest(self) -> Contest:
        self._await(range(SITES), lambda site: len(self.rows(site)) >= WARM_ROUNDS, _START_LIMIT_S)
        before = self._sent()
        self._await(range(SITES), lambda site: len(self.rows(site)) >= ROUNDS_BEFORE)
        sent_bytes = (self._sent() - before) / SITES / (ROUNDS_BEFORE - WARM_ROUNDS)
        usual = [row for site in range(SITES) for row in self.rows(site)[WARM_ROUNDS:ROUNDS_BEFORE]]
        self.kill()
        killed_ms = time.time() * 1000
        survivors = range(SITES - 1)
        self._await(survivors, lambda site: len(self._since(site, killed_ms)) >= ROUNDS_AFTER)
        after = [row for site in survivors for row in self._since(site, killed_ms)[:ROUNDS_AFTER]]
        return Contest(
            stall_s=statistics.median(row["stall_s"] for row in usual),
            sent_bytes=sent_bytes,
            killed_stall_s=max(row["stall_s"] for row in after),
            members_before=tuple(int(row["members"]) for row in usual),
            members_after=tuple(int(row["members"]) for row in after),
        )

    def _await(self, sites: range, is_there: Callable[[int], bool], limit_s: float = _LIMIT_S) -> None:
        pause, deadline_s = threading.Event(), time.monotonic() + limit_s
        while not all(is_there(site) for site in sites):
            for site in sites:
                self.check(site)
            if time.monotonic() > deadline_s:
                told = [len(self.rows(each)) for each in sites]
                raise LabError(f"no further round within {limit_s:g} s; rounds so far: {told}; {self.log()}")
            pause.wait(_ASK_S)

    def _sent(self) -> int:
        return sum(self.wan.sent_bytes(name) for name in site_names(SITES))

    def _since(self, site: int, moment_ms: float) -> list[dict[str, Any]]:
        return [row for row in self.rows(site) if row["time_ms"] >= moment_ms]


def hansa(codec: Codec) -> Contest:
    """Run Hansa's own: any two of the three sites and a second's grace seal a round."""
    samples = 400 * SITES * PERIOD_STEPS * SIZE.batch
    plan = {"strategy": "quorum", "quorum_sites": 2, "period_steps": PERIOD_STEPS, "patience_s": 60, "codec": codec}
    spec = job(SIZE, plan, samples=samples, sites=SITES, STEP_S=STEP_S)
    with (
        Wan(site_names(SITES), LINK, seed=1) as wan,
        Federation.of(spec, spec.market.sync, WORKDIR, sites=SITES, seed=1, wan=wan) as running,
    ):

        def rows(site: int) -> list[dict[str, Any]]:
            told = [{"stall_s": 0.0}, *rounds(running, site)]
            return [
                {**later, "stall_s": later["stall_s"] - earlier["stall_s"], "members": later["sites_merged"]}
                for earlier, later in pairwise(told)
            ]

        def check(site: int) -> None:
            if any(rank.poll() is not None for rank in running.sites[site].ranks):
                raise LabError(running.sites[site].log_tail())

        def kill() -> None:
            lost = running.sites[SITES - 1]
            for process in (*lost.ranks, lost.gateway):
                assert process is not None
                process.kill()

        return _Watch(wan, rows, check, kill, running.sites[0].log_tail).contest()


def peer(script: str) -> Contest:
    """Run a peer's script at every site. Raises LabError where one of them ends."""
    names = site_names(SITES)
    with (
        tempfile.TemporaryDirectory() as folder,
        Wan(names, LINK, seed=1) as wan,
        contextlib.ExitStack() as stack,
    ):
        home = Path(folder)
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(lambda: [_end(each) for each in processes])
        for site, name in enumerate(names):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **SIZE.environment(SITE=site, SITES=SITES, PERIOD_STEPS=PERIOD_STEPS, STEP_S=STEP_S, BATCH=SIZE.batch),
                "ADDRESS": wan.address(name),
                "RENDEZVOUS": folder,
                "GLOO_SOCKET_IFNAME": wan.cable(name),
            }
            log = stack.enter_context((home / f"log-{site}").open("wb"))
            command = (sys.executable, str(WORKDIR / script))
            processes.append(wan.start(name, command, environment=environment, output=log))

        def check(site: int) -> None:
            if processes[site].poll() is not None:
                raise LabError(f"site {site} ended: {(home / f'log-{site}').read_text(errors='replace')[-_LOG_TAIL:]}")

        def kill() -> None:
            _end(processes[SITES - 1])

        def rows(site: int) -> list[dict[str, Any]]:
            return read_rows(home / f"rounds-{site}.jsonl")

        def log() -> str:
            return (home / "log-0").read_text(errors="replace")[-_LOG_TAIL:]

        return _Watch(wan, rows, check, kill, log).contest()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a site's script and all that it started: it leads a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measured() -> Iterator[Figure]:
    """Measure each peer that is installed beside Hansa; say of the others that they are not."""
    here = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    for name in PEERS.keys() - here:
        why = f"not installed for Python {sys.version_info.major}.{sys.version_info.minor}; pip install 'hansa[training-peers]'"
        yield Figure("peers", f"{name}, left out", "", "", why, "", "shown", {})
    if not here:
        return
    own = {codec: hansa(codec) for codec in ("fp32", "int8")}
    for name in here:
        script, what = PEERS[name]
        theirs = peer(script)
        yield from _rows(own, theirs, f"{name} {version(name)} {what}")


def _rows(own: dict[Codec, Contest], theirs: Contest, name: str) -> Iterator[Figure]:
    fp32, int8 = own["fp32"], own["int8"]
    load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    detail = {"link": str(LINK), "parameters": SIZE.parameters, "theirs": asdict(theirs)}
    detail |= {f"hansa_{codec}": asdict(each) for codec, each in own.items()}
    rows = (
        (
            f"stall of a round of {SIZE.parameters:,} parameters on {LINK}, Hansa quorum int8 (fp32); {load}",
            f"{int8.stall_s:.2f} s ({fp32.stall_s:.2f})",
            f"{theirs.stall_s:.2f} s",
            theirs.stall_s / int8.stall_s,
        ),
        (
            f"bytes that a site sends in a round, on the wire, int8 (fp32): {int8.ran}; theirs: {theirs.ran}",
            f"{int8.sent_bytes:,.0f} ({fp32.sent_bytes:,.0f})",
            f"{theirs.sent_bytes:,.0f}",
            theirs.sent_bytes / int8.sent_bytes,
        ),
        (
            f"longest stall when a site is killed: {int8.went_on}; theirs: {theirs.went_on}",
            f"{int8.killed_stall_s:.2f} s ({fp32.killed_stall_s:.2f})",
            f"{theirs.killed_stall_s:.2f} s",
            theirs.killed_stall_s / int8.killed_stall_s,
        ),
    )
    for what, ours, reference, ratio in rows:
        yield Figure("peers", f"{name}: {what}", "shown", ours, reference, f"{ratio:.1f} x", "shown", detail)
