"""Step 5 at the site: one attempt from its files to its end, as a machine that is stepped.

    PREPARING  files are fetched and unpacked           (a transfer thread)
    SETUP      the job's setup runs alone               (no gateway, no credentials)
    RUNNING    the gateway, and the ranks beside it
    STOPPING   the ranks are dead; what they left goes to the broker
    EXITED     reported until the broker has done with the lease; after `done` and `left` the gateway stays
               till then, because other sites may still fetch the last round from it

`step` looks at what is and moves on, at any time, by an agent that has just started too: every
phase is in the journal before anything of it is done, and every run is found again by its folder.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

from sites import metering
from sites.attempt_folder import AttemptFolder, resume_where_left, write_attempt
from sites.attempt_runs import Services, placement, ranks_run, setup_run
from sites.drivers.interface import EndCause, Run, RunPhase, RunState
from sites.endings import conclusion, conclusion_without_files
from sites.environment import own_environment
from sites.errors import BrokerConnectionError, RequestRefusedError, SiteError, StagingStoppedError
from sites.gateway import Gateway, report_of
from sites.journal import AttemptRecord
from sites.leases import Steer
from sites.preparation import Prepared, keep_setup, prepare
from sites.protocol import AttemptPhase, AttemptReport, ExitCause
from sites.secrets_in_hand import TENANTS_SECRET_CODES, SecretsInHand
from sites.shipping import Shipped, ship
from training.exchange import Leaving
from training.roundlog.control import GatewayStatus
from training.spec import DataReference, JobSpec

SHIP_INTERVAL_S: Final = 1.0
RETRY_S: Final = 2.0
# How often ranks that vanished with their watcher, as when a host loses its power, are started again under one lease.
RANKS_RUNS_MAX: Final = 4
# Trouble that has lasted for longer is no news that hurries.
HURRY_S_MAX: Final = 30.0
# How long the leavings of an attempt may take to reach the broker before its end is reported anyway.
DELIVERY_DONE_S: Final = 600.0
DELIVERY_BROKEN_S: Final = 15.0
_GB: Final = 1_000_000_000
_DETAIL_LENGTH_MAX: Final = 1000


class Attempt:
    """One attempt at this site."""

    def __init__(self, record: AttemptRecord, services: Services, listen: str | None) -> None:
        """Take up the attempt where `record` says that it stands; `listen` is its gateway's host:port."""
        self.record = record
        self.gone = False
        self._services = services
        self._listen = listen
        self._folder = AttemptFolder.of(services.settings.folder, record.key)
        self._gateway = Gateway(
            self._folder,
            services.local,
            services.clock,
            python=services.settings.python,
            environment=own_environment(services.settings.python),
        )
        self._secrets = SecretsInHand(lambda: services.broker.secrets(record.lease_id, record.epoch))
        self._preparing: Future[Prepared] | None = None
        self._shipping: Future[Shipped] | None = None
        self._retry_at_s = 0.0
        self._ship_at_s = 0.0
        if record.order is not None and not record.is_over:
            services.data.use(record.key, record.order.spec.data or ())  # an attempt that a former agent began
        self._deliver_until_s: float | None = None
        self._is_final_step = False
        self._is_delivered = False
        self._steer: Steer | None = None
        self._installed: tuple[str, int] | None = None
        self._asked_to_leave: tuple[Leaving, int] | None = None

    def step(self) -> None:
        """Do what can be done now."""
        if self.record.order is None:
            return  # a lease that never ran here: there is only its end to report
        if not self.record.is_over and self._is_expired():
            self.stop(ExitCause.EXPIRED, "the broker was not heard within the lease's liveness")
        self._collect_shipped()
        {
            AttemptPhase.PREPARING: self._prepare,
            AttemptPhase.SETUP: self._set_up,
            AttemptPhase.RUNNING: self._run,
            AttemptPhase.STOPPING: self._deliver,
            AttemptPhase.EXITED: self._linger,
        }[self.record.phase]()

    def renew(self, deadline_s: float) -> None:
        """Let the attempt live until `deadline_s` on the monotonic clock."""
        self._save(deadline_s=deadline_s, era=self._services.clock.era())
        for name in ("setup", self._ranks):
            if not self._poll(name).is_over:
                self._services.driver.renew(self._folder.run(name), deadline_s)
        self._gateway.renew(self.record.gateway_run, deadline_s)

    def steer(self, wanted: Steer) -> None:
        """Hand what the broker wants of the gateway over as soon as the gateway answers."""
        self._steer = wanted

    def stop(self, cause: ExitCause, detail: str = "") -> None:
        """End the ranks; the first cause stands."""
        if self.record.stop is None and not self.record.is_over:
            self._save(stop=cause, detail=detail[:_DETAIL_LENGTH_MAX])

    def release(self, *, gone: bool) -> None:
        """Let the gateway end: the broker has done with the lease; `gone` when it no longer names it."""
        self.gone = gone
        if not self.record.released:
            self._save(released=True)

    def report(self) -> AttemptReport:
        """Return the attempt's state for the heartbeat."""
        record = self.record
        status = self._status()
        return AttemptReport(
            lease_id=record.lease_id,
            epoch=record.epoch,
            phase=record.phase,
            cause=record.cause if record.is_over else None,
            exit_code=record.exit_code,
            detail=record.detail,
            gateway=None if status is None else report_of(status),
            promise=record.promise,
            checkpoint=record.checkpoint,
            outputs=record.outputs,
        )

    def cut_usage(self) -> None:
        """Put what was delivered since the last usage row into a new one."""
        if self.record.order is None:
            return
        now = metering.delivered(
            self.record, self._poll(self._ranks).running_s, self._status(), self._services.surroundings.site_id
        )
        row = metering.cut(self.record, now, self._services.clock.now_ms())
        if row is not None:
            self.record = row[0]
            self._services.journal.cut(*row)

    def renumber_usage(self, refused: int, *, is_taken: bool) -> None:
        """Go on numbering after the broker refused row `refused`; `is_taken` where it holds another one of that number."""
        self._save(usage_sequence=refused if is_taken else refused - 1)

    @property
    def is_in_a_hurry(self) -> bool:
        """Whether the broker should hear of it sooner: its gateway or its peers are out of reach, or a view is due."""
        status = self._status()
        if status is None:
            return self.record.phase is AttemptPhase.RUNNING
        if self.record.promise is not None and (status.view_number or 0) < self.record.promise.promised:
            return True
        lost_s = [*status.members_lost_s.values(), *([] if status.hub_lost_s is None else [status.hub_lost_s])]
        return any(each < HURRY_S_MAX for each in lost_s)

    @property
    def is_forgettable(self) -> bool:
        """Whether nothing of the attempt is left to do, to report or to end."""
        busy = self._secrets.is_busy or any(
            future is not None and not future.done() for future in (self._preparing, self._shipping)
        )
        return (
            self.gone
            and self.record.is_over
            and not busy
            and (self.record.order is None or self._gateway.is_over(self.record.gateway_run))
        )

    @property
    def folder(self) -> AttemptFolder:
        """Where the attempt's files lie."""
        return self._folder

    # -- one method for each phase -------------------------------------------------------------

    def _prepare(self) -> None:
        services = self._services
        if self._preparing is None:
            if self.record.stop is not None:
                self._conclude(self.record.stop)
            elif services.clock.monotonic_s() >= self._retry_at_s:
                cache_bytes_max = int(services.settings.limits.artifact_cache_gb * _GB)
                data = self._spec.data or ()
                services.data.use(self.record.key, data)
                # Staging may take hours: it has threads of its own.
                self._preparing = (services.staging if data else services.threads).submit(
                    self._fetch_all, data, cache_bytes_max
                )
            return
        if not self._preparing.done():
            return
        future, self._preparing = self._preparing, None
        try:
            prepared = future.result()
            write_attempt(
                self._folder,
                self.record,
                services.surroundings,
                listen=self._listen,
                resume_from=prepared.resume_from,
                ranks_socket=placement(services, self._folder, self.record).ranks_socket,
            )
        except StagingStoppedError:
            return  # why it was ended is known; the next step concludes
        except BrokerConnectionError:
            self._retry_at_s = services.clock.monotonic_s() + RETRY_S  # for as long as the liveness lasts
        except (SiteError, OSError) as error:
            self._conclude(*conclusion_without_files(error))
        else:
            self._save(phase=AttemptPhase.RUNNING if prepared.setup_done else AttemptPhase.SETUP)

    def _fetch_all(self, data: tuple[DataReference, ...], cache_bytes_max: int) -> Prepared:
        """Bring data, workdir and checkpoint here. Runs on a thread of its own."""
        services = self._services
        for reference in data:
            allowed = services.policy.current().data_sources_allowed
            services.data.stage(reference, allowed, lambda: self.record.stop is not None)
        return prepare(services.broker, services.settings.folder, self._folder, self.record, cache_bytes_max)

    def _set_up(self) -> None:
        state = self._poll("setup")
        if self._stopped_short(state, "setup"):
            return
        if state.phase is RunPhase.ABSENT:
            self._start(lambda: setup_run(self._services, self._folder, self.record))
        elif state.is_over:
            if state.cause is EndCause.EXIT and state.exit_code == 0:
                settings = self._services.settings
                keep_setup(settings.folder, self._folder.workdir, self.record.tenant_id, self._spec)
                self._save(phase=AttemptPhase.RUNNING)
                return
            cause, _, detail = conclusion(state)
            if cause is ExitCause.SCRIPT:
                cause = ExitCause.SETUP
            self._conclude(cause, state.exit_code, f"setup: {detail}")

    def _run(self) -> None:
        state = self._poll(self._ranks)
        if self._stopped_short(state, self._ranks):
            self._secrets.forget()
            return
        if state.phase is RunPhase.LOST and self.record.ranks_run < RANKS_RUNS_MAX:
            self._start_ranks_anew()
            return
        if state.is_over and state.phase is not RunPhase.ABSENT:
            self._conclude(*conclusion(state))
            return
        secrets = self._hold_secrets() if state.phase is RunPhase.ABSENT else None
        if self.record.phase is not AttemptPhase.RUNNING or not self._keep_gateway():
            return
        if secrets is not None and self._status() is not None:
            self._start(lambda: ranks_run(self._services, self._folder, self.record, self._ranks, secrets))
            self._secrets.forget()
        self._ship_when_due(outputs=False)

    def _hold_secrets(self) -> dict[str, bytes] | None:
        """Return the values of the job's secrets, None while they are fetched or where they cannot be had."""
        services = self._services
        if not self._spec.secrets:
            return {}
        if services.sandbox is None or services.settings.slurm is not None:
            self._conclude(
                ExitCause.SITE, detail="this site has no private place for secrets, and took the job by mistake"
            )
            return None
        try:
            return self._secrets.values(services.threads, services.clock.monotonic_s())
        except RequestRefusedError as error:
            is_tenants = error.problem_code in TENANTS_SECRET_CODES
            self._conclude(
                ExitCause.INPUT if is_tenants else ExitCause.SITE, detail=f"{error.problem_code}: {error.detail}"
            )
        except SiteError as error:
            self._conclude(ExitCause.SITE, detail=str(error))
        return None

    def _start_ranks_anew(self) -> None:
        """Let ranks that vanished start again, from their checkpoint and a snapshot, while the lease lives."""
        if self._keep_gateway() and self._status() is not None and self._gateway.ranks_started_anew():
            resume_where_left(self._folder)
            self._save(
                ranks_run=self.record.ranks_run + 1, gpu_milliseconds_before=self.record.delivered.gpu_milliseconds
            )

    def _deliver(self) -> None:
        now_s = self._services.clock.monotonic_s()
        done = self.record.cause is ExitCause.DONE
        if self._deliver_until_s is None:
            # Of a site that left, the checkpoint is what its job goes on from; the broker waits for it as long as it likes.
            is_awaited = done or self.record.cause is ExitCause.LEFT
            self._deliver_until_s = now_s + (DELIVERY_DONE_S if is_awaited else DELIVERY_BROKEN_S)
            self._ship_at_s = now_s
        self._keep_gateway()
        if self._is_delivered or now_s >= self._deliver_until_s or (self.record.released and not done):
            self.cut_usage()  # before the end is reported: a report that ends a lease follows its last usage
            self._save(phase=AttemptPhase.EXITED)
        elif self._ship_when_due(outputs=done):
            self._is_final_step = True

    def _linger(self) -> None:
        is_needed = self.record.cause in {ExitCause.DONE, ExitCause.LEFT}
        if is_needed and not self.record.released and not self._is_expired():
            self._keep_gateway()
        elif not self._gateway.is_over(self.record.gateway_run):
            self.cut_usage()
            self._gateway.stop(self.record.gateway_run)

    # -- what the phases share -----------------------------------------------------------------

    def _stopped_short(self, state: RunState, name: str) -> bool:
        """Return whether the attempt is being ended, and go on with that."""
        if self.record.stop is None:
            return False
        if state.is_over:
            # Its own end, if it came first, is the truth: work that was done is not thrown away.
            ended_itself = state.cause is EndCause.EXIT and name == self._ranks
            self._conclude(*conclusion(state)) if ended_itself else self._conclude(self.record.stop)
        else:
            self._services.driver.stop(self._folder.run(name))
        return True

    def _conclude(self, cause: ExitCause, exit_code: int | None = None, detail: str = "") -> None:
        self._services.data.release(self.record.key)  # nothing of it runs any more
        self._save(
            phase=AttemptPhase.STOPPING,
            cause=cause,
            exit_code=exit_code,
            detail=(detail or self.record.detail)[:_DETAIL_LENGTH_MAX],
        )

    def _keep_gateway(self) -> bool:
        try:
            number = self._gateway.keep_running(self.record.gateway_run, self.record.deadline_s)
        except SiteError as error:
            self.stop(ExitCause.SITE, str(error))
            return False
        if number != self.record.gateway_run:
            self._save(gateway_run=number)
        self._apply_steer()
        return True

    def _apply_steer(self) -> None:
        wanted = self._steer
        if wanted is None or self._status() is None:
            return
        self._gateway.use_certificate(wanted.certificate_pem)
        if wanted.view is not None:
            installing = (wanted.view.signature, self.record.gateway_run)
            if self._installed != installing and self._gateway.install_view(wanted.view):
                self._installed = installing
        if wanted.leaving is not None:
            asking = (wanted.leaving, self.record.gateway_run)
            if self._asked_to_leave != asking and self._gateway.leave(wanted.leaving):
                self._asked_to_leave = asking
        former = self.record.promise
        if wanted.promise is not None and (former is None or former.promised < wanted.promise):
            promise = self._gateway.promise(wanted.promise)
            if promise is not None:
                self._save(promise=promise)

    def _ship_when_due(self, *, outputs: bool) -> bool:
        """Start the next step of shipping if one is due, and return whether it was."""
        if self._shipping is not None or self._services.clock.monotonic_s() < self._ship_at_s:
            return False
        self._shipping = self._services.threads.submit(
            ship,
            self._services.broker,
            self._folder,
            self.record,
            outputs=outputs,
            output_bytes_max=int(self._services.settings.limits.output_gb * _GB),
        )
        return True

    def _collect_shipped(self) -> None:
        if self._shipping is None or not self._shipping.done():
            return
        future, self._shipping = self._shipping, None
        now_s = self._services.clock.monotonic_s()
        try:
            shipped = future.result()
        except (SiteError, OSError):
            self._ship_at_s = now_s + RETRY_S
            return
        self._ship_at_s = now_s if shipped.more else now_s + SHIP_INTERVAL_S
        # Only a step that began after the ranks were dead has seen all that they left.
        self._is_delivered = self._is_final_step and not shipped.more
        self._save(stream_bytes=shipped.stream_bytes, checkpoint=shipped.checkpoint, outputs=shipped.outputs)

    def _start(self, make: Callable[[], Run]) -> None:
        try:
            self._services.driver.start(make())
        except SiteError as error:
            self._conclude(ExitCause.SITE, detail=str(error))

    @property
    def _ranks(self) -> str:
        """The name of the ranks' newest run."""
        return "ranks" if self.record.ranks_run == 1 else f"ranks-{self.record.ranks_run}"

    def _poll(self, name: str) -> RunState:
        return self._services.driver.poll(self._folder.run(name))

    def _status(self) -> GatewayStatus | None:
        if self.record.order is None or self.record.phase in (AttemptPhase.PREPARING, AttemptPhase.SETUP):
            return None
        return self._gateway.status()

    def _is_expired(self) -> bool:
        clock = self._services.clock
        return self.record.era != clock.era() or clock.monotonic_s() >= self.record.deadline_s

    @property
    def _spec(self) -> JobSpec:
        assert self.record.order is not None, "only an attempt with an order is stepped"
        return self.record.order.spec

    def _save(self, **changes: Any) -> None:  # noqa: ANN401  fields of AttemptRecord
        changed = self.record.model_copy(update=changes)
        if changed != self.record:
            self.record = changed
            self._services.journal.save(changed)
