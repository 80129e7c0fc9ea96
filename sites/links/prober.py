"""The agent's part in probes: it answers the broker's orders with a key, starts the probe's process, reports what came of it.

Nothing is kept over a restart of the agent but the newest report, for `hansa site doctor`: a probe that was under way is
then over for the broker when it expires, and the warden has ended its process by then.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from sites.addresses import bound_address, free_address
from sites.drivers.interface import Limits, Run
from sites.drivers.process import ProcessDriver
from sites.environment import own_environment
from sites.errors import DriverError
from sites.identity import attempt_uri, certificate_request_pem, private_key_pem, write_private
from sites.links.messages import ProbeOrder, ProbeReply, ProbeReport, ProbeTerms
from sites.links.probe import PROBE_EPOCH, ProbeConfig
from sites.protocol import HeartbeatAnswer, LeasePhase
from sites.settings import SiteSettings
from training.clock import Clock
from training.roundlog.credentials import new_attempt_key
from training.roundlog.signing import public_hex
from training.spec import SiteId

PROBES_FOLDER: Final = "probes"
NEWEST_FILE: Final = "newest_probe.json"
LOG_BYTES_MAX: Final = 100_000
_GB: Final = 1_000_000_000
_RUN: Final = "run"
_RESULT: Final = "result.json"
_log = structlog.get_logger(__name__)


class NewestProbe(BaseModel):
    """The newest probe that this site took part in, kept for its operator."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peer: SiteId
    ended_ms: int
    report: ProbeReport


@dataclass(slots=True)
class _Probe:
    """A probe that the broker orders. `deadline_s` is monotonic."""

    order: ProbeOrder
    reply: ProbeReply
    deadline_s: float
    is_started: bool = False
    report: ProbeReport | None = None


