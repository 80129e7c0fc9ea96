"""The broker's errors. Each has a stable `code`; the API maps `status` and `code` to problem+json."""

from __future__ import annotations

from typing import ClassVar


class BrokerError(Exception):
    """Something the broker refuses or could not do; the message says what, why and what next."""

    code: ClassVar[str] = "broker.failed"
    status: ClassVar[int] = 500


class BusyError(BrokerError):
    """The database or a worker was too busy; nothing was changed."""

    code = "broker.busy"
    status = 503


class RefusedError(BrokerError):
    """A request that is understood and not allowed as it stands."""

    code = "request.refused"
    status = 422


class NotFoundError(BrokerError):
    """What was asked for does not exist, or is not the caller's to see."""

    code = "request.not_found"
    status = 404


class ConflictError(BrokerError):
    """The thing is in a state that does not allow this."""

    code = "request.conflict"
    status = 409


class IllegalTransitionError(ConflictError):
    """A state change that the table of legal transitions does not hold."""

    code = "state.illegal"


class CredentialError(BrokerError):
    """A credential that is missing, unknown, expired, revoked, replayed or forged."""

    code = "credential.invalid"
    status = 401


class ScopeError(BrokerError):
    """A valid credential without the right to do this."""

    code = "credential.scope"
    status = 403


class InsufficientFundsError(RefusedError):
    """An account holds less than the transfer needs."""

    code = "ledger.insufficient"


class LedgerError(RefusedError):
    """A posting that the rules of the ledger do not allow."""

    code = "ledger.refused"


class StaleEpochError(ConflictError):
    """A message about a lease under an epoch that is no longer the newest."""

    code = "lease.stale_epoch"


class NeverPossibleError(RefusedError):
    """A job that no state of this federation could ever hold."""

    code = "job.never_possible"
