"""A box that only one key opens: how a secret's value travels from the broker to the site that is about to start its job.

TLS ends at a proxy; this does not. The asker makes a key for one request, the other side answers to that key alone
(X25519, HKDF-SHA256, AES-256-GCM), and the context says what the box is for, so that it fits no other lease.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


def new_box_key() -> X25519PrivateKey:
    """Return a key for one box."""
    return X25519PrivateKey.generate()


def box_public_key(key: X25519PrivateKey) -> str:
    """Return what the other side needs to make the box: hex."""
    return key.public_key().public_bytes_raw().hex()


def secrets_context(lease_id: str, epoch: int) -> bytes:
    """Return what a box with the secrets of a lease is for."""
    return f"hansa/secrets\0{lease_id}\0{epoch}".encode()


def close_box(public_key: str, content: bytes, context: bytes) -> bytes:
    """Return `content` for the holder of `public_key` (hex). Raises ValueError where that is no key."""
    own = X25519PrivateKey.generate()
    shared = own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public_key)))
    public = own.public_key().public_bytes_raw()
    nonce = os.urandom(_NONCE_BYTES)
    cipher = _cipher(shared, public + bytes.fromhex(public_key), context)
    return public + nonce + cipher.encrypt(nonce, content, context)


def open_box(key: X25519PrivateKey, box: bytes, context: bytes) -> bytes:
    """Return the content of a box. Raises InvalidTag for one that was made for another key or context, or altered."""
    public, nonce = box[:_KEY_BYTES], box[_KEY_BYTES : _KEY_BYTES + _NONCE_BYTES]
    if len(box) < _KEY_BYTES + _NONCE_BYTES:
        raise InvalidTag
    shared = key.exchange(X25519PublicKey.from_public_bytes(public))
    cipher = _cipher(shared, public + key.public_key().public_bytes_raw(), context)
    return cipher.decrypt(nonce, box[_KEY_BYTES + _NONCE_BYTES :], context)


def _cipher(shared: bytes, keys: bytes, context: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), _KEY_BYTES, salt=keys, info=context).derive(shared))
