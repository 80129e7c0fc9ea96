"""What members and their hub say to each other over mutual TLS, and the limits on it.

All paths stand under /views/N: a hub answers only members whose view is its own.

    GET  /state?after_round=&applied_round=&seeking=&seen=&wait_s=   HubState, once it is not `seen`
    POST /contributions                      SignedDocument header -> BlobState
    GET  /blobs/D                            one chunk by Range
    GET  /blobs/D/state                      BlobState
    PUT  /blobs/D?offset=                    one chunk -> BlobState
    GET  /chain?after_round=                 ChainPage
    POST /chain                              ChainPage -> 204, towards the view's base
    POST /snapshot                           SnapshotNote -> BlobState, where the hub wants one
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from training.roundlog.signing import SignedDocument
from training.roundlog.view import Hash
from training.spec import SITES_PER_JOB_MAX

# The largest body: a manifest of signing.DOCUMENT_BYTES_MAX in base64, alone on its page.
BODY_BYTES_MAX: Final = 8_000_000
CHAIN_PAGE_BYTES: Final = 2_000_000
STATE_WAIT_S_MAX: Final = 10.0
WANTED_MAX: Final = 512


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SnapshotNote(_Document):
    """A snapshot that can be had: the outer state after a round, as a blob."""

    round_number: int = Field(ge=0)
    manifest_hash: Hash
    outer_hash: Hash | None
    digest: Hash
    size_bytes: int = Field(ge=1)


class BlobState(_Document):
    """The chunks that the hub still lacks of a blob, none once it holds it."""

    missing: tuple[int, ...]


class HubState(_Document):
    """What a hub tells a member that follows it.

    `version` rises with every change. `manifest` is the seal after the member's last round.
    `wanted` are blobs that the hub lacks and any member may bring; so is a snapshot where
    `snapshot_wanted`. `applied_by_all` is the round that every member has applied.
    """

    version: int
    behind: bool
    sealed_round: int
    chain_hash: Hash
    manifest: SignedDocument | None
    waiting_for: tuple[str, ...] = Field(max_length=SITES_PER_JOB_MAX)
    applied_by_all: int
    wanted: tuple[Hash, ...] = Field(max_length=WANTED_MAX)
    snapshot: SnapshotNote | None
    snapshot_wanted: bool
