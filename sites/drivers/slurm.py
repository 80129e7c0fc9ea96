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
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Final

import structlog

from sites.drivers import node, rank
from sites.drivers.interface import EndCause, Placement, Run, RunPhase, RunState
from sites.drivers.process import RUN_MARK, ProcessDriver, read_document, write_document
from sites.drivers.slurm_outcome import (
    SKEW_S,
    NodeReport,
    end_by_slurm,
    gather_logs,
    has_started,
    job_name,
    layout,
    reports_in,
    running_s,
    skew,
    state_of,
    went_well,
)
from sites.drivers.slurm_queue import Job, Look, SlurmQueue, sbatch_script
from sites.drivers.slurm_relay import Relays
from sites.errors import DriverError, SlurmAwayError
from sites.settings import SlurmSettings
from training.clock import Clock

# A file that a node wrote just before its job ended may be seen a little later here.
SETTLE_S: Final = 2.0
# How long Slurm may take to say why it ended a job whose wardens were told from outside to end.
WORD_WAIT_S: Final = 60.0
# A submission whose agent died may still reach slurmctld: sbatch gives up within this.
SUBMISSION_S: Final = 15.0
STARTS_MAX: Final = 3
SUBMIT_WAIT_S: Final = 0.5
SUBMIT_AGAIN_S: Final = 5.0
RELAY_INTERVAL_S: Final = 1.0
CANCEL_INTERVAL_S: Final = 5.0
# Beyond a run's grace; then scancel ends what did not hear the wish to stop.
CANCEL_AFTER_S: Final = 10.0

_log = structlog.get_logger(__name__)