class Prober:
    """All probes of one site, one or two at a time."""

    def __init__(self, settings: SiteSettings, ca_pem: str, driver: ProcessDriver, clock: Clock) -> None:
        """Forget what a former agent left unfinished."""
        self._settings = settings
        self._ca_pem = ca_pem
        self._driver = driver
        self._clock = clock
        self._folder = settings.folder / PROBES_FOLDER
        self._probes: dict[str, _Probe] = {}
        self._saying: set[tuple[str, bool]] = set()
        self._said: set[tuple[str, bool]] = set()
        for left in self._folder.glob("*"):
            self._drop(left)

    @property
    def terms(self) -> ProbeTerms:
        """What the owner allows probes to take."""
        probes = self._settings.probes
        return ProbeTerms(bytes_per_day=round(probes.gb_per_day * _GB), while_syncing=probes.while_syncing)

    def speak(self) -> tuple[tuple[ProbeReply, ...], tuple[ProbeReport, ...]]:
        """Return what the next heartbeat says: replies to orders that wait for them, reports of probes that are over."""
        self._collect()
        self._saying = self._news()
        probes = self._probes.values()
        return (
            tuple(probe.reply for probe in probes if not probe.is_started and probe.report is None),
            tuple(probe.report for probe in probes if probe.report is not None),
        )

    @property
    def addresses(self) -> set[str | None]:
        """Where this site listens for probes: no gateway may."""
        return {probe.reply.address for probe in self._probes.values()} - {None}

    @property
    def has_news(self) -> bool:
        """Whether the broker has not heard yet what came of a probe, or of an order."""
        self._collect()
        return not self._news() <= self._said

    def follow(self, answer: HeartbeatAnswer, taken: Collection[str | None], sent_s: float) -> None:
        """Do what the broker's answer to the heartbeat of `sent_s` orders; `taken` are addresses of gateways."""
        self._said = self._saying
        orders = {order.probe_id: order for order in answer.probes or ()}
        for probe_id in set(self._probes) - set(orders):
            self._forget(probe_id)
        syncing = any(order.phase is LeasePhase.ACTIVE and order.peers for order in answer.leases)
        for probe_id, order in orders.items():
            probe = self._probes.get(probe_id)
            if probe is None:
                reply = self._reply(order, taken, syncing=syncing)
                probe = self._probes[probe_id] = _Probe(order, reply, sent_s + order.expires_s)
            if order.certificate_pem and not (probe.is_started or probe.reply.refused or probe.report):
                self._start(probe, order)

    def _reply(self, order: ProbeOrder, taken: Collection[str | None], *, syncing: bool) -> ProbeReply:
        """Make a key for a probe, or refuse it by the owner's settings."""
        settings, address = self._settings, None
        refused = ""
        if not settings.probes.allowed:
            refused = "the site's owner allows no probes (probes.allowed)"
        elif syncing and not settings.probes.while_syncing:
            refused = "a job that spans sites runs here, and the owner lets no probe disturb it (probes.while_syncing)"
        elif 2 * order.bytes_max > self.terms.bytes_per_day:
            refused = f"{2 * order.bytes_max} bytes are more than the owner allows in a day (probes.gb_per_day)"
        elif order.listens:
            address = None if settings.listen is None else free_address(settings.listen, {*taken, *self.addresses})
            refused = "" if address else "no port is free for it to listen on (listen.ports)"
        if refused:
            return ProbeReply(probe_id=order.probe_id, refused=refused)
        key = new_attempt_key()
        folder = self._folder_of(order)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(folder / "key.pem", private_key_pem(key))
        csr_pem = certificate_request_pem(key, attempt_uri(order.probe_id, PROBE_EPOCH, settings.site_id))
        return ProbeReply(probe_id=order.probe_id, probe_key=public_hex(key), csr_pem=csr_pem, address=address)

    def _start(self, probe: _Probe, order: ProbeOrder) -> None:
        assert order.certificate_pem is not None, "an order without a certificate is not begun"
        address = order.address
        if probe.reply.address is not None and self._settings.listen is not None:
            address = bound_address(self._settings.listen, probe.reply.address)
        if order.peer_key is None or address is None:
            probe.report = _failed(order, "the broker's order does not say whom to probe, or where")
            return
        folder = self._folder_of(order)
        config = ProbeConfig(
            probe_id=order.probe_id,
            listens=order.listens,
            site_id=self._settings.site_id,
            peer=order.peer,
            peer_key=order.peer_key,
            address=address,
            streams=order.streams,
            bytes_max=order.bytes_max,
            seconds_max=order.seconds_max,
            deadline_s=probe.deadline_s,
            certificate_path=str(folder / "certificate.pem"),
            key_path=str(folder / "key.pem"),
            ca_path=str(folder / "ca.pem"),
            result_path=str(folder / _RESULT),
        )
        write_private(folder / "certificate.pem", order.certificate_pem.encode())
        write_private(folder / "ca.pem", self._ca_pem.encode())
        write_private(folder / "probe.json", config.model_dump_json().encode())
        python = self._settings.python
        try:
            self._driver.start(
                Run(
                    folder=folder / _RUN,
                    argv=(python, "-P", "-m", "sites.links.probe", str(folder / "probe.json")),
                    cwd=folder,
                    environment=own_environment(python),
                    log_path=folder / "probe.log",
                    deadline_s=probe.deadline_s,
                    log_bytes_max=LOG_BYTES_MAX,
                    limits=Limits(open_files=256),
                )
            )
        except DriverError as error:
            probe.report = _failed(order, str(error))
            return
        probe.is_started = True
        _log.info("probe.begun", probe=order.probe_id, peer=order.peer, listens=order.listens)

    def _collect(self) -> None:
        """Take up the reports of the processes that have ended."""
        for probe in self._probes.values():
            if not probe.is_started or probe.report is not None:
                continue
            folder = self._folder_of(probe.order)
            if not self._driver.poll(folder / _RUN).is_over:
                continue
            try:
                probe.report = ProbeReport.model_validate_json((folder / _RESULT).read_bytes())
            except (OSError, ValidationError):
                probe.report = _failed(probe.order, "the probe's process ended without a word before it was done")
            newest = NewestProbe(peer=probe.order.peer, ended_ms=self._clock.now_ms(), report=probe.report)
            write_private(self._settings.folder / NEWEST_FILE, newest.model_dump_json().encode())
            _log.info("probe.ended", probe=probe.order.probe_id, peer=probe.order.peer, failed=probe.report.failed)

    def _forget(self, probe_id: str) -> None:
        self._drop(self._folder_of(self._probes.pop(probe_id).order))

    def _drop(self, folder: Path) -> None:
        if self._driver.poll(folder / _RUN).is_over:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self._driver.stop(folder / _RUN)  # what is left goes when an agent starts anew

    def _news(self) -> set[tuple[str, bool]]:
        """Return what there is to say, so that it is said once at once and then with every heartbeat: an id, and if it is over."""
        probes = self._probes.items()
        return {(name, probe.report is not None) for name, probe in probes if probe.report or not probe.is_started}

    def _folder_of(self, order: ProbeOrder) -> Path:
        return self._folder / order.probe_id


def newest_probe(folder: Path) -> NewestProbe | None:
    """Return the newest probe of the site in `folder`, None before there was one."""
    try:
        return NewestProbe.model_validate_json((folder / NEWEST_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def _failed(order: ProbeOrder, why: str) -> ProbeReport:
    return ProbeReport(probe_id=order.probe_id, failed=why[:1000])
