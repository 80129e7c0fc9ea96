"""Views: who is in a job's round log, issued and signed by the broker alone.

A view has a rising number. Opening one takes two steps. First every member-to-be *promises* it:
from then on its gateway refuses seals of older views, and answers with its `ViewReport`. Then the
broker takes the highest report as the base and issues the `View`. The first view of a job has no
reports before it; its base is the start, or the checkpoint that the attempt resumes from.
"""

from __future__ import annotations

from typing import Annotated, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from training.roundlog.signing import SignedDocument, canonical_json, open_signed, sign
from training.spec import SITES_PER_JOB_MAX, SiteId

VIEW_PURPOSE: Final = "view"
# The chain of a new job starts from this value instead of a manifest's hash.
GENESIS_HASH: Final = "0" * 64

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Address = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.:\[\]-]{1,255}:[0-9]{1,5}$")]


class Member(BaseModel):
    """One site in a view.

    `attempt_key` is the raw Ed25519 public key (hex) that signs its contributions and stands in
    its TLS certificate; `address` is where its gateway listens, None where it only dials out;
    `weight_max` caps what one contribution may weigh, in samples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site_id: SiteId
    epoch: int = Field(ge=1)
    gpus: int = Field(ge=1)
    attempt_key: Hash
    address: Address | None
    weight_max: int = Field(ge=1)


class View(BaseModel):
    """The membership of one job's round log from `base_round` on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str = Field(max_length=64)
    number: int = Field(ge=1)
    members: tuple[Member, ...] = Field(min_length=1, max_length=SITES_PER_JOB_MAX)
    hub: SiteId
    standby: SiteId | None
    base_round: int = Field(ge=0)
    base_hash: Hash
    base_reporter: SiteId | None = Field(default=None, description="whose gateway holds the base's blobs")
    joining: tuple[SiteId, ...] = Field(
        default=(),
        max_length=SITES_PER_JOB_MAX,
        description="members that nobody waits for before the hub has heard them",
    )
    quorum: int = Field(ge=1)
    grace_s: float = Field(ge=0, le=3600)
    issued_ms: int

    @model_validator(mode="after")
    def _consistent(self) -> View:
        sites = [member.site_id for member in self.members]
        if sites != sorted(set(sites)):
            message = "members must stand once each, in the order of their site ids"
            raise ValueError(message)
        if self.hub not in sites or (self.standby is not None and self.standby not in sites):
            message = "hub and standby must be members"
            raise ValueError(message)
        if not set(self.joining) <= set(sites):
            message = "whoever joins must be a member"
            raise ValueError(message)
        if self.quorum > len(sites):
            message = f"a quorum of {self.quorum} cannot be met by {len(sites)} members"
            raise ValueError(message)
        return self

    def member(self, site_id: str) -> Member | None:
        """Return the member with `site_id`, None where it is not in this view."""
        return next((member for member in self.members if member.site_id == site_id), None)


class ViewReport(BaseModel):
    """A gateway's answer to a promise: how far its log reaches and which blobs it still holds.

    `base_round` and `chain` let a second reader check the claim: manifests, signed, from the
    reporter's own base up to `sealed_round`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    promised: int = Field(ge=1)
    sealed_round: int = Field(ge=0)
    chain_hash: Hash
    applied_round: int = Field(ge=0)
    outer_hash: Hash | None
    blobs: tuple[Hash, ...] = Field(default=(), max_length=10_000)


def sign_view(view: View, key: Ed25519PrivateKey) -> SignedDocument:
    """Sign `view` with the broker's authority key."""
    return sign(key, VIEW_PURPOSE, canonical_json(view.model_dump(mode="json")))


def open_view(document: SignedDocument, authority_key_hex: str) -> View:
    """Return the view in `document`. Raises SignatureError unless the broker signed it."""
    return View.model_validate_json(open_signed(document, VIEW_PURPOSE, authority_key_hex))
