"""Refunds: what of a charge goes back where the work that it paid for was lost.

A site that broke, or fell silent, takes back what it was paid for work that no checkpoint kept. Sites of the same gang
that delivered keep what they earned. A tenant that the market itself moves inside a term is compensated by the market
for what the move destroys, as the round counted it.
"""

from __future__ import annotations

from pricing.errors import QuantityError
from pricing.money import Micros


def refund_micros(*, earned_micros: int, samples_delivered: int, samples_kept: int) -> Micros:
    """Return what a site at fault gives back of `earned_micros`: the share of its gang's samples that was lost.

    Where nothing was delivered nothing was bought, and all of it goes back; rounded down. Raises QuantityError for
    negative quantities.
    """
    if min(earned_micros, samples_delivered, samples_kept) < 0:
        message = (
            f"earned {earned_micros}, delivered {samples_delivered}, kept {samples_kept}: none can be below nought"
        )
        raise QuantityError(message)
    if samples_delivered == 0:
        return Micros(earned_micros)
    lost = max(0, samples_delivered - samples_kept)
    return Micros(earned_micros * lost // samples_delivered)


def underdelivery_micros(*, earned_micros: int, samples_delivered: int, samples_promised_low: int) -> Micros:
    """Return what a site gives back of `earned_micros` for delivering less than the low end of what was promised.

    Within the interval of the prediction nothing goes back: that is chance, and the price had it in. Below it, the
    tenant pays for the share that came; rounded down. Raises QuantityError for negative quantities.
    """
    if min(earned_micros, samples_delivered, samples_promised_low) < 0:
        message = (
            f"earned {earned_micros}, delivered {samples_delivered}, promised {samples_promised_low}: "
            "none can be below nought"
        )
        raise QuantityError(message)
    missing = max(0, samples_promised_low - samples_delivered)
    return Micros(earned_micros * missing // samples_promised_low) if missing else Micros(0)
