"""What the end of a run means for its attempt. Pure: exit codes, signals and limits to causes and sentences."""

from __future__ import annotations

from typing import Final

from sites.drivers.interface import EndCause, RunPhase, RunState
from sites.errors import BundleError, DataDigestError, DataError, DataManifestError, DataPathError, DataTooLargeError
from sites.protocol import ExitCause
from training.errors import EXIT_LEFT

# training.launch: the round log was lost for longer than the job's patience (EX_TEMPFAIL).
EXIT_EXCHANGE: Final = 75
# What a source gives everywhere: another site would fare no better.
_TENANTS_DATA_ERRORS: Final = (DataDigestError, DataManifestError, DataPathError, DataTooLargeError)


def conclusion(state: RunState) -> tuple[ExitCause, int | None, str]:
    """Return a run that was not asked to end as its attempt's end: cause, exit code and a sentence about it."""
    cause, detail = _end_of(state)
    return cause, state.exit_code, detail


def conclusion_without_files(error: Exception) -> tuple[ExitCause, None, str]:
    """Return the end of an attempt whose workdir, checkpoint or data could not be made ready."""
    if isinstance(error, BundleError):
        return ExitCause.BUNDLE, None, f"{error.code}: {error}"
    if isinstance(error, _TENANTS_DATA_ERRORS):
        return ExitCause.INPUT, None, f"{error.code}: {error}"
    if isinstance(error, DataError):
        return ExitCause.SITE, None, f"{error.code}: {error}"
    return ExitCause.SITE, None, f"the attempt's files could not be made ready: {error}"


def _end_of(state: RunState) -> tuple[ExitCause, str]:
    """Return why a run that was not asked to end is over, and a sentence about it."""
    if state.phase is RunPhase.LOST or state.cause is None:
        return ExitCause.SITE, state.detail
    if state.limit is not None and state.exit_code != 0:
        return ExitCause.LIMIT, f"{state.limit}: {state.detail}"
    if state.cause is not EndCause.EXIT:
        return _ENDED_BY_THE_SITE[state.cause][0], state.detail or _ENDED_BY_THE_SITE[state.cause][1]
    code = state.exit_code or 0
    number = -code if code < 0 else code - _SHELL_SIGNAL  # a sandbox tells of signals as a shell does
    if number in _LIMIT_SIGNALS:
        return ExitCause.LIMIT, f"killed by {_LIMIT_SIGNALS[number]}; most often memory or a resource limit"
    return _EXIT_CODES.get(code, (ExitCause.SCRIPT, f"exit code {code}; the end of the job's log says why"))


_ENDED_BY_THE_SITE: Final = {
    EndCause.EXPIRED: (ExitCause.EXPIRED, "the lease's liveness ran out"),
    EndCause.STOPPED: (ExitCause.SITE, "the run was ended by someone at the site"),
    EndCause.TIMEOUT: (ExitCause.LIMIT, "it ran longer than the operator allows"),
    EndCause.NOT_STARTED: (ExitCause.SITE, "the command could not be started"),
    EndCause.LIMIT: (ExitCause.LIMIT, "it took more than the operator allows"),
}
_EXIT_CODES: Final = {
    0: (ExitCause.DONE, ""),
    EXIT_LEFT: (ExitCause.LEFT, "it stopped at the end of a round, with a checkpoint"),
    EXIT_EXCHANGE: (ExitCause.EXCHANGE, "the round log was lost for longer than the job's patience"),
}
_SHELL_SIGNAL: Final = 128
# The kernel's ways to end a process at a limit.
_LIMIT_SIGNALS: Final = {9: "SIGKILL", 24: "SIGXCPU", 25: "SIGXFSZ"}