class SlurmDriver:
    """Runs on a cluster; `local` runs what must stay on the agent's host beside them."""

    def __init__(
        self, settings: SlurmSettings, python: str, clock: Clock, local: ProcessDriver, queue: SlurmQueue | None = None
    ) -> None:
        """Start ranks with the interpreter `python`, which every node has at the same path."""
        self._settings = settings
        self._python = python
        self._clock = clock
        self._relays = Relays(local, python, settings.gateway_host)
        self._queue = queue or SlurmQueue(clock)
        self._submissions: dict[Path, Future[str | None]] = {}
        self._failed_starts: dict[Path, set[str]] = {}
        self._first_s: dict[tuple[Path, str], float] = {}

    # -- the interface -------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Submit `run` unless its folder shows that it was submitted already. Raises DriverError."""
        if not self.poll(run.folder).is_over or (run.folder / "ended.json").exists():
            return
        if run.secrets:
            raise DriverError("a job's secrets are not handed to a cluster's nodes; such jobs belong on other sites")
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
            relay_folder = self._relays.start(run)
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
            return state_of(ended)
        plan = read_document(folder / "run.json")
        if plan is None:
            return RunState(RunPhase.ABSENT)
        reports = reports_in(folder, plan["nodes"])
        self._report_skew(folder, reports)
        state = self._judged(folder, plan, reports)
        if state.phase in (RunPhase.ENDED, RunPhase.LOST):
            self._settle(folder, plan, state)
        elif state.phase is not RunPhase.ABSENT:
            self._keep_relay(folder)
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
        self._relays.renew(folder, deadline_s)

    def stop(self, folder: Path) -> None:
        """Ask the wardens for the end of the run, and Slurm where it has not started or they do not hear."""
        if not (folder / "run.json").exists() or (folder / "ended.json").exists():
            return
        self._tell_wardens_to_stop(folder)
        plan = read_document(folder / "run.json") or {}
        job = self._job(folder)[0]
        overdue_s = float(plan.get("grace_s", 0.0)) + CANCEL_AFTER_S
        if (job is not None and not has_started(folder, plan)) or self._since_s(folder, "stop") > overdue_s:
            self._cancel(folder)

    def placement(self, gpu_ids: tuple[str, ...], gateway_socket: Path) -> Placement:
        """Return marks for the GPUs that Slurm will choose, and the socket that a relay opens on each node."""
        nodes, _ = layout(len(gpu_ids), self._settings.gpus_per_node)
        return Placement((node.GPU,), network=nodes > 1, ranks_socket=self._relays.ranks_socket(gateway_socket))

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
        if any(not went_well(status) for status in statuses):
            self._tell_wardens_to_stop(folder)  # one node's failure is the run's
        return self._of_submission(folder, plan) or self._by_queue(folder, plan, reports)

    def _by_queue(self, folder: Path, plan: dict[str, Any], reports: tuple[NodeReport, ...]) -> RunState:
        """Return the state of a submitted run of which some warden has not said its last word."""
        job, is_missing = self._job(folder)
        if job is not None and job.is_terminal:
            return self._terminal(folder, plan, reports, job)
        if is_missing:
            return self._missing(folder, plan, reports)
        self._first_s.pop((folder, "missing"), None)
        if any(report.watcher and report.watcher["started_s"] is not None for report in reports):
            return RunState(RunPhase.RUNNING, running_s=running_s(reports, job, self._clock))
        waiting_for = f"waits in Slurm's queue: {job.reason}" if job is not None else self._queue.trouble
        return RunState(RunPhase.STARTING, detail=waiting_for)

    def _terminal(self, folder: Path, plan: dict[str, Any], reports: tuple[NodeReport, ...], job: Job) -> RunState:
        """Return how a run ended of which Slurm says that nothing lives, though not all wardens said so."""
        lasted_s = running_s(reports, job, self._clock)
        if self._since_s(folder, "terminal") < SETTLE_S:
            phase = RunPhase.RUNNING if has_started(folder, plan) else RunPhase.STARTING
            return RunState(phase, running_s=lasted_s)
        if self._submitted_again(folder, plan, job):
            return RunState(RunPhase.STARTING, detail=f"Slurm could not start it as job {job.job_id}; tried again")
        return end_by_slurm(job, lasted_s, stopped=self._is_stopped(folder))

    def _concluded(self, folder: Path, reports: tuple[NodeReport, ...], statuses: list[dict[str, Any]]) -> RunState:
        """Return how a run ended whose wardens have all said their last word."""
        job, is_missing = self._job(folder)
        lasted_s = running_s(reports, job, self._clock)
        if any(status["asked"] for status in statuses) and not all(went_well(status) for status in statuses):
            # Someone other than this agent ended it, so why is for Slurm to say.
            if job is not None and job.is_terminal:
                return end_by_slurm(job, lasted_s, stopped=self._is_stopped(folder))
            if not is_missing and self._since_s(folder, "word") < WORD_WAIT_S:
                return RunState(RunPhase.RUNNING, running_s=lasted_s)
            return RunState(RunPhase.LOST, running_s=lasted_s, detail="its processes were ended from outside")
        decisive = min(statuses, key=lambda status: (went_well(status), status["ended_ms"]))
        return RunState(
            RunPhase.ENDED,
            cause=EndCause(decisive["cause"]),
            exit_code=decisive["exit_code"],
            detail=decisive["detail"],
            running_s=lasted_s,
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
            # Known all the same: it was taken, and the answer lost.
            return None if self._job(folder)[0] is not None else self._refused(folder, plan, error)
        if error is not None:
            raise error
        if submission.result() is None:
            return RunState(RunPhase.ENDED, cause=EndCause.STOPPED, detail="it was stopped before it was submitted")
        return None

    def _refused(self, folder: Path, plan: dict[str, Any], error: DriverError) -> RunState:
        """Return the state of a run that Slurm refused, or did not hear of: then it is submitted again."""
        if not isinstance(error, SlurmAwayError):
            return RunState(RunPhase.ENDED, cause=EndCause.NOT_STARTED, detail=str(error))
        if self._since_s(folder, "refused") >= SUBMIT_AGAIN_S:
            self._first_s.pop((folder, "refused"))
            self._submit(folder, plan["arguments"])
        return RunState(RunPhase.STARTING, detail=str(error))

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
        lasted_s = running_s(reports, None, self._clock)
        if self._since_s(folder, "missing") < float(plan["grace_s"]) + SETTLE_S:
            return RunState(RunPhase.RUNNING, running_s=lasted_s)
        return RunState(RunPhase.LOST, running_s=lasted_s, detail="Slurm does not know its job any more")

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
            "ranks_socket": None if run.socket is None else str(self._relays.ranks_socket(run.socket)),
        }

    def _keep_relay(self, folder: Path) -> None:
        liveness = read_document(folder / "liveness") or {}
        if not liveness.get("stop") and self._since_s(folder, "relay") >= RELAY_INTERVAL_S:
            self._first_s.pop((folder, "relay"))
            self._relays.keep(folder, float(liveness.get("deadline_s", 0.0)))

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
        gather_logs(folder, plan)
        self._relays.stop(folder)
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
