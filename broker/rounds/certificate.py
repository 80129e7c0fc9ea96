"""The signed certificate of a round: what the market states of it, under a key that anyone can check.

`hold_round` signs it with the commit, `broker.rounds.economics` signs it again once it knows what sharing was worth.
The key (Ed25519) signs nothing else; the market's certificate authority, which every client pins, vouches for it in a
certificate that travels with each document. So `ca.pem` is all that a reader needs; with the round's snapshot and
clearing the figures can be recomputed too (`hansa market verify`).
"""

from __future__ import annotations

from typing import Any, Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.allocation.clearing import Certificate, Clearing, Placement
from broker.errors import RefusedError
from broker.identity.authority import ROUNDS_URI, Authority
from pricing.money import divide_up
from training.errors import SignatureError
from training.roundlog.signing import SignedDocument, canonical_json, open_signed

PURPOSE: Final = "round-certificate"
STATEMENT_VERSION: Final = 1

EconomicsState = Literal["pending", "done", "left_out"]


class CertificateError(RefusedError):
    """A round's certificate that does not hold."""

    code = "certificate.unsound"


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Balance(_Row):
    """Where the money of new and renewed placements goes per hour, in micro-credits.

    charges + uplift = payouts + link revenue + fees, before egress, which passes through by the byte.
    """

    charges_micros_per_hour: int
    uplift_micros_per_hour: int
    payouts_micros_per_hour: int
    link_revenue_micros_per_hour: int
    fees_micros_per_hour: int

    @property
    def is_even(self) -> bool:
        """Whether what is given is what is taken."""
        given = self.charges_micros_per_hour + self.uplift_micros_per_hour
        taken = self.payouts_micros_per_hour + self.link_revenue_micros_per_hour + self.fees_micros_per_hour
        return given == taken and min(self.model_dump().values()) >= 0


class ThresholdAudit(_Row):
    """What buyers would have paid under the Threshold rule; it is never charged.

    A buyer that pays more than under it could have gained up to that much by bidding lower.
    """

    trades: int
    paid_micros_per_hour: int
    threshold_micros_per_hour: int
    shading_gain_micros_per_hour: int
    shading_gain_most_micros_per_hour: int


class Economics(_Row):
    """Whether sharing paid, at this round's prices; the sites' own rows are with the market's admin.

    `core_slack` is the least that any coalition tried gains by staying: below minus the gap, one would rather leave.
    `sites_better_off` have at least what they had alone. `gain_least` and `gain_median` are in the federation over
    alone, None where no site has anything alone. `division_distance` is how far the Owen division, which is paid, is
    from Shapley's: None where not every coalition was tried, or a job belongs to no site.
    """

    sites: int
    sites_better_off: int
    gain_least: float | None
    gain_median: float | None
    core_slack_micros_per_hour: int
    coalitions: int
    complete: bool
    division_distance: float | None
    jobs_without_home: int
    threshold: ThresholdAudit | None
    sites_digest: str = Field(description="SHA-256 of the sites' rows as canonical JSON")
    seconds: float


class Statement(_Row):
    """What the market states of a round. Digests are SHA-256; `seconds` are by phase of the solver."""

    version: Literal[1] = STATEMENT_VERSION
    market: str
    round_number: int
    taken_ms: int
    committed_ms: int
    snapshot_digest: str = Field(description="of the snapshot in columns, as the clearing names it")
    clearing_digest: str
    status: str
    solver: str
    payment_rule: str
    jobs_considered: int
    jobs_placed: int
    jobs_dropped: int = Field(description="placements that no longer held at the commit")
    jobs_unsupported_share: float
    regret_and_slack_share: float = Field(description="what prices fail to support, of the bound")
    certificate: Certificate
    balance: Balance
    buyers_above_value: int
    pools_below_ask: int
    seconds: dict[str, float]
    economics_state: EconomicsState = "pending"
    economics: Economics | None = None


class SignedCertificate(_Row):
    """A statement under its signature, and the certificate that vouches for the key."""

    signed: SignedDocument
    key_pem: str = Field(max_length=8192)


