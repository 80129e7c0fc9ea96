"""A contribution: what one site adds to one sync round, as a signed header and an immutable blob.

The blob is the site's compressed fragments, one after the other. The header says all that others
need in order to accept it without reading it: whose it is, for which view and round, its digest
and size, what it weighs, which samples it covers, and which past its author holds. The attempt
key signs it, so a hub can relay or leave it out but never change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import SignatureError
from training.exchange import Entry, Leaving, SampleRange
from training.roundlog.errors import Reason, Refusal
from training.roundlog.ranks_wire import FRAGMENTS_MAX, RANGES_MAX
from training.roundlog.signing import SignedDocument, canonical_json, open_signed, sign
from training.roundlog.view import Hash, View
from training.spec import SAMPLES_MAX, SiteId

CONTRIBUTION_PURPOSE: Final = "contribution"
# A header at its limits (1,024 fragments and ranges) takes about 160 kB; eight of them, base64
# twice over, still fit a manifest of signing.DOCUMENT_BYTES_MAX.
HEADER_BYTES_MAX: Final = 256_000


class FragmentPart(BaseModel):
    """Length and SHA-256 of one fragment's bytes inside the blob."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_bytes: int = Field(ge=0)
    digest: Hash


class Header(BaseModel):
    """What a site signs about its contribution to one round.

    `previous_hash` is the last manifest that the author holds and `outer_hash` the outer state
    that its work started from: a site that was told another past gives itself away here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str = Field(max_length=64)
    view_number: int = Field(ge=1)
    round_number: int = Field(ge=1)
    site_id: SiteId
    epoch: int = Field(ge=1)
    digest: Hash
    size_bytes: int = Field(ge=0)
    weight: int = Field(ge=0)
    samples: tuple[SampleRange, ...] = Field(max_length=RANGES_MAX)
    fragments: tuple[FragmentPart, ...] = Field(min_length=1, max_length=FRAGMENTS_MAX)
    previous_hash: Hash
    outer_hash: Hash
    leaving: Leaving | None = Field(default=None, description="its author was asked to stop: it does after this round")

    def entry(self) -> Entry:
        """Return the contribution as the ranks see it in a sealed round."""
        return Entry(self.site_id, self.weight, self.samples, tuple(range(len(self.fragments))), self.leaving)

    def fragment_span(self, fragment: int) -> tuple[int, int]:
        """Return where `fragment` starts and stops in the blob, in bytes."""
        start = sum(part.size_bytes for part in self.fragments[:fragment])
        return start, start + self.fragments[fragment].size_bytes


@dataclass(frozen=True, slots=True)
class Contribution:
    """A header whose signature holds, with the document that proves it."""

    header: Header
    document: SignedDocument


def sign_contribution(header: Header, key: Ed25519PrivateKey) -> Contribution:
    """Sign `header` with the site's attempt key."""
    # What is not said is left out, so that gateways from before it could be said read the rest.
    said = header.model_dump(mode="json", exclude_none=True)
    return Contribution(header, sign(key, CONTRIBUTION_PURPOSE, canonical_json(said)))


def open_contribution(document: SignedDocument, site_id: str, view: View, *, bytes_max: int) -> Contribution:
    """Return the contribution that `site_id` signed for `view`. Raises Refusal where a check fails."""
    member = view.member(site_id)
    if member is None:
        message = f"{site_id} is not a member of view {view.number}; wait for a view that lists it"
        raise Refusal(Reason.NOT_MEMBER, message)
    # base64 takes four characters for three bytes; the form is checked before the costlier signature.
    if len(document.payload) > HEADER_BYTES_MAX * 4 // 3 + 4:
        message = f"the header of {site_id} exceeds {HEADER_BYTES_MAX} bytes; use fewer fragments or sample ranges"
        raise Refusal(Reason.TOO_LARGE, message)
    try:
        payload = open_signed(document, CONTRIBUTION_PURPOSE, member.attempt_key)
    except SignatureError as error:
        raise Refusal(Reason.SIGNATURE, f"{site_id}: {error}") from None
    header = read_header(payload)
    if header.job_id != view.job_id or header.site_id != site_id:
        message = f"{site_id} sent a contribution of {header.site_id} to job {header.job_id}, here is {view.job_id}"
        raise Refusal(Reason.WRONG_JOB, message)
    if header.view_number != view.number:
        message = f"{site_id} signed for view {header.view_number}, here is view {view.number}; sign again"
        raise Refusal(Reason.VIEW_DIFFERS, message)
    if header.epoch != member.epoch:
        message = f"{site_id} signed as epoch {header.epoch}, its lease has epoch {member.epoch}; start a new attempt"
        raise Refusal(Reason.WRONG_EPOCH, message)
    if header.weight > member.weight_max:
        message = f"{site_id} weighs {header.weight} samples, its lease allows {member.weight_max}"
        raise Refusal(Reason.OVERWEIGHT, message)
    _check_sizes(header, bytes_max)
    _check_samples(header)
    return Contribution(header, document)


def read_header(payload: bytes) -> Header:
    """Return the header in bytes whose signature, or whose hash in the chain, was verified before."""
    try:
        return Header.model_validate_json(payload)
    except ValidationError as error:
        message = f"the header does not have the agreed form: {error.errors()[0]['msg']}"
        raise Refusal(Reason.MALFORMED, message) from None


def _check_sizes(header: Header, bytes_max: int) -> None:
    if header.size_bytes > bytes_max:
        message = f"{header.site_id} announces {header.size_bytes} bytes, the job allows {bytes_max}"
        raise Refusal(Reason.TOO_LARGE, message)
    if sum(part.size_bytes for part in header.fragments) != header.size_bytes:
        message = f"the fragments of {header.site_id} do not add up to its {header.size_bytes} bytes"
        raise Refusal(Reason.LENGTHS, message)


def _check_samples(header: Header) -> None:
    if header.samples and header.samples[-1].stop > SAMPLES_MAX:
        message = f"{header.site_id} names sample {header.samples[-1].stop}, beyond {SAMPLES_MAX}"
        raise Refusal(Reason.SAMPLES, message)
    if any(later.start < earlier.stop for earlier, later in pairwise(header.samples)):
        message = f"the sample ranges of {header.site_id} must rise without overlap"
        raise Refusal(Reason.SAMPLES, message)
