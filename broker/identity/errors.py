"""Why a credential or a request for one is refused: one stable code for each reason.

The messages are constant, so that none tells a stranger more than its code does.
"""

from __future__ import annotations

from typing import ClassVar

from broker.errors import CredentialError, RefusedError, ScopeError


class CertificateRequestError(RefusedError):
    """A certificate request that cannot be read, lacks proof of its key, or is for another key."""

    code: ClassVar[str] = "certificate.request_invalid"


class MissingCredentialError(CredentialError):
    """No credential at all."""

    code = "credential.missing"


class MalformedCredentialError(CredentialError):
    """A credential that has not the form of one."""

    code = "credential.malformed"


class UnknownCredentialError(CredentialError):
    """A token that was never issued, or whose secret is wrong."""

    code = "credential.unknown"


class ExpiredCredentialError(CredentialError):
    """A token, session or certificate whose time is over."""

    code = "credential.expired"


class RevokedCredentialError(CredentialError):
    """A token, session or certificate that was taken back."""

    code = "credential.revoked"


class WrongKindError(ScopeError):
    """A valid credential of the wrong kind for this route."""

    code = "credential.kind"


class LoginError(CredentialError):
    """A name and password that do not belong together."""

    code = "login.refused"


class PasswordError(RefusedError):
    """A password that is too short or too long to keep."""

    code = "login.password"


class JoinTokenError(CredentialError):
    """A join token that is unknown, used, too old or meant for another site."""

    code = "join.refused"


class CertificateUnknownError(CredentialError):
    """A site's request under a certificate that the broker never issued."""

    code = "site.certificate_unknown"


class CertificateExpiredError(CredentialError):
    """A site's request under a certificate whose time is over."""

    code = "site.certificate_expired"


class CertificateRevokedError(CredentialError):
    """A site's request under a certificate that was taken back, or of a removed site."""

    code = "site.certificate_revoked"


class SignatureInvalidError(CredentialError):
    """A site's request whose signature does not hold."""

    code = "site.signature_invalid"


class RequestTimeError(CredentialError):
    """A site's request from too long ago, or from the future."""

    code = "site.time_outside_window"


class ReplayError(CredentialError):
    """A site's request whose sequence number was used before, or is too old to tell."""

    code = "site.sequence_replayed"
