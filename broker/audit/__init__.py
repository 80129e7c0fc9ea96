"""The audit: recompute from the rows what the market promises, and name every row that breaks it.

Used by `hansa admin audit`, the fault simulator and the tests. It trusts no constraint and no
cached figure: a finding means that rows were changed behind the services' back, or a defect.
Numbers are those of the invariants in the blueprint; 8 to 10 and 13 are no matter of rows.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from broker.audit.finding import Finding
from broker.audit.money import (
    check_balances,
    check_holds,
    check_prices,
    check_reservations,
    check_terms_trace,
    check_transfers,
    check_usage_money,
)
from broker.audit.states import check_epochs, check_gpus, check_histories, check_outer_states, check_usage

CHECKS = (
    check_balances,
    check_holds,
    check_transfers,
    check_gpus,
    check_epochs,
    check_usage,
    check_outer_states,
    check_histories,
    check_prices,
    check_terms_trace,
    check_usage_money,
    check_reservations,
)


def audit(session: Session) -> list[Finding]:
    """Return everything that breaks an invariant, by invariant and subject; a sound market has none."""
    findings = {finding for check in CHECKS for finding in check(session)}
    return sorted(findings, key=lambda finding: (finding.invariant, finding.subject, finding.detail))


__all__ = ["CHECKS", "Finding", "audit"]
