"""The errors of the pricing package, each with a stable code that callers may rely on."""

from __future__ import annotations

from typing import ClassVar


class PricingError(Exception):
    """Something that pricing refuses; the message says what, why and what to do next."""

    code: ClassVar[str] = "pricing.refused"


class AmountError(PricingError):
    """Text or a number that is not an amount of money the market can keep."""

    code: ClassVar[str] = "pricing.amount_invalid"


class QuantityError(PricingError):
    """A price, a quantity or a duration that makes no sense, such as a negative one."""

    code: ClassVar[str] = "pricing.quantity_invalid"


class SettlementError(PricingError):
    """A settlement that would break an invariant of the market's money."""

    code: ClassVar[str] = "pricing.settlement_unbalanced"
