"""The errors of supervision, each with a stable code that callers may rely on."""

from __future__ import annotations

from typing import ClassVar


class SuperviseError(Exception):
    """A process or service that could not be had; the message says what, why and what to do next."""

    code: ClassVar[str] = "supervise.failed"


class StartError(SuperviseError):
    """A process that could not be started at all: no such program, no permission, no memory."""

    code: ClassVar[str] = "supervise.not_started"


class NotReadyError(SuperviseError):
    """A process that runs but did not pass its readiness probe in time."""

    code: ClassVar[str] = "supervise.not_ready"


class ProcessDiedError(SuperviseError):
    """A process that ended although nobody had asked it to."""

    code: ClassVar[str] = "supervise.died"


class ServiceUnavailableError(SuperviseError):
    """A service that this host cannot provide, with what would provide it."""

    code: ClassVar[str] = "supervise.service_unavailable"
