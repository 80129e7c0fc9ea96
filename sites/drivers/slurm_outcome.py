"""What became of a run on a cluster: the wardens' words and Slurm's, and what they mean together. Mostly pure."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sites.drivers.interface import EndCause, RunPhase, RunState
from sites.drivers.process import read_document
from sites.drivers.slurm_queue import Job, remedy_for
from training.clock import Clock

# How far the clocks of the cluster's hosts may be apart; a deadline in UTC is earlier by this.
SKEW_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node's warden has written so far."""

    watcher: dict[str, Any] | None
    status: dict[str, Any] | None


def layout(gpus: int, gpus_per_node: int) -> tuple[int, int]:
    """Return on how many nodes, and how many on each, `gpus` GPUs are: the fewest nodes that share them evenly."""
    if gpus == 0:
        return 1, 0
    nodes = next(count for count in range(1, gpus + 1) if gpus % count == 0 and gpus // count <= gpus_per_node)
    return nodes, gpus // nodes


def job_name(folder: Path) -> str:
    """Return the name of a run's job: found again by it, and the same for no other run."""
    return f"hansa-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}"


def skew(written_ms: int, now_ms: int, looked_ago_s: float | None) -> float:
    """Return by how many seconds a node's clock is ahead, as far as a stamp read now can tell.

    A stamp of the future tells it for certain; one of the past only as far as it is older than the last look.
    """
    ahead_s = (written_ms - now_ms) / 1000
    if ahead_s >= 0 or looked_ago_s is None:
        return max(0.0, ahead_s)
    return min(0.0, ahead_s + looked_ago_s)


def running_s(reports: tuple[NodeReport, ...], job: Job | None, clock: Clock) -> float:
    """Return how long the longest node has run, by the wardens' stamps and never beyond Slurm's own."""
    longest_s = 0.0
    now_s, now_ms, era = clock.monotonic_s(), clock.now_ms(), clock.era()
    for report in reports:
        if report.status is not None:
            longest_s = max(longest_s, float(report.status["running_s"]))
        elif report.watcher is not None and report.watcher["started_s"] is not None:
            watcher = report.watcher
            if watcher["era"] == era:
                longest_s = max(longest_s, now_s - watcher["started_s"])
            else:
                longest_s = max(longest_s, (now_ms - watcher["started_ms"]) / 1000 - SKEW_S)
    if job is not None and job.started_s is not None:
        ended_s = job.ended_s if job.is_terminal and job.ended_s is not None else now_ms / 1000
        # Slurm counts whole seconds.
        longest_s = min(longest_s, max(0.0, ended_s - job.started_s + SKEW_S))
    return longest_s


def reports_in(folder: Path, nodes: int) -> tuple[NodeReport, ...]:
    """Return what the wardens of all nodes have written."""
    return tuple(
        NodeReport(
            read_document(folder / f"node-{number}" / "warden.json"),
            read_document(folder / f"node-{number}" / "status.json"),
        )
        for number in range(nodes)
    )


def has_started(folder: Path, plan: dict[str, Any]) -> bool:
    """Return whether a warden was at work on any node."""
    return any(report.watcher is not None for report in reports_in(folder, int(plan.get("nodes", 0))))


def went_well(status: dict[str, Any]) -> bool:
    """Return whether a node's command ended by itself, with nought."""
    return bool(status["cause"] == EndCause.EXIT.value and status["exit_code"] == 0)


def end_by_slurm(job: Job, running_s: float, *, stopped: bool) -> RunState:
    """Return how a run ended that Slurm ended, or whose wardens died without a word."""
    if stopped and job.state == "CANCELLED":
        return RunState(RunPhase.ENDED, cause=EndCause.STOPPED, running_s=running_s)
    if job.state in ("TIMEOUT", "DEADLINE"):
        detail = f"Slurm's time limit ended job {job.job_id}; ask for more in slurm.extra_args or the partition"
        return RunState(RunPhase.ENDED, cause=EndCause.TIMEOUT, running_s=running_s, detail=detail)
    if job.state == "OUT_OF_MEMORY":
        detail = "the run needed more memory than Slurm granted its job"
        return RunState(RunPhase.ENDED, cause=EndCause.LIMIT, running_s=running_s, detail=detail, limit="memory")
    if job.state == "FAILED" and not job.nodes:
        detail = f"Slurm cannot place job {job.job_id} ({job.reason}): {remedy_for('requested node configuration is not available')}"
        return RunState(RunPhase.ENDED, cause=EndCause.NOT_STARTED, detail=detail)
    words = f"Slurm says of job {job.job_id} on {job.nodes or 'no node'}: {job.state} ({job.reason})"
    return RunState(RunPhase.LOST, running_s=running_s, detail=words)


def state_of(ended: dict[str, Any]) -> RunState:
    """Return the state that was written down when the run ended."""
    return RunState(
        RunPhase(ended["phase"]),
        cause=None if ended["cause"] is None else EndCause(ended["cause"]),
        exit_code=ended["exit_code"],
        detail=ended["detail"],
        running_s=ended["running_s"],
        limit=ended["limit"],
    )


def gather_logs(folder: Path, plan: dict[str, Any]) -> None:
    """Put what ranks of the further nodes printed behind node 0's log, within the log's limit."""
    for number in range(1, plan["nodes"]):
        path = folder / f"node-{number}" / "output.log"
        target = Path(plan["log_path"])
        if not path.exists() or path.stat().st_size == 0:
            continue
        with path.open("rb") as source, target.open("ab") as log:
            left = plan["log_bytes_max"] - log.tell()
            if left > 0:
                log.write(f"[hansa] node {number} printed:\n".encode() + source.read(left))


def cluster_gpus(told: str) -> dict[str, int]:
    """Return the GPUs of each node in what `sinfo --noheader --Node --format='%N|%G'` printed."""
    found: dict[str, int] = {}
    for line in told.splitlines():
        name, _, gres = line.partition("|")
        count = 0
        for word in gres.split(","):
            parts = word.partition("(")[0].split(":")
            if parts[0] == "gpu" and parts[-1].isdigit():
                count += int(parts[-1])
        found[name.strip()] = count
    return found
