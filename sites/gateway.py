"""The gateway process of one attempt: started under a warden, started again when it dies, steered.

It alone holds the attempt's network credentials. Views, promises and certificates are handed over
again until the gateway has them, so a gateway that was started anew catches up by itself.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from sites.attempt_folder import AGENT_SOCKET, RANKS_SOCKET, AttemptFolder
from sites.drivers.interface import Limits, Run
from sites.drivers.process import ProcessDriver
from sites.errors import GatewayError
from sites.protocol import GatewayReport
from training.clock import Clock
from training.errors import TrainingError
from training.exchange import Leaving
from training.roundlog.control import GatewayControl, GatewayStatus
from training.roundlog.signing import SignedDocument
from training.roundlog.view import ViewReport

RESTARTS_MAX: Final = 20
# A gateway that dies at once must not be started in a circle; one that worked for a while may at once.
RESTART_DELAY_S: Final = 1.0
# One loop serves all attempts and the heartbeat: a wedged gateway may hold it this long, once a second.
_CALL_TIMEOUT_S: Final = 1.0
# How soon a lost hub is noticed; asking costs some 2 ms.
_STATUS_AGE_S: Final = 0.4


class Gateway:
    """The gateway of one attempt as its agent sees it."""

    def __init__(
        self, folder: AttemptFolder, driver: ProcessDriver, clock: Clock, *, python: str, environment: dict[str, str]
    ) -> None:
        """Steer the gateway of the attempt in `folder`; nothing is started."""
        self._folder = folder
        self._driver = driver
        self._clock = clock
        self._python = python
        self._environment = environment
        self._control = GatewayControl(str(folder.socket(AGENT_SOCKET)), timeout_s=_CALL_TIMEOUT_S)
        self._started_s: float | None = None
        self._status: tuple[float, GatewayStatus | None] | None = None
        self._certificate_pem: str | None = None

    def keep_running(self, number: int, deadline_s: float) -> int:
        """Start the gateway, or start it again; return the number of the run that now stands.

        Raises GatewayError where it dies again and again.
        """
        state = self._driver.poll(self._run_folder(number))
        now_s = self._clock.monotonic_s()
        if not state.is_over:
            return number
        if (self._run_folder(number) / "run.json").exists():
            if number >= RESTARTS_MAX:
                raise GatewayError(f"the gateway died {number} times; see gateway.log in {self._folder.root}")
            if self._started_s is not None and now_s - self._started_s < RESTART_DELAY_S:
                return number
            number += 1
        for name in (AGENT_SOCKET, RANKS_SOCKET):
            self._folder.socket(name).unlink(missing_ok=True)  # a dead gateway's socket would only puzzle
        self._started_s, self._status, self._certificate_pem = now_s, None, None
        self._driver.start(
            Run(
                folder=self._run_folder(number),
                argv=(
                    self._python,
                    "-P",
                    "-m",
                    "training.roundlog.gateway",
                    str(self._folder.gateway / "gateway.json"),
                ),
                cwd=self._folder.gateway,
                environment=self._environment,
                log_path=self._folder.root / "gateway.log",
                deadline_s=deadline_s,
                limits=Limits(open_files=4096),
            )
        )
        return number

    def status(self) -> GatewayStatus | None:
        """Return the gateway's status, None while it does not answer."""
        now_s = self._clock.monotonic_s()
        if self._status is not None and now_s - self._status[0] < _STATUS_AGE_S:
            return self._status[1]
        status = None
        if self._folder.socket(AGENT_SOCKET).exists():
            with contextlib.suppress(TrainingError):
                status = self._control.status()
            self._status = (now_s, status)
        return status

    def install_view(self, document: SignedDocument) -> bool:
        """Hand over a view; False where the gateway is away or refuses."""
        try:
            self._control.install_view(document)
        except TrainingError:
            return False
        self._status = None
        return True

    def promise(self, number: int) -> ViewReport | None:
        """Ask for a promise; None where the gateway is away or refuses."""
        try:
            return self._control.promise(number)
        except TrainingError:
            return None

    def leave(self, leaving: Leaving) -> bool:
        """Ask that the ranks stop at the end of a round; False where the gateway is away or too old to be asked."""
        try:
            self._control.leave(leaving)
        except TrainingError:
            return False
        return True

    def ranks_started_anew(self) -> bool:
        """Say that the ranks lost their state; False where the gateway is away."""
        try:
            self._control.ranks_started_anew()
        except TrainingError:
            return False
        return True

    def use_certificate(self, pem: str) -> None:
        """Hand over a certificate unless this run of the gateway has it already."""
        if self._certificate_pem == pem:
            return
        try:
            self._control.replace_certificate(pem)
        except TrainingError:
            return
        self._certificate_pem = pem

    def renew(self, number: int, deadline_s: float) -> None:
        """Let the gateway live until `deadline_s`."""
        if not self.is_over(number):
            self._driver.renew(self._run_folder(number), deadline_s)

    def stop(self, number: int) -> None:
        """Ask the gateway to end."""
        self._driver.stop(self._run_folder(number))

    def is_over(self, number: int) -> bool:
        """Return whether no process of the gateway lives."""
        return self._driver.poll(self._run_folder(number)).is_over

    def _run_folder(self, number: int) -> Path:
        return self._folder.run(f"gateway-{number}")


def report_of(status: GatewayStatus) -> GatewayReport:
    """Return a gateway's status as the broker hears it."""
    return GatewayReport(
        view_number=status.view_number or 0,
        sealed_round=status.sealed_round,
        chain_hash=status.chain_hash,
        applied_round=status.applied_round,
        outer_hash=status.outer_hash,
        samples_done=status.samples_done,
        samples_by_site=status.samples_by_site,
        hub_lost_s=status.hub_lost_s,
        members_lost_s=status.members_lost_s,
        waiting_for=status.waiting_for,
    )
