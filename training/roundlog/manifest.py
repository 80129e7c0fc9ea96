"""The seal of one sync round: a manifest of the contributions that count, chained by hash.

A manifest carries the signed headers themselves, so whoever holds the chain can check every
claim in it. Its hash is the SHA-256 of the bytes that the hub signed; each manifest names the
hash before it, so one hash stands for a whole past.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import SignatureError
from training.roundlog.contribution import Contribution, open_contribution, read_header
from training.roundlog.errors import Reason, Refusal
from training.roundlog.ranges import RangeSet
from training.roundlog.signing import SignedDocument, canonical_json, open_signed, sign
from training.roundlog.view import Hash, View
from training.spec import SITES_PER_JOB_MAX, SiteId

MANIFEST_PURPOSE: Final = "manifest"


class ManifestEntry(BaseModel):
    """One site's signed header. The site stands outside, so its key is found before anything is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site_id: SiteId
    contribution: SignedDocument


class Manifest(BaseModel):
    """What a hub signs about one round. Entries stand in site order, the order of the merge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str = Field(max_length=64)
    view_number: int = Field(ge=1)
    round_number: int = Field(ge=1)
    previous_hash: Hash
    sealed_by: SiteId
    entries: tuple[ManifestEntry, ...] = Field(min_length=1, max_length=SITES_PER_JOB_MAX)


@dataclass(frozen=True, slots=True)
class SealedManifest:
    """A manifest with its contributions read, its document and its hash."""

    manifest: Manifest
    contributions: tuple[Contribution, ...]
    document: SignedDocument
    manifest_hash: str

    @property
    def round_number(self) -> int:
        """Return the round that this manifest seals."""
        return self.manifest.round_number

    def contribution(self, site_id: str) -> Contribution | None:
        """Return the entry of `site_id`, None where the round went without it."""
        return next((entry for entry in self.contributions if entry.header.site_id == site_id), None)


def seal_manifest(
    view: View, round_number: int, previous_hash: str, contributions: tuple[Contribution, ...], key: Ed25519PrivateKey
) -> SealedManifest:
    """Sign the seal of `round_number` as the hub of `view`."""
    manifest = Manifest(
        job_id=view.job_id,
        view_number=view.number,
        round_number=round_number,
        previous_hash=previous_hash,
        sealed_by=view.hub,
        entries=tuple(
            ManifestEntry(site_id=entry.header.site_id, contribution=entry.document) for entry in contributions
        ),
    )
    payload = canonical_json(manifest.model_dump(mode="json"))
    return SealedManifest(manifest, contributions, sign(key, MANIFEST_PURPOSE, payload), payload_hash(payload))


def open_manifest(document: SignedDocument, view: View, *, bytes_max: int) -> SealedManifest:
    """Return the manifest that the hub of `view` signed, every entry verified. Raises Refusal.

    Whether it continues a chain is for `training.roundlog.log` to say.
    """
    hub = view.member(view.hub)
    assert hub is not None, "a view's hub is a member"
    try:
        payload = open_signed(document, MANIFEST_PURPOSE, hub.attempt_key)
    except SignatureError as error:
        raise Refusal(Reason.SIGNATURE, f"hub {view.hub}: {error}") from None
    manifest = _parse(payload)
    if manifest.job_id != view.job_id:
        message = f"the manifest belongs to job {manifest.job_id}, not {view.job_id}"
        raise Refusal(Reason.WRONG_JOB, message)
    if manifest.view_number != view.number or manifest.sealed_by != view.hub:
        message = (
            f"the manifest was sealed by {manifest.sealed_by} in view {manifest.view_number}, not in {view.number}"
        )
        raise Refusal(Reason.VIEW_DIFFERS, message)
    contributions = tuple(
        open_contribution(entry.contribution, entry.site_id, view, bytes_max=bytes_max) for entry in manifest.entries
    )
    _check_entries(manifest, contributions)
    return SealedManifest(manifest, contributions, document, payload_hash(payload))


def read_manifest(document: SignedDocument) -> SealedManifest:
    """Return a manifest whose hash a trusted hash vouches for; its signatures are not checked again."""
    try:
        payload = base64.b64decode(document.payload, validate=True)
        manifest = _parse(payload)
        contributions = tuple(
            Contribution(read_header(base64.b64decode(entry.contribution.payload, validate=True)), entry.contribution)
            for entry in manifest.entries
        )
    except ValueError:
        raise Refusal(Reason.MALFORMED, "the manifest is not base64; fetch it again") from None
    return SealedManifest(manifest, contributions, document, payload_hash(payload))


def payload_hash(payload: bytes) -> str:
    """Return the hash that the next manifest and the headers name."""
    return hashlib.sha256(payload).hexdigest()


def _parse(payload: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(payload)
    except ValidationError as error:
        message = f"the manifest does not have the agreed form: {error.errors()[0]['msg']}"
        raise Refusal(Reason.MALFORMED, message) from None


def _check_entries(manifest: Manifest, contributions: tuple[Contribution, ...]) -> None:
    sites = [entry.header.site_id for entry in contributions]
    if sites != sorted(set(sites)):
        raise Refusal(Reason.MALFORMED, f"the entries of round {manifest.round_number} are not in site order")
    taken = RangeSet()
    for entry in contributions:
        header = entry.header
        if header.round_number != manifest.round_number:
            message = f"{header.site_id} contributed to round {header.round_number}, not {manifest.round_number}"
            raise Refusal(Reason.ROUND_SEALED, message)
        if taken.overlaps(header.samples) is not None:
            raise Refusal(Reason.SAMPLES_OVERLAP, f"{header.site_id} repeats samples of another site of its round")
        taken = taken.union(header.samples)
