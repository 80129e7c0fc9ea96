"""Tenants' secrets: stored encrypted, listed by name, given to the site that starts a job which names them, to nobody else.

A value comes in by `set_secret` and goes out by `box_for_site` alone. In the database it is AES-256-GCM ciphertext under
a key that the market's pepper gives, bound to its tenant and name: a row moved to another tenant does not open.
"""

from __future__ import annotations

import json
import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.database.tables import Job, Lease
from broker.database.tenant_secrets import TenantSecret
from broker.errors import ConflictError, NotFoundError, RefusedError, StaleEpochError
from broker.market import Market
from broker.transitions import LeaseState, record_event
from sites.secret_box import close_box, secrets_context
from training.spec import JobSpec

# A service account's JSON key has 2.4 kB, an SSH key 3.4 kB.
VALUE_BYTES_MAX: Final = 8192
SECRETS_PER_TENANT_MAX: Final = 100
_NONCE_BYTES: Final = 12


class SecretMissingError(RefusedError):
    """A job that names a secret which its tenant has not stored, or has deleted since."""

    code = "secret.missing"


class SecretTermsError(RefusedError):
    """A secret that is empty or too long, or one more than a tenant may have."""

    code = "secret.terms"


class SecretUnreadableError(ConflictError):
    """A secret that was stored under another key of the market; its tenant has to set it again."""

    code = "secret.unreadable"


def set_secret(session: Session, market: Market, tenant_id: str, name: str, value: str, *, actor: str | None) -> None:
    """Store a value under a name, in place of the former one. Raises SecretTermsError."""
    content = value.encode()
    if not content or len(content) > VALUE_BYTES_MAX:
        raise SecretTermsError(
            f"a secret has 1 to {VALUE_BYTES_MAX} bytes; larger things belong in the workdir or in data"
        )
    row = session.get(TenantSecret, (tenant_id, name))
    if row is None:
        held = session.scalar(select(func.count()).select_from(TenantSecret).where(TenantSecret.tenant_id == tenant_id))
        if (held or 0) >= SECRETS_PER_TENANT_MAX:
            raise SecretTermsError(f"{held} secrets are stored, which is the most for one tenant; delete some")
        row = TenantSecret(tenant_id=tenant_id, name=name)
        session.add(row)
    nonce = os.urandom(_NONCE_BYTES)
    row.sealed = nonce + _cipher(market).encrypt(nonce, content, _bound_to(tenant_id, name))
    row.set_ms = market.clock.now_ms()
    _record(session, market, tenant_id, f"secret {name} set", actor)


def list_secrets(session: Session, tenant_id: str) -> list[TenantSecret]:
    """Return a tenant's secrets by name, as they are stored."""
    rows = select(TenantSecret).where(TenantSecret.tenant_id == tenant_id).order_by(TenantSecret.name)
    return list(session.scalars(rows))


def delete_secret(session: Session, market: Market, tenant_id: str, name: str, *, actor: str | None) -> None:
    """Forget a value for good; jobs that name it fail when they start next. Raises NotFoundError."""
    row = session.get(TenantSecret, (tenant_id, name))
    if row is None:
        raise NotFoundError("you have no secret of that name; `hansa secret list` shows those that you have")
    session.delete(row)
    _record(session, market, tenant_id, f"secret {name} deleted", actor)


def require_secrets(session: Session, tenant_id: str, spec: JobSpec) -> None:
    """Check that a job's tenant has stored every secret that it names. Raises SecretMissingError."""
    _rows(session, tenant_id, spec)


def box_for_site(
    session: Session, market: Market, *, site_id: str, lease_id: str, epoch: int, public_key: str
) -> bytes:
    """Return the values that the job of an active lease names, for the holder of `public_key` alone.

    Raises NotFoundError, StaleEpochError, ConflictError for a lease that is not active, SecretMissingError.
    """
    lease = session.get(Lease, lease_id) if "\0" not in lease_id else None
    if lease is None or lease.site_id != site_id:
        raise NotFoundError("this site has no such lease; forget it")
    if lease.epoch != epoch:
        raise StaleEpochError("the lease has another epoch by now; stop what runs under the old one")
    if lease.state != LeaseState.ACTIVE:
        raise ConflictError("secrets are given out for active leases alone, and this one is not")
    job = session.get_one(Job, lease.job_id)
    rows = _rows(session, job.tenant_id, JobSpec.model_validate_json(job.spec))
    values = {row.name: _opened(market, row) for row in rows}
    record_event(
        session,
        "secrets",
        now_ms=market.clock.now_ms(),
        after="handed",
        job_id=job.job_id,
        tenant_id=job.tenant_id,
        site_id=site_id,
        lease_id=lease_id,
        detail=", ".join(sorted(values)),
    )
    try:
        return close_box(public_key, json.dumps(values).encode(), secrets_context(lease_id, epoch))
    except ValueError:
        raise RefusedError("the public key is not one of X25519; bring the site's agent up to date") from None


def _rows(session: Session, tenant_id: str, spec: JobSpec) -> list[TenantSecret]:
    rows = []
    for name in spec.secrets or ():
        row = session.get(TenantSecret, (tenant_id, name))
        if row is None:
            raise SecretMissingError(
                f"there is no secret {name}; store it with `hansa secret set {name}`, then submit again"
            )
        rows.append(row)
    return rows


def _opened(market: Market, row: TenantSecret) -> str:
    try:
        nonce, sealed = row.sealed[:_NONCE_BYTES], row.sealed[_NONCE_BYTES:]
        return _cipher(market).decrypt(nonce, sealed, _bound_to(row.tenant_id, row.name)).decode()
    except InvalidTag:
        raise SecretUnreadableError(
            f"the secret {row.name} was stored under another key of this market; its tenant has to set it again"
        ) from None


def _cipher(market: Market) -> AESGCM:
    return AESGCM(market.authority.derive_key("tenant-secrets"))


def _bound_to(tenant_id: str, name: str) -> bytes:
    return f"{tenant_id}\0{name}".encode()


def _record(session: Session, market: Market, tenant_id: str, detail: str, actor: str | None) -> None:
    now_ms = market.clock.now_ms()
    record_event(session, "tenant", now_ms=now_ms, after="secret", tenant_id=tenant_id, detail=detail, actor=actor)
