"""The ledger: double entry, immutable transfers, holds that are posted or voided to the last micro.

Every function takes the open session of a `Database.write` and leaves the commit to its caller, so
that money moves in the same transaction as what it is for. `broker.audit` recomputes from the rows
what is promised here; README.md names the accounts, the verbs and the invariants.
"""

from __future__ import annotations

from broker.ledger.accounts import (
    EQUITY,
    FEES,
    WORLD,
    AccountKind,
    balance_micros,
    balances,
    held_account,
    open_accounts,
    open_site,
    open_tenant,
    site_account,
    sum_micros,
    tenant_account,
)
from broker.ledger.amends import compensate, refund
from broker.ledger.holds import close_hold, draw_equity, place_hold, post
from broker.ledger.transfers import TransferKind, deposit, fund_equity

__all__ = [
    "EQUITY",
    "FEES",
    "WORLD",
    "AccountKind",
    "TransferKind",
    "balance_micros",
    "balances",
    "close_hold",
    "compensate",
    "deposit",
    "draw_equity",
    "fund_equity",
    "held_account",
    "open_accounts",
    "open_site",
    "open_tenant",
    "place_hold",
    "post",
    "refund",
    "site_account",
    "sum_micros",
    "tenant_account",
]
