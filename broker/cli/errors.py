"""What can go wrong at the command line, each kind with its exit code.

Exit codes are part of the interface: scripts may rely on them.

    0  done                      4  no such job, site or round
    1  refused, with a reason    5  credentials missing, unknown or without the right
    2  wrong usage or file       6  a watched job ended without finishing
    3  the broker is not there   130  interrupted
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import ClassVar, Final

DETAIL_LENGTH_MAX: Final = 4000


class CliError(Exception):
    """Something that the command reports and ends with; `next_step` says what to do about it."""

    exit_code: ClassVar[int] = 1
    code: str = "cli.refused"

    def __init__(self, detail: str, *, next_step: str = "", code: str | None = None, status: int | None = None) -> None:
        """Keep what happened (`detail`) and what helps (`next_step`)."""
        super().__init__(detail)
        self.detail = detail[:DETAIL_LENGTH_MAX]
        self.next_step = next_step
        self.code = code or type(self).code
        self.status = status

    def as_json(self) -> str:
        """Return the error as one line of problem+json, for callers that asked for JSON."""
        fields = {"code": self.code, "status": self.status, "detail": self.detail, "next_step": self.next_step}
        return json.dumps({name: value for name, value in fields.items() if value not in (None, "")})


class UsageError(CliError):
    """A file or an option that cannot be used as it is."""

    exit_code = 2
    code = "cli.usage"


class UnreachableError(CliError):
    """No broker answered, or what answered is not one."""

    exit_code = 3
    code = "cli.unreachable"


class MissingError(CliError):
    """What was named does not exist."""

    exit_code = 4
    code = "cli.missing"


class RightsError(CliError):
    """The token is missing, unknown, or not allowed to do this."""

    exit_code = 5
    code = "cli.rights"


class UnfinishedError(CliError):
    """A job that was watched has ended, but not by finishing."""

    exit_code = 6
    code = "cli.unfinished"


# What a person can do about a problem whose own detail does not say it.
NEXT_STEPS: Final[dict[str, str]] = {
    "credential.invalid": "set HANSA_TOKEN or `hansa config set --token …`; the market's admin issues tokens",
    "credential.scope": "ask the market's admin for a token with this right",
    "request.not_found": "`hansa status` lists your jobs",
    "ledger.insufficient": "lower the budget, or ask the market's admin for a deposit; `hansa account` shows the balance",
    "job.never_possible": "ask for fewer GPUs, another type or more sites (market.sites_max); `hansa prices` lists pools",
    "broker.busy": "nothing was changed; try again in a moment",
}


def from_problem(status: int, problem: dict[str, object]) -> CliError:
    """Return the error for a problem+json answer of the broker."""
    code = str(problem.get("code") or "")
    detail = str(problem.get("detail") or problem.get("title") or f"the broker answered {status}")
    return _kind(status)(detail, next_step=NEXT_STEPS.get(code, ""), code=code or None, status=status)


def _kind(status: int) -> type[CliError]:
    if status == HTTPStatus.NOT_FOUND:
        return MissingError
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return RightsError
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return UnreachableError
    return CliError
