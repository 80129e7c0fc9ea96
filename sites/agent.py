"""The agent: one loop that says what is, hears what should be, and does the difference.

    attend   step every attempt of the journal
    tick     attend, send a heartbeat, apply the answer

An agent may be killed at any instruction: it starts again from the journal and from the folders of
its runs. Liveness counts from when a heartbeat was *sent* and is renewed only by its answer; the
wardens hold the deadline, so nothing depends on this process being alive.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import secrets
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Final, TextIO

import structlog

from sites import inventory
from sites.addresses import bound_address, free_address
from sites.asks import AskBook
from sites.attempt_folder import AttemptFolder, Surroundings, make_credentials
from sites.attempt_runs import Services
from sites.attempts import Attempt
from sites.client import Broker
from sites.data_store import DataStore
from sites.devices import mismatches, read_devices
from sites.drivers.interface import Driver
from sites.drivers.process import ProcessDriver
from sites.drivers.slurm import SlurmDriver
from sites.errors import AgentRunningError, IdentityError, RequestRefusedError, SiteError
from sites.identity import Identity
from sites.journal import AttemptKey, AttemptRecord, Journal, record_of
from sites.leases import (
    Action,
    Confirm,
    Disown,
    House,
    Refuse,
    Release,
    Renew,
    Standing,
    Start,
    Steer,
    Stop,
    Withdraw,
    decide,
    refused_renewals,
    veto,
)
from sites.links.prober import Prober
from sites.policy import PolicyBook
from sites.protocol import (
    AttemptPhase,
    Confirmation,
    ExitCause,
    Heartbeat,
    HeartbeatAnswer,
    LeaseOrder,
    LeasePhase,
    Offer,
    SiteData,
    Skill,
    Wish,
)
from sites.sandbox import Bubblewrap
from sites.secrets_in_hand import keeps_secrets
from sites.settings import SiteSettings, priced
from sites.statement import STATEMENT_AGE_S, fetch_statement
from sites.wake import WakeListener
from sites.wishes import judge, keep_wish, kept_wish
from training.clock import Clock
from training.roundlog.signing import public_hex

TRANSFER_THREADS: Final = 4
STAGING_THREADS: Final = 4
# How often attempts are looked at between heartbeats.
ATTEND_INTERVAL_S: Final = 0.2
# What has just happened is said at once, but a circle of news may not become a flood of requests.
NEWS_INTERVAL_S: Final = 0.2
# The pace of heartbeats while an attempt's round log waits for the broker.
HURRY_INTERVAL_S: Final = 0.4
END_ATTEMPTS_S: Final = 30.0
# A site that has just started has more urgent things to ask.
STATEMENT_FIRST_S: Final = 30.0
DRAINING_FILE: Final = "draining"

_log = structlog.get_logger(__name__)


class Agent:
    """The agent of one site."""

    def __init__(self, settings: SiteSettings, identity: Identity, broker: Broker, clock: Clock) -> None:
        """Take the site's folder and all that runs in it over. Raises AgentRunningError where one is at work."""
        if identity.site_id != settings.site_id:
            raise IdentityError(
                f"the folder belongs to site {identity.site_id}, the settings to {settings.site_id}; give each its own"
            )
        self._settings = settings
        self._identity = identity
        self._broker = broker
        self._clock = clock
        self._lock = _locked(settings)
        self._journal = Journal(settings.folder / "journal.sqlite3")
        self._threads = ThreadPoolExecutor(TRANSFER_THREADS, thread_name_prefix="transfer")
        self._staging = ThreadPoolExecutor(STAGING_THREADS, thread_name_prefix="staging")
        self._policy = PolicyBook(settings.policy, settings.policy_file)
        local = ProcessDriver(settings.python, clock)
        self._services = Services(
            settings=settings,
            surroundings=Surroundings(identity.site_id, identity.authority_key, identity.ca_pem),
            clock=clock,
            journal=self._journal,
            broker=broker,
            driver=_driver(settings, clock, local),
            local=local,
            threads=self._threads,
            sandbox=_sandbox(settings),
            data=DataStore(settings.folder / "data", settings.data, clock),
            staging=self._staging,
            policy=self._policy,
        )
        for name in ("attempts", "artifacts", "setups"):
            (settings.folder / name).mkdir(mode=0o700, exist_ok=True)
        self._prober = Prober(settings, identity.ca_pem, local, clock)
        self._measured = inventory.measure(settings)
        self._mismatch = "; ".join(mismatches(settings, read_devices())) if inventory.sells_gpus(settings) else ""
        if self._mismatch:
            _log.error("gpus.mismatch", detail=self._mismatch)
        self._asks = AskBook([priced(pool) for pool in settings.pools], settings.folder)
        self._offered: tuple[Offer, Offer] | None = None
        self._orders: tuple[LeaseOrder, ...] = ()
        self._wish = kept_wish(settings)
        self._judged = judge(settings, self._wish)
        self._boot = secrets.token_hex(8)
        self._version = metadata.version("hansa") if _is_installed() else "checkout"
        self._attempts = {record.key: self._attempt(record) for record in self._journal.attempts()}
        self._told: dict[AttemptKey, object] = {}
        self.heartbeat_s = identity.heartbeat_s
        self._statement_due_s = clock.monotonic_s() + STATEMENT_FIRST_S
        self.wake = threading.Event()
        self._listener = WakeListener(self.wake, identity.ca_pem)

    # -- the loop ------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set. Attempts go on afterwards, until their liveness ends."""
        sent_s = self._clock.monotonic_s() - self.heartbeat_s
        while not stop.is_set():
            self.attend()
            now_s = self._clock.monotonic_s()
            if self.wake.is_set() or now_s >= sent_s + self._pause_s():
                self.wake.clear()
                self.tick()
                sent_s = now_s
            self.wake.wait(ATTEND_INTERVAL_S)

    def tick(self) -> bool:
        """Send one heartbeat and apply its answer; False where none came."""
        self.attend()
        heartbeat = self._heartbeat()
        sent_s = self._clock.monotonic_s()
        try:
            answer = self._broker.heartbeat(heartbeat)
        except RequestRefusedError as error:
            _log.error("heartbeat.refused", code=error.problem_code, detail=error.detail)
            return False
        except SiteError as error:
            _log.warning("heartbeat.unanswered", code=error.code, detail=str(error))
            return False
        self._listener.follow(answer.wake_url)
        self._told = {report.key: _news(report) for report in self._records()}
        self._apply(answer, sent_s)
        if sent_s >= self._statement_due_s:
            self._statement_due_s = sent_s + STATEMENT_AGE_S
            self._threads.submit(fetch_statement, self._broker, self._settings.folder)
        self.attend()
        return True

    def attend(self) -> None:
        """Step every attempt."""
        for key, attempt in sorted(self._attempts.items()):
            try:
                attempt.step()
            except (SiteError, OSError) as error:  # one attempt's broken folder is not the other attempts' affair
                _log.error("attempt.broken", lease=key[0], detail=str(error))
                attempt.stop(ExitCause.SITE, f"the site could not go on with it: {error}")
            if attempt.is_forgettable:
                self._forget(key, attempt)

    def end_attempts(self) -> None:
        """End every attempt and say so to the broker, as when the operator takes the host away."""
        for attempt in self._attempts.values():
            attempt.stop(ExitCause.SITE, "the operator stopped the site's agent")
        give_up_s = self._clock.monotonic_s() + END_ATTEMPTS_S
        pause = threading.Event()
        while not self.is_idle and self._clock.monotonic_s() < give_up_s:
            self.attend()
            pause.wait(ATTEND_INTERVAL_S)
        self.tick()

    @property
    def is_idle(self) -> bool:
        """Whether no rank of any attempt lives."""
        return all(attempt.record.is_over for attempt in self._attempts.values())

    @property
    def records(self) -> list[AttemptRecord]:
        """All attempts as they stand."""
        return self._records()

    def close(self) -> None:
        """Let go of the folder; what runs goes on under its wardens."""
        self._services.data.close()
        self._staging.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._journal.close()
        self._lock.close()

    # -- what is -------------------------------------------------------------------------------

    def _heartbeat(self) -> Heartbeat:
        for attempt in self._attempts.values():
            attempt.cut_usage()
        probe_replies, probe_reports = self._prober.speak()
        return Heartbeat(
            agent_version=self._version[:40],
            boot=self._boot,
            sent_ms=self._clock.now_ms(),
            offer=self._offer(),
            skills=_skills(self._settings),
            # A lease that runs here is confirmed already; saying it again would only be noise.
            confirmations=tuple(
                item for key, item in self._journal.confirmations().items() if key not in self._attempts
            ),
            vetoes=(
                *self._journal.vetoes().values(),
                *refused_renewals(self._orders, self._standing(), self._house()),
            ),
            attempts=tuple(attempt.report() for _, attempt in sorted(self._attempts.items())),
            usage=tuple(self._journal.usage()),
            renewal_csr_pem=self._identity.renewal_csr_pem(),
            takes_wishes=self._settings.remote.allows_any,
            wish_reply=self._judged.reply,
            probe_terms=self._prober.terms,
            probe_replies=probe_replies,
            probe_reports=probe_reports,
            data=self._data(),
        )

    def _pause_s(self) -> float:
        """Return how long the next heartbeat may wait after the last."""
        if self._has_news():
            return NEWS_INTERVAL_S
        hurries = any(attempt.is_in_a_hurry for attempt in self._attempts.values())
        return min(HURRY_INTERVAL_S, self.heartbeat_s) if hurries else self.heartbeat_s

    def _has_news(self) -> bool:
        return self._prober.has_news or any(self._told.get(item.key) != _news(item) for item in self._records())

    def _records(self) -> list[AttemptRecord]:
        return [attempt.record for _, attempt in sorted(self._attempts.items())]

    def _is_draining(self) -> bool:
        return self._judged.draining or (self._settings.folder / DRAINING_FILE).exists()

    # -- what should be ------------------------------------------------------------------------

    def _apply(self, answer: HeartbeatAnswer, sent_s: float) -> None:
        self.heartbeat_s = answer.heartbeat_s
        if answer.certificate_pem is not None:
            try:
                self._identity.replace_certificate(answer.certificate_pem)
            except IdentityError as error:
                _log.error("certificate.refused", detail=str(error))
        if answer.wish is not None and answer.wish != self._wish:
            self._take_wish(answer.wish)
        for lease_id, sequence in answer.usage_acknowledged.items():
            self._journal.acknowledge(lease_id, sequence)
        for refusal in answer.refusals:
            self._take_refusal(refusal.lease_id, refusal.code, refusal.detail)
        taken = {item.gateway_address for item in self._journal.confirmations().values()}
        self._prober.follow(answer, taken, sent_s)
        self._orders = answer.leases
        actions = decide(answer.leases, self._standing(), self._house())
        for order in answer.leases:
            if order.phase is not LeasePhase.ENDED:
                self._journal.fence(order.job_id, order.epoch)
        for action in actions:
            self._do(action, sent_s)

    def _take_wish(self, wish: Wish) -> None:
        """Offer from now on what the operator asked for in the portal, as far as the settings allow."""
        keep_wish(self._settings, wish)
        self._wish, self._judged = wish, judge(self._settings, wish)
        self.wake.set()
        refused = self._judged.reply.refused if self._judged.reply else ""
        _log.info("wish.taken", number=wish.number, asks=wish.asks_micros_per_gpu_hour, refused=refused)

    def _do(self, action: Action, sent_s: float) -> None:  # noqa: C901 - one line for each kind of action
        match action:
            case Confirm(order):
                self._confirm(order)
            case Refuse(order, objection):
                _log.info("lease.refused", lease=order.lease_id, code=objection.code, reason=objection.reason)
                self._journal.reply(order.job_id, veto(order, objection))
                self.wake.set()
            case Withdraw(key):
                self._journal.forget_reply(key)
                if key not in self._attempts:
                    shutil.rmtree(AttemptFolder.of(self._settings.folder, key).root, ignore_errors=True)
            case Start(order):
                deadline_s = sent_s + order.liveness_s
                began = {"deadline_s": deadline_s, "era": self._clock.era(), "began_ms": self._clock.now_ms()}
                self._begin(record_of(order).model_copy(update=began))
                if order.attempt is not None:
                    steer = Steer(
                        (order.lease_id, order.epoch),
                        order.attempt.view,
                        order.attempt.promise,
                        order.attempt.certificate_pem,
                    )
                    self._attempts[order.lease_id, order.epoch].steer(steer)
            case Disown(order, cause, detail):
                over = {"order": None, "phase": AttemptPhase.EXITED, "cause": cause, "detail": detail}
                self._begin(record_of(order).model_copy(update=over))
                self.wake.set()
            case Renew(key, liveness_s):
                self._attempts[key].renew(sent_s + liveness_s)
            case Steer(key):
                self._attempts[key].steer(action)
            case Stop(key, cause):
                self._attempts[key].stop(cause, "the broker ended the lease")
            case Release(key, gone):
                self._attempts[key].release(gone=gone)

    def _confirm(self, order: LeaseOrder) -> None:
        key = (order.lease_id, order.epoch)
        attempt_key, csr_pem = make_credentials(
            AttemptFolder.of(self._settings.folder, key), order.job_id, order.epoch, self._identity.site_id
        )
        address = None
        if self._settings.listen is not None:
            taken = {item.gateway_address for item in self._journal.confirmations().values()}
            address = free_address(self._settings.listen, taken | self._prober.addresses)
        confirmation = Confirmation(
            lease_id=order.lease_id,
            epoch=order.epoch,
            attempt_key=public_hex(attempt_key),
            csr_pem=csr_pem,
            gateway_address=address,
        )
        self._journal.reply(order.job_id, confirmation)
        self.wake.set()

    def _begin(self, record: AttemptRecord) -> None:
        self._journal.save(record)
        self._attempts[record.key] = self._attempt(record)
        _log.info("attempt.begun", lease=record.lease_id, epoch=record.epoch, job=record.job_id, phase=record.phase)

    def _attempt(self, record: AttemptRecord) -> Attempt:
        listen = None
        confirmation = self._journal.confirmations().get(record.key)
        if self._settings.listen is not None and confirmation is not None and confirmation.gateway_address:
            listen = bound_address(self._settings.listen, confirmation.gateway_address)
        return Attempt(record, self._services, listen)

    def _forget(self, key: AttemptKey, attempt: Attempt) -> None:
        self._journal.forget(key)
        self._journal.forget_reply(key)
        shutil.rmtree(attempt.folder.root, ignore_errors=True)
        del self._attempts[key]
        _log.info("attempt.forgotten", lease=key[0], epoch=key[1], cause=attempt.record.cause)

    def _take_refusal(self, lease_id: str, code: str, detail: str) -> None:
        """Take the broker's word that it will never accept an item, so that it is not said for ever.

        Any other refusal is of now: the item is said again, until it is taken or refused for good.
        """
        _log.warning("item.refused", lease=lease_id, code=code, detail=detail)
        if code not in FINAL_REFUSALS:
            return
        attempts = [attempt for key, attempt in self._attempts.items() if key[0] == lease_id]
        lowest = self._journal.drop_usage(lease_id)
        if lowest is None:
            return
        _log.error("usage.dropped", lease=lease_id, since=lowest, code=code)
        for attempt in attempts:
            attempt.renumber_usage(lowest, is_taken=code == USAGE_CONFLICT)

    def _house(self) -> House:
        slurm = self._settings.slurm
        return House(
            gpu_ids={pool.gpu_type: frozenset(pool.gpu_ids) for pool in self._settings.pools},
            asks=self._lowest_asks(),
            policy=self._policy.current(),
            gpus_per_node=None if slurm is None or slurm.fabric == "trusted" else slurm.gpus_per_node,
            draining=self._is_draining(),
            site_id=self._settings.site_id,
            keeps_secrets=keeps_secrets(self._settings),
            data=self._data(),
            now_ms=self._clock.now_ms(),
        )

    def _offer(self) -> Offer:
        """Return what is for sale now, and keep the offer before it: a proposal may have been made at its asks."""
        now = dt.datetime.fromtimestamp(self._clock.now_ms() / 1000, dt.UTC)
        pools = [priced(pool) for pool in self._judged.settings.pools]
        asks = {kind: ask.curve for kind, ask in self._asks.asks(pools, now, self._lent_shares()).items()}
        terms = inventory.Terms(self._policy.current(), asks, self._is_draining(), now, self._mismatch)
        offer = inventory.offer(self._judged.settings, self._measured, terms)
        self._offered = (offer if self._offered is None else self._offered[1], offer)
        return offer

    def _data(self) -> SiteData | None:
        return self._services.data.announced(self._policy.current().data_sources_allowed)

    def _lowest_asks(self) -> dict[str, int]:
        pools = [pool for offer in self._offered or () for pool in offer.pools]
        kinds = {pool.gpu_type for pool in pools}
        return {kind: min(pool.ask_micros_per_gpu_hour for pool in pools if pool.gpu_type == kind) for kind in kinds}

    def _lent_shares(self) -> dict[str, float]:
        lent: Counter[str] = Counter()
        for record in self._records():
            lent[record.gpu_type] += 0 if record.is_over else len(record.gpu_ids)
        return inventory.lent_shares(self._settings.pools, self._policy.current(), lent)

    def _standing(self) -> Standing:
        return Standing(
            attempts={record.key: record for record in self._records()},
            confirmed=frozenset(self._journal.confirmations()),
            vetoed=frozenset(self._journal.vetoes()),
            epochs=self._journal.epochs(),
        )


