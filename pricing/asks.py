"""What a site wants for a pool, and what it is paid at the market's price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pricing.errors import QuantityError
from pricing.money import Micros

BASIS_POINTS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Ask:
    """The least that a pool's site accepts per GPU-hour: a curve whose last GPUs may be dearer.

    The first GPUs cost the flat price; `steps` are (GPUs, price) of the further ones, in rising
    order. `flat_gpus` None: the flat price holds for every GPU.
    """

    pool_id: str
    price_micros_per_gpu_hour: int
    flat_gpus: int | None = None
    steps: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a negative price, and steps that do not rise."""
        if self.price_micros_per_gpu_hour < 0:
            message = f"the ask for {self.pool_id} is negative; a site that wants to give GPUs away asks 0"
            raise QuantityError(message)
        prices = [price for _, price in self.curve]
        if prices != sorted(set(prices)) or (self.steps and self.flat_gpus is None):
            message = f"the ask curve of {self.pool_id} must rise from step to step, each for a stated number of GPUs"
            raise QuantityError(message)

    @property
    def curve(self) -> tuple[tuple[int | None, int], ...]:
        """The whole curve as (GPUs, price) in rising order; None GPUs: as many as there are."""
        return ((self.flat_gpus, self.price_micros_per_gpu_hour), *self.steps)

    def marginal_micros_per_gpu_hour(self, gpus: int) -> Micros:
        """Return what the site wants for the dearest of its first `gpus` GPUs."""
        reached = 0
        for units, price in self.curve:
            reached += gpus if units is None else units
            if gpus <= reached:
                return Micros(price)
        return Micros(self.curve[-1][1])

    def payout_micros_per_gpu_hour(
        self, price_micros_per_gpu_hour: int, fee_basis_points: int, gpus_sold: int = 0
    ) -> Micros:
        """Return what the site gets of a GPU-hour's price: the price less the fee, never below the ask.

        `gpus_sold` is how many of the pool's GPUs are sold in all: the dearest of them sets what
        the fee must leave. Raises QuantityError where the price itself is below that ask.
        """
        ask = self.marginal_micros_per_gpu_hour(gpus_sold)
        if price_micros_per_gpu_hour < ask:
            message = (
                f"{self.pool_id} would be sold at {price_micros_per_gpu_hour} micro-credits, below its ask of "
                f"{ask}; no clearing may do that"
            )
            raise QuantityError(message)
        kept = price_micros_per_gpu_hour * (BASIS_POINTS - fee_basis_points) // BASIS_POINTS
        return Micros(max(ask, kept))
