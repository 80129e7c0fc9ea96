"""What the portal itself refuses, before any service is asked."""

from __future__ import annotations

from typing import ClassVar

from broker.errors import BrokerError, ScopeError


class ForgedFormError(BrokerError):
    """A form without the token of its sender's session, or sent by another website's page."""

    code: ClassVar[str] = "portal.form_forged"
    status = 403


class WrongRoleError(ScopeError):
    """A person who is signed in and whose role this page is not for."""

    code = "portal.role"


class SignInThrottledError(BrokerError):
    """Too many failed sign-ins from one address or for one name."""

    code = "portal.throttled"
    status = 429

    def __init__(self, message: str, retry_after_s: int) -> None:
        """Keep how long to wait, for the Retry-After header."""
        self.retry_after_s = retry_after_s
        super().__init__(message)
