"""What broker and agent say to each other of probes; parts of a heartbeat and of its answer (`sites.protocol`).

order        -> reply with a key, or a refusal
order again, with a certificate and the peer's key  -> the probe runs -> report, until it is no longer ordered
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from training.roundlog.view import Address, Hash
from training.spec import SiteId

# A site is in one probe at a time; what a former one has left to say may still be on its way.
PROBES_PER_SITE_MAX: Final = 4
PROBE_STREAMS_MAX: Final = 16
PROBE_BYTES_MAX: Final = 10**10

ProbeId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]
Pem = Annotated[str, StringConstraints(max_length=8192)]
Sentence = Annotated[str, StringConstraints(max_length=1000)]


class ProbeMessage(BaseModel):
    """A part of the protocol: unknown fields are refused, so that a misspelling is found."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ProbeTerms(ProbeMessage):
    """What a site's owner allows the probes of its links to take."""

    bytes_per_day: int = Field(default=4 * 10**9, ge=0, le=10**15, description="sent and received together")
    while_syncing: bool = Field(default=False, description="also while a job that spans sites runs here")


class ProbeOrder(ProbeMessage):
    """A probe of the link to `peer`. The site replies with a key; the order comes again with what it takes to begin.

    The certificate is for this probe alone and ends with it. `expires_s` counts from when the heartbeat was sent.
    """

    probe_id: ProbeId
    peer: SiteId
    listens: bool = Field(description="this site listens, and the other dials")
    streams: int = Field(ge=1, le=PROBE_STREAMS_MAX)
    bytes_max: int = Field(ge=1, le=PROBE_BYTES_MAX, description="in each direction")
    seconds_max: float = Field(gt=0, le=60, description="of sending, in each direction")
    expires_s: float = Field(gt=0, le=3600)
    certificate_pem: Pem | None = None
    peer_key: Hash | None = None
    address: Address | None = Field(default=None, description="where the peer listens")


class ProbeReply(ProbeMessage):
    """The site is ready for a probe, or refuses it. Key and request are for this probe's certificate."""

    probe_id: ProbeId
    probe_key: Hash | None = None
    csr_pem: Pem | None = None
    address: Address | None = Field(default=None, description="where it will listen, if it is to")
    refused: Sentence = ""


class Flow(ProbeMessage):
    """What went in one direction, as one end saw it; `bits_per_s` leaves out the streams' slow start.

    Segments are the sender's own count, None where its system does not tell.
    """

    size_bytes: int = Field(ge=0, le=PROBE_BYTES_MAX)
    seconds: float = Field(gt=0, le=3600)
    bits_per_s: float = Field(ge=1, le=1e15)
    segments_sent: int | None = Field(default=None, ge=0, le=10**12)
    segments_again: int | None = Field(default=None, ge=0, le=10**12)


class ProbeReport(ProbeMessage):
    """What a probe found, as one end saw it, or why it failed; repeated until the broker no longer orders it."""

    probe_id: ProbeId
    failed: Sentence = ""
    sent: Flow | None = None
    received: Flow | None = None
    round_trip_s: float | None = Field(default=None, ge=0, le=120)