# Codes of the broker after which a lease's usage can never be taken.
USAGE_CONFLICT: Final = "usage.conflict"
FINAL_REFUSALS: Final = frozenset({"request.not_found", "lease.stale_epoch", "usage.refused", USAGE_CONFLICT})


def _news(record: AttemptRecord) -> object:
    """Return what of an attempt the broker should hear at once when it changes."""
    return record.phase, record.promise, record.checkpoint


def _locked(settings: SiteSettings) -> TextIO:
    lock = (settings.folder / "agent.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise AgentRunningError(f"an agent works in {settings.folder} already; stop it first") from None
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _driver(settings: SiteSettings, clock: Clock, local: ProcessDriver) -> Driver:
    """Return what runs setups and ranks."""
    return local if settings.slurm is None else SlurmDriver(settings.slurm, settings.python, clock, local)


def _sandbox(settings: SiteSettings) -> Bubblewrap | None:
    """Return what confines tenants' code here, seen to work. Raises SandboxError."""
    if settings.sandbox == "plain":
        return None
    sandbox = Bubblewrap(settings.python, settings.folder / "sandbox", settings.sandbox_readable)
    sandbox.check()
    return sandbox


def _skills(settings: SiteSettings) -> tuple[Skill, ...]:
    """Return what this agent understands and this site can keep."""
    able = {Skill.SECRETS: keeps_secrets(settings), Skill.PROBE: settings.probes.allowed}
    return tuple(skill for skill in Skill if able.get(skill, True))


def _is_installed() -> bool:
    try:
        metadata.version("hansa")
    except metadata.PackageNotFoundError:
        return False
    return True
