"""The Slurm driver: a run is one job of the cluster, with a warden on each of its nodes.

Slurm chooses nodes and GPUs and starts node.py once per node, which becomes the warden (warden.py) there; the folder
of the run lies on a file system that the agent's host shares with the nodes. So liveness, limits, log and exit are
the wardens' here too, and go on while slurmctld is away; Slurm's word decides where a warden could give none,
or was told from outside to end: cancelled, preempted, out of time, a node lost.

    FOLDER/run.json       the command, with words that node.py fills in; how many nodes
    FOLDER/liveness       as for any run, with bounds that hold on other hosts; and the wish to stop
    FOLDER/job.sh         what sbatch was given; slurm.log what Slurm printed
    FOLDER/node-N/        the run on one node, as its warden keeps it
    FOLDER/ended.json     how it ended, once that is known
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import tempfile
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from sites.drivers import node, rank, relay
from sites.drivers.interface import EndCause, Limits, Placement, Run, RunPhase, RunState
from sites.drivers.process import RUN_MARK, ProcessDriver, read_document, write_document
from sites.drivers.slurm_queue import Job, Look, SlurmQueue, remedy_for, sbatch_script
from sites.errors import DriverError, SlurmAwayError
from sites.settings import SlurmSettings
from training.clock import Clock

# How far the clocks of the cluster's hosts may be apart; a deadline in UTC is earlier by this.
SKEW_S: Final = 1.0
# A file that a node wrote just before its job ended may be seen a little later here.
SETTLE_S: Final = 2.0
# How long Slurm may take to say why it ended a job whose wardens were told from outside to end.
WORD_WAIT_S: Final = 60.0
# A submission whose agent died may still reach slurmctld: sbatch gives up within this.
SUBMISSION_S: Final = 15.0
STARTS_MAX: Final = 3
SUBMIT_WAIT_S: Final = 0.5
SUBMIT_AGAIN_S: Final = 5.0
CANCEL_INTERVAL_S: Final = 5.0
# Beyond a run's grace; then scancel ends what did not hear the wish to stop.
CANCEL_AFTER_S: Final = 10.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node's warden has written so far."""

    watcher: dict[str, Any] | None
    status: dict[str, Any] | None


