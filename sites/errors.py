"""The errors of a site, each with a stable code that operators and the broker may rely on."""

from __future__ import annotations

from typing import ClassVar


class SiteError(Exception):
    """Something that the site could not do; the message says what, why and what to do next."""

    code: ClassVar[str] = "site.failed"


class JoinStringError(SiteError):
    """A join string that is not one, is cut, or names a market that must not be dialled."""

    code = "join.invalid"


class IdentityError(SiteError):
    """The site's folder holds no identity, half of one, or that of another site."""

    code = "identity.invalid"


class SettingsError(SiteError):
    """A site.yaml that cannot be used; the message lists every fault with its line."""

    code = "settings.invalid"


class AskError(SiteError):
    """An ask, or a file of power prices, that cannot be used."""

    code = "ask.invalid"


class StatementError(SiteError):
    """There is no statement to show."""

    code = "statement.missing"


class PolicyError(SiteError):
    """A policy.yaml that cannot be used; the message lists every fault with its line."""

    code = "policy.invalid"


class SandboxError(SiteError):
    """Strangers' code cannot be confined on this host; the message names the remedy."""

    code = "sandbox.unavailable"


class AgentRunningError(SiteError):
    """Another agent works in this folder: two would fence each other's attempts."""

    code = "agent.running"


class JournalError(SiteError):
    """The journal was written by a newer version or is not one."""

    code = "journal.invalid"


class BundleError(SiteError):
    """A workdir bundle that is refused; `code` tells a tenant which rule it broke."""

    code = "bundle.invalid"


class BundleTooLargeError(BundleError):
    """A bundle with too many bytes or members, packed or unpacked."""

    code = "bundle.too_large"


class BundlePathError(BundleError):
    """A member that would land outside the workdir, or whose name no file should have."""

    code = "bundle.path"


class BundleMemberError(BundleError):
    """A member that is neither a plain file nor a folder: a link, a device, a sparse file."""

    code = "bundle.member"


class BundleReservedNameError(BundleError):
    """A top-level name that would shadow one of Hansa's own packages."""

    code = "bundle.reserved_name"


class BundleDigestError(BundleError):
    """Bytes that are not those that the job names."""

    code = "bundle.digest"


class DriverError(SiteError):
    """The driver could not start or find the processes of an attempt."""

    code = "driver.failed"


class SlurmAwayError(DriverError):
    """slurmctld does not answer; what was asked of it may be asked again."""

    code = "driver.slurm_away"


class GatewayError(SiteError):
    """The attempt's gateway does not start, or does not answer."""

    code = "gateway.failed"


class BrokerConnectionError(SiteError):
    """The broker could not be reached, or broke off; the same request may be sent again."""

    code = "broker.unreachable"


class BrokerAnswerError(SiteError):
    """The broker's answer does not fit the protocol: one of the two sides must be brought up to date."""

    code = "broker.answer"


class RequestRefusedError(SiteError):
    """The broker refused a request; `status`, `problem_code` and `detail` are from its problem+json."""

    code = "broker.refused"

    def __init__(self, status: int, problem_code: str, detail: str) -> None:
        """Keep what the broker said."""
        self.status = status
        self.problem_code = problem_code
        self.detail = detail
        super().__init__(f"the broker refused ({status}, {problem_code}): {detail}")


class ArtifactError(SiteError):
    """An artifact whose bytes do not match its digest, or that is larger than allowed."""

    code = "artifact.invalid"


class DataError(SiteError):
    """A job's dataset that cannot be had here."""

    code = "data.failed"


class DataManifestError(DataError):
    """A manifest.json that is not one."""

    code = "data.manifest"


class DataPathError(DataError):
    """A file of a dataset that would lie outside its folder, stands twice, or is no plain file."""

    code = "data.path"


class DataDigestError(DataError):
    """Bytes of a dataset that are not those that its digest or its manifest names."""

    code = "data.digest"


class DataAlteredError(DataError):
    """A dataset kept at this site that is no longer what its digest names."""

    code = "data.altered"


class DataTooLargeError(DataError):
    """A dataset larger than its job states."""

    code = "data.too_large"


class DataCacheFullError(DataError):
    """A dataset that does not fit into what the site keeps, or not beside those that running jobs use."""

    code = "data.cache_full"


class DataSourceError(DataError):
    """A source that the owner's policy does not cover."""

    code = "data.source_refused"


class DataUnreachableError(DataError):
    """A source that does not answer, or does not have the file."""

    code = "data.unreachable"


class DataMissingError(DataError):
    """A dataset that is not here and has no source."""

    code = "data.missing"


class StagingStoppedError(DataError):
    """The attempt that needed the data was ended meanwhile."""

    code = "data.stopped"
