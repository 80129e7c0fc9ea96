"""Signed documents: canonical JSON under an Ed25519 signature.

The bytes that were signed travel as they are, so no two implementations need to agree on a
canonical form; a document is read only after its signature holds.
"""

from __future__ import annotations

import base64
import json
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict, Field

from training.errors import SignatureError

DOCUMENT_BYTES_MAX: Final = 4_000_000


class SignedDocument(BaseModel):
    """A document and its signature, both base64. `purpose` separates the kinds that a key signs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    purpose: str = Field(max_length=64)
    payload: str = Field(max_length=DOCUMENT_BYTES_MAX)
    signature: str = Field(max_length=128)


def canonical_json(document: Any) -> bytes:  # noqa: ANN401  any JSON value
    """Return `document` as compact UTF-8 JSON with sorted keys."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def public_hex(key: Ed25519PrivateKey) -> str:
    """Return the raw public key of `key` as 64 hexadecimal digits."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def sign(key: Ed25519PrivateKey, purpose: str, payload: bytes) -> SignedDocument:
    """Sign `payload` for one `purpose`: the signature over another purpose does not hold."""
    return SignedDocument(
        purpose=purpose,
        payload=base64.b64encode(payload).decode(),
        signature=base64.b64encode(key.sign(_signed_bytes(purpose, payload))).decode(),
    )


def open_signed(document: SignedDocument, purpose: str, public_key_hex: str) -> bytes:
    """Return the payload of `document` if `public_key_hex` signed it for `purpose`.

    Raises SignatureError otherwise.
    """
    if document.purpose != purpose:
        message = f"expected a document signed for {purpose!r}, got {document.purpose!r}"
        raise SignatureError(message)
    try:
        payload = base64.b64decode(document.payload, validate=True)
        signature = base64.b64decode(document.signature, validate=True)
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key_hex))
        key.verify(signature, _signed_bytes(purpose, payload))
    except (InvalidSignature, ValueError):
        message = f"the signature of this {purpose} document does not hold; it was altered or comes from another key"
        raise SignatureError(message) from None
    return payload


def _signed_bytes(purpose: str, payload: bytes) -> bytes:
    return b"hansa/" + purpose.encode() + b"\0" + payload
