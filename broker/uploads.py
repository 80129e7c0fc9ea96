"""Uploads: chunks into the artifact store, and the row that says what the market holds.

The row is written once the file is whole, so a row never promises a file that is not there. A
file without a job is forgotten after a while (`broker.retention`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sqlalchemy.orm import Session

from broker.artifacts import ArtifactTooLargeError, Progress
from broker.database.tables import Artifact
from broker.database.uploads import SiteUpload, WorkdirUpload
from broker.errors import RefusedError
from broker.market import Market
from sites.bundle import BundleLimits, inspect
from sites.errors import BundleError

# What nobody's job has named by then is swept.
UNUSED_LIFE_MS: Final = 7 * 86_400 * 1000


class WorkdirRefusedError(RefusedError):
    """A workdir that breaks a rule of bundles; `code` is the rule's own."""

    def __init__(self, error: BundleError) -> None:
        """Keep the code and the sentence of the rule."""
        self.code = error.code  # type: ignore[misc]  # one class carries the codes of sites.errors.BundleError's tree
        super().__init__(str(error))


@dataclass(frozen=True, slots=True)
class Upload:
    """Which artifact a chunk is of, whose upload it is, and where it begins.

    A tenant or a site brings every byte itself, also of what is held already: only then may it name the digest, the
    tenant in a job (`tenant_id`), the site as a checkpoint or an output of one (`site_id`).
    """

    digest: str
    owner: str
    offset: int
    size_bytes: int
    bytes_max: int
    tenant_id: str | None = None
    site_id: str | None = None

    def __post_init__(self) -> None:
        """Hold that an upload is somebody's."""
        assert (self.tenant_id is None) != (self.site_id is None), "an upload is a tenant's or a site's"


def workdir_upload(market: Market, tenant_id: str, digest: str, *, offset: int = 0, size_bytes: int = 0) -> Upload:
    """Return the upload of a tenant's workdir."""
    return Upload(digest, f"tenant-{tenant_id}", offset, size_bytes, market.settings.workdir_bytes_max, tenant_id)


def site_upload(market: Market, site_id: str, digest: str, *, offset: int, size_bytes: int) -> Upload:
    """Return the upload of a site's checkpoint or output."""
    return Upload(digest, f"site-{site_id}", offset, size_bytes, market.settings.artifact_bytes_max, site_id=site_id)


def progress_of(market: Market, upload: Upload) -> Progress:
    """Return how much of an upload is held; nobody learns what others have uploaded."""
    return market.artifacts.progress(upload.digest, upload.owner, afresh=not _has_brought(market, upload))


def take_chunk(
    market: Market, upload: Upload, chunk: bytes, check: Callable[[Market, str], None] | None = None
) -> Progress:
    """Add a chunk; with the last one `check` decides whether the whole may stay.

    Raises what `ArtifactStore.append` raises, and what `check` raises: the file is then removed.
    """
    if upload.size_bytes > upload.bytes_max:
        raise ArtifactTooLargeError(
            f"{upload.size_bytes} bytes are more than the {upload.bytes_max} that are taken here"
        )
    store = market.artifacts
    progress = store.append(
        upload.digest,
        chunk,
        owner=upload.owner,
        offset=upload.offset,
        size_bytes=upload.size_bytes,
        afresh=not _has_brought(market, upload),
    )
    if not progress.complete:
        return progress
    if check is not None:
        # Also where the file came from elsewhere: a checkpoint of a site is no workdir by that.
        check(market, upload.digest)
    return progress if _keep_rows(market, upload, progress.held_bytes) else Progress(0, complete=False)


def check_workdir(market: Market, digest: str) -> None:
    """Refuse a workdir that no site would unpack, and forget it. Raises WorkdirRefusedError."""
    limits = BundleLimits(packed_bytes_max=market.settings.workdir_bytes_max)
    try:
        with market.artifacts.open(digest) as stream:
            inspect(stream, limits)
    except BundleError as error:
        discard_unkept(market, digest)
        raise WorkdirRefusedError(error) from None


def discard_unkept(market: Market, digest: str) -> None:
    """Remove a file that no row promises; one that was promised meanwhile stays."""
    with market.artifacts.settled(digest):
        if market.database.read(lambda session: session.get(Artifact, digest)) is None:
            market.artifacts.discard(digest)


def _has_brought(market: Market, upload: Upload) -> bool:
    """Say whether its owner has brought all of it before."""
    return market.database.read(lambda session: _brought(session, upload)) is not None


def _brought(session: Session, upload: Upload) -> WorkdirUpload | SiteUpload | None:
    if upload.tenant_id is not None:
        return session.get(WorkdirUpload, (upload.tenant_id, upload.digest))
    return session.get(SiteUpload, (upload.site_id, upload.digest))


def _keep_rows(market: Market, upload: Upload, size_bytes: int) -> bool:
    """Promise the file; False where a sweep has removed it since its last byte came: it is to be brought again."""
    now_ms = market.clock.now_ms()

    def work(session: Session) -> None:
        known = session.get(Artifact, upload.digest)
        if known is None or not known.complete:
            session.merge(
                Artifact(
                    digest=upload.digest,
                    size_bytes=size_bytes,
                    complete=True,
                    created_ms=now_ms,
                    expires_ms=now_ms + UNUSED_LIFE_MS,
                )
            )
        elif known.expires_ms is not None:
            known.expires_ms = max(known.expires_ms, now_ms + UNUSED_LIFE_MS)
        session.flush()
        if _brought(session, upload) is not None:
            return
        if upload.tenant_id is not None:
            session.add(WorkdirUpload(tenant_id=upload.tenant_id, digest=upload.digest, created_ms=now_ms))
        else:
            session.add(SiteUpload(site_id=upload.site_id, digest=upload.digest, created_ms=now_ms))

    with market.artifacts.settled(upload.digest) as is_here:
        if is_here:
            market.database.write("artifact", work)
        return is_here
