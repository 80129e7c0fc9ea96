"""The pages, by subject. Importing this package adds them to the blueprint."""

from __future__ import annotations

from broker.portal.pages import accounts, jobs, market, money, operate, rounds, sign_in, sites, submit

__all__ = ["accounts", "jobs", "market", "money", "operate", "rounds", "sign_in", "sites", "submit"]