class SlurmDriver:
    """Runs on a cluster; `local` runs what must stay on the agent's host beside them."""

    def __init__(
        self, settings: SlurmSettings, python: str, clock: Clock, local: ProcessDriver, queue: SlurmQueue | None = None
    ) -> None:
        """Start ranks with the interpreter `python`, which every node has at the same path."""
        self._settings = settings
        self._python = python
        self._clock = clock
        self._local = local
        self._queue = queue or SlurmQueue(clock)
        self._submissions: dict[Path, Future[str | None]] = {}
        self._failed_starts: dict[Path, set[str]] = {}
        self._first_s: dict[tuple[Path, str], float] = {}

    # -- the interface -------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Submit `run` unless its folder shows that it was submitted already. Raises DriverError."""
        if not self.poll(run.folder).is_over or (run.folder / "ended.json").exists():
            return
        nodes, per_node = layout(run.gpus, self._settings.gpus_per_node)
        if nodes > 1 and self._settings.fabric != "trusted":
            raise DriverError(
                f"{run.gpus} GPUs need {nodes} nodes of {self._settings.gpus_per_node}, and ranks on several nodes need "
                "the cluster's network; set slurm.fabric: trusted if its firewall lets them reach nothing else, or "
                "policy.gpus_max_per_lease to one node's GPUs"
            )
        try:
            (run.folder / "exits").mkdir(parents=True, exist_ok=True)
            self.renew(run.folder, run.deadline_s)
            relay_folder = self._start_relay(run)
            script = run.folder / "job.sh"
            script.write_text(sbatch_script(self._python, Path(node.__file__), run.folder))
            arguments = [*self._arguments(run, nodes, per_node), str(script)]
            document = self._document(run, nodes, relay_folder) | {"arguments": arguments}
            write_document(run.folder / "run.json", document)
        except OSError as error:
            raise DriverError(f"the run in {run.folder} cannot be written ({error}); check disk and memory") from error
        self._submit(run.folder, arguments)
        # Most often it is taken before this agent can die; where slurmctld is slow, nobody waits for it.
        wait([self._submissions[run.folder]], timeout=SUBMIT_WAIT_S)

    def poll(self, folder: Path) -> RunState:
        """Return the state of the run in `folder`."""
        ended = read_document(folder / "ended.json")
        if ended is not None:
            self._check_accounting(folder, ended)
            return _state(ended)
        plan = read_document(folder / "run.json")
        if plan is None:
            return RunState(RunPhase.ABSENT)
        reports = _reports(folder, plan["nodes"])
        self._report_skew(folder, reports)
        state = self._judged(folder, plan, reports)
        if state.phase in (RunPhase.ENDED, RunPhase.LOST):
            self._settle(folder, plan, state)
        elif state.phase is not RunPhase.ABSENT:
            self._keep_relay(folder, plan)
        return state

    def adopt(self, folder: Path) -> RunState:
        """Return the state of a run that a former agent submitted; its job is found by name."""
        return self.poll(folder)

    def renew(self, folder: Path, deadline_s: float) -> None:
        """Let the run in `folder` live until `deadline_s` on this host's monotonic clock."""
        remaining_s = deadline_s - self._clock.monotonic_s()
        document = {
            "era": self._clock.era(),
            "deadline_s": deadline_s,
            "remaining_s": remaining_s,
            "until_ms": self._clock.now_ms() + round((remaining_s - SKEW_S) * 1000),
            "stop": self._is_stopped(folder),
        }
        write_document(folder / "liveness", document)
        if self._relay_number(folder):
            self._local.renew(self._relay_run(folder), deadline_s)

    def stop(self, folder: Path) -> None:
        """Ask the wardens for the end of the run, and Slurm where it has not started or they do not hear."""
        if not (folder / "run.json").exists() or (folder / "ended.json").exists():
            return
        self._tell_wardens_to_stop(folder)
        plan = read_document(folder / "run.json") or {}
        job = self._job(folder)[0]
        overdue_s = float(plan.get("grace_s", 0.0)) + CANCEL_AFTER_S
        if (job is not None and not _has_started(folder, plan)) or self._since_s(folder, "stop") > overdue_s:
            self._cancel(folder)

    def placement(self, gpu_ids: tuple[str, ...], gateway_socket: Path) -> Placement:
        """Return marks for the GPUs that Slurm will choose, and the socket that a relay opens on each node."""
        ranks_socket = gateway_socket
        if self._settings.gateway_host is not None:
            name = hashlib.sha256(os.fsencode(gateway_socket)).hexdigest()[:16]
            ranks_socket = Path(tempfile.gettempdir()) / f"hansa-node-{name}" / "ranks.sock"
        nodes, _ = layout(len(gpu_ids), self._settings.gpus_per_node)
        return Placement((node.GPU,), network=nodes > 1, ranks_socket=ranks_socket)

    def ranks_argv(self, gpus: int, words: list[str], folder: Path) -> tuple[str, ...]:
        """Return the torchrun command of each node for `gpus` ranks of the script and arguments in `words`."""
        nodes, per_node = layout(gpus, self._settings.gpus_per_node)
        return (
            *(self._python, "-P", "-m", "torch.distributed.run"),
            *(
                "--nnodes",
                str(nodes),
                "--node-rank",
                node.NODE,
                "--nproc-per-node",
                str(per_node),
                "--max-restarts",
                "0",
            ),
            *("--master-addr", node.ADDRESS, "--master-port", node.PORT),
            "--no-python",
            *(self._python, "-I", "-S", rank.__file__, str(folder / "exits" / f"node-{node.NODE}")),
            *(self._python, "-P", "-m", "training.launch", *words),
        )

    # -- what is known -------------------------------------------------------------------------

    def _judged(self, folder: Path, plan: dict[str, Any], reports: tuple[NodeReport, ...]) -> RunState:
        """Return the state that files and queue together show."""
        statuses = [report.status for report in reports if report.status is not None]
        if len(statuses) == len(reports):
            return self._concluded(folder, reports, statuses)
        if any(not _went_well(status) for status in statuses):
            self._tell_wardens_to_stop(folder)  # one node's failure is the run's
        state = self._of_submission(folder, plan)
        if state is not None:
            return state
        job, is_missing = self._job(folder)
        if job is not None and job.is_terminal:
            phase = RunPhase.RUNNING if _has_started(folder, plan) else RunPhase.STARTING
            if self._since_s(folder, "terminal") < SETTLE_S:
                return RunState(phase, running_s=self._running_s(reports, job))
            if self._submitted_again(folder, plan, job):
                return RunState(RunPhase.STARTING, detail=f"Slurm could not start it as job {job.job_id}; tried again")
            return _end_by_slurm(job, self._running_s(reports, job), stopped=self._is_stopped(folder))
        if is_missing:
            return self._missing(folder, plan, reports)
        self._first_s.pop((folder, "missing"), None)
        if any(report.watcher and report.watcher["started_s"] is not None for report in reports):
            return RunState(RunPhase.RUNNING, running_s=self._running_s(reports, job))
        waiting_for = f"waits in Slurm's queue: {job.reason}" if job is not None else self._queue.trouble
        return RunState(RunPhase.STARTING, detail=waiting_for)

    def _concluded(self, folder: Path, reports: tuple[NodeReport, ...], statuses: list[dict[str, Any]]) -> RunState:
        """Return how a run ended whose wardens have all said their last word."""
        job, is_missing = self._job(folder)
        running_s = self._running_s(reports, job)
        if any(status["asked"] for status in statuses) and not all(_went_well(status) for status in statuses):
            # Someone other than this agent ended it, so why is for Slurm to say.
            if job is not None and job.is_terminal:
                return _end_by_slurm(job, running_s, stopped=self._is_stopped(folder))
            if not is_missing and self._since_s(folder, "word") < WORD_WAIT_S:
                return RunState(RunPhase.RUNNING, running_s=running_s)
            return RunState(RunPhase.LOST, running_s=running_s, detail="its processes were ended from outside")
        decisive = min(statuses, key=lambda status: (_went_well(status), status["ended_ms"]))
        return RunState(
            RunPhase.ENDED,
            cause=EndCause(decisive["cause"]),
            exit_code=decisive["exit_code"],
            detail=decisive["detail"],
            running_s=running_s,
            limit=decisive["limit"],
        )

    def _of_submission(self, folder: Path, plan: dict[str, Any]) -> RunState | None:
        """Return the state of a run whose submission is under way or failed, None once Slurm has the job."""
        submission = self._submissions.get(folder)
        if submission is None:
            return None
        if not submission.done():
            return RunState(RunPhase.STARTING, detail="is being submitted to Slurm")
        error = submission.exception()
        if isinstance(error, DriverError):
            if self._job(folder)[0] is not None:
                return None  # it was taken, and the answer lost
            if isinstance(error, SlurmAwayError):
                if self._since_s(folder, "refused") >= SUBMIT_AGAIN_S:
                    self._first_s.pop((folder, "refused"))
                    self._submit(folder, plan["arguments"])
                return RunState(RunPhase.STARTING, detail=str(error))
            if self._since_s(folder, "refused") < SETTLE_S:
                return RunState(RunPhase.STARTING, detail=str(error))
            return RunState(RunPhase.ENDED, cause=EndCause.NOT_STARTED, detail=str(error))
        if error is not None:
            raise error
        if submission.result() is None:
            return RunState(RunPhase.ENDED, cause=EndCause.STOPPED, detail="it was stopped before it was submitted")
        return None

    def _missing(self, folder: Path, plan: dict[str, Any], reports: tuple[NodeReport, ...]) -> RunState:
        """Return the state of a run whose job Slurm does not know: never submitted, or long forgotten."""
        age_s = self._clock.now_ms() / 1000 - plan["written_ms"] / 1000
        if folder not in self._submissions and not any(report.watcher for report in reports):
            # Clocks may have been stepped; a negative age says nothing.
            if 0 <= age_s < SUBMISSION_S:
                return RunState(RunPhase.STARTING, detail="Slurm does not know the job yet")
            return RunState(RunPhase.ABSENT)
        # Should anything of it live after all, it hears this, or does not see its liveness renewed.
        self._tell_wardens_to_stop(folder)
        running_s = self._running_s(reports, None)
        if self._since_s(folder, "missing") < float(plan["grace_s"]) + SETTLE_S:
            return RunState(RunPhase.RUNNING, running_s=running_s)
        return RunState(RunPhase.LOST, running_s=running_s, detail="Slurm does not know its job any more")

    def _job(self, folder: Path) -> tuple[Job | None, bool]:
        """Return the run's job, and whether Slurm answers that there is none."""
        name = job_name(folder)
        look: Look | None = self._queue.look(name)
        if look is None:
            return None, False
        job = look.jobs.get(name)
        if job is not None and job.job_id in self._failed_starts.get(folder, ()):
            job = None
        submission = self._submissions.get(folder)
        is_late = submission is None or (submission.done() and look.asked_s > self._done_s(folder))
        return job, job is None and is_late

    def _done_s(self, folder: Path) -> float:
        """Return when this agent first saw its submission answered: an older look cannot show the job."""
        return self._first_s.setdefault((folder, "submitted"), self._clock.monotonic_s())

    def _running_s(self, reports: tuple[NodeReport, ...], job: Job | None) -> float:
        """Return how long the longest node has run, by the wardens' stamps and never beyond Slurm's own."""
        longest_s = 0.0
        now_s, now_ms, era = self._clock.monotonic_s(), self._clock.now_ms(), self._clock.era()
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

    # -- what is done --------------------------------------------------------------------------

    def _submitted_again(self, folder: Path, plan: dict[str, Any], job: Job) -> bool:
        """Submit a run again that Slurm placed and failed to start, as after its own restart or on a broken node."""
        former = self._failed_starts.setdefault(folder, set())
        is_unstarted = job.state in ("FAILED", "NODE_FAIL", "BOOT_FAIL") and not (folder / "claim").exists()
        if not is_unstarted or not job.nodes or self._is_stopped(folder) or len(former) >= STARTS_MAX:
            return False
        _log.warning("slurm.start_failed", run=str(folder), job=job.job_id, state=job.state, nodes=job.nodes)
        former.add(job.job_id)
        del self._first_s[folder, "terminal"]
        self._first_s.pop((folder, "submitted"), None)
        self._submit(folder, plan["arguments"])
        return True

    def _submit(self, folder: Path, arguments: list[str]) -> None:
        self._submissions[folder] = self._queue.submit(arguments, lambda: not self._is_stopped(folder))

    def _arguments(self, run: Run, nodes: int, per_node: int) -> list[str]:
        settings = self._settings
        found = [f"--job-name={job_name(run.folder)}", f"--comment=hansa {run.folder.parent.parent.name}"]
        found += [f"--nodes={nodes}", "--ntasks-per-node=1", f"--chdir={run.folder}"]
        found += [f"--output={run.folder / 'slurm.log'}", "--open-mode=append"]
        if settings.partition is not None:
            found.append(f"--partition={settings.partition}")
        if settings.account is not None:
            found.append(f"--account={settings.account}")
        if run.gpus:
            found.append(f"--gres={settings.gres}:{per_node}" if settings.gres else f"--cpus-per-task={per_node}")
        if run.limits.memory_bytes is not None:
            found.append(f"--mem={max(1, run.limits.memory_bytes // nodes // 1024**2)}M")
        return [*found, *settings.extra_args]

    def _document(self, run: Run, nodes: int, relay_folder: Path | None) -> dict[str, Any]:
        limits = dataclasses.asdict(run.limits) | {"disk_folders": [str(path) for path in run.limits.disk_folders]}
        # Groups of the agent's host do not reach a node: Slurm's own hold the memory, the user's limit the processes.
        limits["processes"] = run.limits.processes or run.limits.processes_in_all
        return {
            "argv": list(run.argv),
            "cwd": str(run.cwd),
            "environment": {**run.environment, RUN_MARK: str(run.folder)},
            "log_path": str(run.log_path),
            "log_bytes_max": run.log_bytes_max,
            "timeout_s": run.timeout_s,
            "grace_s": run.grace_s,
            "limits": limits,
            "nodes": nodes,
            "era": self._clock.era(),
            "written_ms": self._clock.now_ms(),
            "socket": None if run.socket is None else str(run.socket),
            "relay": None if relay_folder is None else str(relay_folder),
            "ranks_socket": None if run.socket is None else str(self.placement(("",), run.socket).ranks_socket),
        }

    def _is_stopped(self, folder: Path) -> bool:
        return bool((read_document(folder / "liveness") or {}).get("stop"))

    def _tell_wardens_to_stop(self, folder: Path) -> None:
        liveness = read_document(folder / "liveness") or {}
        if not liveness.get("stop"):
            write_document(folder / "liveness", liveness | {"stop": True})

    def _cancel(self, folder: Path) -> None:
        now_s = self._clock.monotonic_s()
        if now_s >= self._first_s.get((folder, "cancelled"), float("-inf")) + CANCEL_INTERVAL_S:
            self._first_s[folder, "cancelled"] = now_s
            self._queue.cancel(job_name(folder))

    def _since_s(self, folder: Path, what: str) -> float:
        """Return for how long `what` has been so, as this agent has seen it."""
        now_s = self._clock.monotonic_s()
        return now_s - self._first_s.setdefault((folder, what), now_s)

    def _settle(self, folder: Path, plan: dict[str, Any], state: RunState) -> None:
        """Write down how a run ended, so that it stands when Slurm has forgotten the job."""
        _gather_logs(folder, plan)
        if plan["relay"]:
            self._local.stop(self._relay_run(folder))
        document = dataclasses.asdict(state) | {"phase": state.phase.value}
        write_document(folder / "ended.json", document | {"cause": None if state.cause is None else state.cause.value})
        self._submissions.pop(folder, None)
        self._failed_starts.pop(folder, None)
        for key in [key for key in self._first_s if key[0] == folder]:
            del self._first_s[key]

    def _check_accounting(self, folder: Path, ended: dict[str, Any]) -> None:
        """Hold what the wardens measured against Slurm's own times, once these are final; say where they differ."""
        path = folder / "accounting.json"
        if path.exists():
            return
        job, is_missing = self._job(folder)
        if job is not None and job.is_terminal:
            slurm_s = (job.ended_s or 0) - job.started_s if job.started_s and job.ended_s else 0
            wardens_s = float(ended["running_s"])
            document = {"job_id": job.job_id, "state": job.state, "nodes": job.nodes}
            write_document(path, document | {"slurm_s": slurm_s, "wardens_s": wardens_s})
            if wardens_s > slurm_s + SKEW_S + 1:
                _log.warning("slurm.accounting_differs", run=str(folder), wardens_s=wardens_s, slurm_s=slurm_s)
        if is_missing or job is None or job.is_terminal:
            self._queue.forget(job_name(folder))

    def _report_skew(self, folder: Path, reports: tuple[NodeReport, ...]) -> None:
        """Say once where a node's clock is off: its word came at once, so its stamp should be of now."""
        now_ms = self._clock.now_ms()
        for number, report in enumerate(reports):
            key = (folder, f"node-{number}")
            if report.watcher is None or key in self._first_s:
                continue
            looked_s = self._first_s.get((folder, "looked"))
            self._first_s[key] = self._clock.monotonic_s()
            skew_s = skew(
                report.watcher["written_ms"], now_ms, None if looked_s is None else self._first_s[key] - looked_s
            )
            if abs(skew_s) > SKEW_S:
                _log.warning("slurm.clock_skew", node=report.watcher["host"], skew_s=round(skew_s, 1))
        self._first_s[folder, "looked"] = self._clock.monotonic_s()

    # -- the relay, where nodes are other hosts -------------------------------------------------

    def _start_relay(self, run: Run) -> Path | None:
        """Start what takes the nodes' connections to the gateway; its folder holds the secret that they share."""
        if run.socket is None or self._settings.gateway_host is None:
            return None
        folder = run.folder / "relay"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        document = {
            "host": self._settings.gateway_host,
            "secret": secrets.token_hex(32),
            "gateway_socket": str(run.socket),
            "node_socket": str(self.placement(("",), run.socket).ranks_socket),
        }
        if not (folder / "relay.json").exists():
            write_document(folder / "relay.json", document)
        self._run_relay(folder, 1, run.deadline_s)
        return folder

    def _keep_relay(self, folder: Path, plan: dict[str, Any]) -> None:
        """Start the relay again where it died; the nodes read its new port."""
        number = self._relay_number(folder)
        if not plan["relay"] or not number or not self._local.poll(self._relay_run(folder)).is_over:
            return
        liveness = read_document(folder / "liveness") or {}
        if liveness.get("stop") or number >= RELAYS_MAX or self._since_s(folder, f"relay-{number}") < 1.0:
            return
        self._run_relay(folder / "relay", number + 1, float(liveness.get("deadline_s", 0.0)))

    def _run_relay(self, folder: Path, number: int, deadline_s: float) -> None:
        self._local.start(
            Run(
                folder=folder / str(number),
                argv=(self._python, "-I", "-S", relay.__file__, "host", str(folder)),
                cwd=folder,
                environment={"PATH": os.defpath},
                log_path=folder / "relay.log",
                deadline_s=deadline_s,
                limits=Limits(open_files=1024),
            )
        )

    def _relay_number(self, folder: Path) -> int:
        return max((int(path.name) for path in (folder / "relay").glob("[0-9]*")), default=0)

    def _relay_run(self, folder: Path) -> Path:
        return folder / "relay" / str(self._relay_number(folder))


RELAYS_MAX: Final = 20


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


def _reports(folder: Path, nodes: int) -> tuple[NodeReport, ...]:
    return tuple(
        NodeReport(
            read_document(folder / f"node-{number}" / "warden.json"),
            read_document(folder / f"node-{number}" / "status.json"),
        )
        for number in range(nodes)
    )


def _has_started(folder: Path, plan: dict[str, Any]) -> bool:
    return any(report.watcher is not None for report in _reports(folder, int(plan.get("nodes", 0))))


def _went_well(status: dict[str, Any]) -> bool:
    return bool(status["cause"] == EndCause.EXIT.value and status["exit_code"] == 0)


def _end_by_slurm(job: Job, running_s: float, *, stopped: bool) -> RunState:
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


def _state(ended: dict[str, Any]) -> RunState:
    return RunState(
        RunPhase(ended["phase"]),
        cause=None if ended["cause"] is None else EndCause(ended["cause"]),
        exit_code=ended["exit_code"],
        detail=ended["detail"],
        running_s=ended["running_s"],
        limit=ended["limit"],
    )


def _gather_logs(folder: Path, plan: dict[str, Any]) -> None:
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
