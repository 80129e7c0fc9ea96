"""Money as integers: micro-credits, how people write them, and what a delivery costs.

A credit is a million micro-credits. Nothing here is a float: a price times a quantity is an
integer product divided once, rounded down, so that two parties who hold the same rows compute
the same amount. `pricing.settlement` states who gets what the rounding leaves.
"""

from __future__ import annotations

import re
from typing import Final, NewType

from pricing.errors import AmountError, QuantityError

Micros = NewType("Micros", int)

MICROS_PER_CREDIT: Final = 1_000_000
MILLISECONDS_PER_HOUR: Final = 3_600_000
SECONDS_PER_HOUR: Final = 3_600
# Providers bill egress by the decimal gigabyte.
BYTES_PER_GB: Final = 1_000_000_000
# A billion credits: far above any budget, far below where a 64-bit column would overflow.
CREDITS_MAX: Final = 1_000_000_000

_AMOUNT: Final = re.compile(r"(?P<sign>-?)(?P<whole>[0-9]{1,10})(?:\.(?P<part>[0-9]{1,6}))?", re.ASCII)


def parse_credits(text: str) -> Micros:
    """Return the micro-credits of an amount written in credits, such as `12.5`, exactly.

    Raises AmountError where the text is no amount, is finer than a micro-credit, or is above a
    billion credits.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        message = (
            f"{text[:40]!r} is not an amount of credits; write digits with at most six decimals, such as 12.5 "
            "(no thousands separators, no currency sign)"
        )
        raise AmountError(message)
    micros = int(match["whole"]) * MICROS_PER_CREDIT + int((match["part"] or "").ljust(6, "0"))
    if micros > CREDITS_MAX * MICROS_PER_CREDIT:
        message = f"{text.strip()} credits is above the largest amount that the market keeps, {CREDITS_MAX} credits"
        raise AmountError(message)
    return Micros(-micros if match["sign"] else micros)


def format_credits(micros: int) -> str:
    """Return an amount in credits with at least two decimals and as many as it needs: `12.50`."""
    sign = "-" if micros < 0 else ""
    whole, part = divmod(abs(micros), MICROS_PER_CREDIT)
    decimals = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"


def cost_micros(price_micros_per_gpu_hour: int, gpu_ms: int) -> Micros:
    """Return what `gpu_ms` GPU-milliseconds cost at a price per GPU-hour, rounded down."""
    _refuse_negative(price_micros_per_gpu_hour=price_micros_per_gpu_hour, gpu_ms=gpu_ms)
    return Micros(price_micros_per_gpu_hour * gpu_ms // MILLISECONDS_PER_HOUR)


def rate_micros(rate_micros_per_hour: int, duration_ms: int) -> Micros:
    """Return what a rate per hour comes to over `duration_ms`, rounded down."""
    _refuse_negative(rate_micros_per_hour=rate_micros_per_hour, duration_ms=duration_ms)
    return Micros(rate_micros_per_hour * duration_ms // MILLISECONDS_PER_HOUR)


def egress_micros(price_micros_per_gb: int, size_bytes: int) -> Micros:
    """Return what `size_bytes` leaving a site cost at a price per decimal gigabyte, rounded down."""
    _refuse_negative(price_micros_per_gb=price_micros_per_gb, size_bytes=size_bytes)
    return Micros(price_micros_per_gb * size_bytes // BYTES_PER_GB)


def divide_up(dividend: int, divisor: int) -> int:
    """Return the quotient of two integers rounded up: for reservations, which must cover all."""
    return -(-dividend // divisor)


def _refuse_negative(**quantities: int) -> None:
    for name, quantity in quantities.items():
        if quantity < 0:
            message = f"{name} is {quantity}; prices and quantities are never negative: check the rows it came from"
            raise QuantityError(message)
