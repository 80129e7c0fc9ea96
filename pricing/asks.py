"""What a site wants for a pool, and what it is paid at the market's price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pricing.errors import QuantityError
from pricing.money import Micros

BASIS_POINTS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Ask:
    """The least that a pool's site accepts per GPU-hour: flat, the same for every GPU.

    Callers ask for the cost of a number of GPUs rather than multiply, so that a curve (the last
    GPUs dearer than the first) can take the flat price's place.
    """

    pool_id: str
    price_micros_per_gpu_hour: int

    def __post_init__(self) -> None:
        """Refuse a negative price."""
        if self.price_micros_per_gpu_hour < 0:
            message = f"the ask for {self.pool_id} is negative; a site that wants to give GPUs away asks 0"
            raise QuantityError(message)

    def cost_micros_per_hour(self, gpus: int) -> Micros:
        """Return what the site wants for `gpus` GPUs over an hour."""
        return Micros(self.price_micros_per_gpu_hour * gpus)

    def payout_micros_per_gpu_hour(self, price_micros_per_gpu_hour: int, fee_basis_points: int) -> Micros:
        """Return what the site gets of a GPU-hour's price: the price less the fee, never below the ask.

        Raises QuantityError where the price itself is below the ask.
        """
        if price_micros_per_gpu_hour < self.price_micros_per_gpu_hour:
            message = (
                f"{self.pool_id} would be sold at {price_micros_per_gpu_hour} micro-credits, below its ask of "
                f"{self.price_micros_per_gpu_hour}; no clearing may do that"
            )
            raise QuantityError(message)
        kept = price_micros_per_gpu_hour * (BASIS_POINTS - fee_basis_points) // BASIS_POINTS
        return Micros(max(self.price_micros_per_gpu_hour, kept))
