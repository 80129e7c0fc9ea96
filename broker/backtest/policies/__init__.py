"""Schedulers to compare: the product's market, and the ideas of published ones in the same simulator."""

from __future__ import annotations

from typing import Final

from broker.backtest.engine import Policy
from broker.backtest.errors import OptionError
from broker.backtest.policies.fifo import Alone, FirstCome
from broker.backtest.policies.gavel import Gavel
from broker.backtest.policies.greedy import Cheapest, Race
from broker.backtest.policies.market import Market, MarketAlone, MarketRigid
from broker.backtest.policies.sia import Sia

POLICIES: Final[dict[str, type[Policy]]] = {
    policy.name: policy for policy in (Alone, FirstCome, Cheapest, Race, Gavel, Sia, MarketAlone, MarketRigid, Market)
}


def policies(names: str) -> list[str]:
    """Return the policies of a comma-separated list, each once. Raises OptionError for a name that is none."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in POLICIES:
            raise OptionError(f"there is no policy {name[:40]!r}; choose from {', '.join(POLICIES)}")
    if not chosen:
        raise OptionError(f"--policy names none; choose from {', '.join(POLICIES)}")
    return chosen
