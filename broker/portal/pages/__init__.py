"""The pages, by subject. Importing this package adds them to the blueprint."""

from __future__ import annotations

from broker.portal.pages import (
    accounts,
    forecasts,
    jobs,
    links,
    market,
    money,
    operate,
    replay,
    rounds,
    sign_in,
    sites,
    submit,
)

__all__ = [
    "accounts",
    "forecasts",
    "jobs",
    "links",
    "market",
    "money",
    "operate",
    "replay",
    "rounds",
    "sign_in",
    "sites",
    "submit",
]