def balance_of(clearing: Clearing) -> Balance:
    """Return where the money of a clearing's new and renewed placements goes; kept ones go on under their terms."""
    charges = uplift = payouts = revenue = 0
    for row in clearing.placements:
        if row.action == "keep":
            continue
        charges += row.charge_micros_per_hour
        uplift += row.uplift_micros_per_hour
        payouts += sum(pool.payout_micros_per_gpu_hour * pool.gpus for pool in row.pools)
        revenue += sum(link.rent_micros_per_hour for link in row.links)
    return Balance(
        charges_micros_per_hour=charges,
        uplift_micros_per_hour=uplift,
        payouts_micros_per_hour=payouts,
        link_revenue_micros_per_hour=revenue,
        fees_micros_per_hour=charges + uplift - payouts - revenue,
    )


def above_value(clearing: Clearing) -> int:
    """Count the buyers that pay more than their value, egress included: none, in a sound clearing."""
    return sum(
        row.charge_micros_per_hour + egress_micros_per_hour(row)
        > max(row.value_micros_per_hour, egress_micros_per_hour(row))
        for row in clearing.placements
        if row.action != "keep"
    )


def sign_statement(authority: Authority, statement: Statement) -> SignedCertificate:
    """Sign a statement with the market's key for rounds."""
    signed = authority.sign_round(PURPOSE, canonical_json(statement.model_dump(mode="json")))
    return SignedCertificate(signed=signed, key_pem=authority.rounds_key_pem)


def read_statement(document: SignedCertificate) -> Statement:
    """Return the statement of a document that comes from the market's own database, unchecked."""
    return open_certificate(document, None)


def open_certificate(document: SignedCertificate, ca_pem: str | None) -> Statement:
    """Return what a document states if `ca_pem` vouches for its key and the key has signed it.

    None as authority leaves the former unchecked. Raises CertificateError where something does not hold.
    """
    try:
        certificate = x509.load_pem_x509_certificate(document.key_pem.encode())
        if ca_pem is not None:
            certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem.encode()))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        message = "the certificate authority given did not vouch for the key of this certificate; is it this market's?"
        raise CertificateError(message) from None
    key = certificate.public_key()
    if ROUNDS_URI not in uris or not isinstance(key, Ed25519PublicKey):
        message = "the key of this certificate is not one for rounds; only such a key may state what a round was"
        raise CertificateError(message)
    try:
        payload = open_signed(document.signed, PURPOSE, key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex())
        return Statement.model_validate_json(payload)
    except (SignatureError, ValidationError) as error:
        raise CertificateError(str(error)[:500]) from None


def differences(statement: Statement, clearing: Clearing) -> list[str]:
    """Return in which figures a statement is not about this clearing; none, where it is."""
    balance = balance_of(clearing)
    pairs: list[tuple[str, Any, Any]] = [
        ("round_number", statement.round_number, clearing.round_number),
        ("snapshot_digest", statement.snapshot_digest, clearing.snapshot_digest),
        ("clearing_digest", statement.clearing_digest, clearing.digest()),
        ("status", statement.status, clearing.status),
        ("solver", statement.solver, clearing.solver),
        ("certificate", statement.certificate, clearing.certificate),
        ("jobs_placed", statement.jobs_placed, len(clearing.placements)),
        ("balance", statement.balance, balance),
        ("buyers_above_value", statement.buyers_above_value, above_value(clearing)),
    ]
    found = [f"{name}: stated {said}, is {is_}" for name, said, is_ in pairs if said != is_]
    if not balance.is_even:
        found.append("balance: what is given is not what is taken")
    return found


def egress_micros_per_hour(row: Placement) -> int:
    """Return what a placement's traffic between sites and from its data costs an hour, each row rounded up."""
    rates = [(link.egress_bytes_per_s, link.egress_price_micros_per_gb) for link in row.links]
    rates += [(data.bytes_per_s, data.price_micros_per_gb) for data in row.data]
    return sum(divide_up(size * 3600 * price, 10**9) for size, price in rates)
