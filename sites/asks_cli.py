"""`hansa site ask`: what this site asks now and over the next 24 hours, and setting another base."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pricing.money import format_credits
from sites.asks import Ask, AskBook, Curve, parse_curve, read_overrides, write_overrides
from sites.errors import AskError
from sites.inventory import lent_shares
from sites.journal import Journal
from sites.policy import PolicyBook
from sites.settings import SiteSettings, priced
from sites.wishes import judge, kept_wish

AHEAD_H: Final = 24


def change_ask(site: SiteSettings, gpu_type: str, text: str | None) -> None:
    """Set another base for a pool, or give back what site.yaml and the portal say. Raises AskError."""
    pool = next((pool for pool in site.pools if pool.gpu_type == gpu_type), None)
    if pool is None:
        known = ", ".join(pool.gpu_type for pool in site.pools)
        raise AskError(f"this site has no pool of {gpu_type}; it has {known}")
    site.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    overrides = read_overrides(site.folder)
    overrides.pop(gpu_type, None)
    if text is not None:
        overrides[gpu_type] = parse_curve(text, len(pool.gpu_ids))
    write_overrides(site.folder, overrides)


def asks_ahead(site: SiteSettings, now: dt.datetime) -> list[dict[str, Any]]:
    """Return what each pool asks now and at each of the coming hours, as JSON; the share that is lent is taken to stay.

    Raises AskError for a power file that cannot be used.
    """
    judged = judge(site, kept_wish(site)).settings
    pools = [priced(pool) for pool in judged.pools]
    shares = _lent_shares(site)
    book = AskBook(pools, site.folder)
    hour = now.replace(minute=0, second=0, microsecond=0)
    moments = [now, *(hour + dt.timedelta(hours=n) for n in range(1, AHEAD_H + 1))]
    asked = [book.asks(pools, moment, shares) for moment in moments]
    return [
        {
            "gpu_type": pool.gpu_type,
            "gpus": pool.gpus,
            "lent_share": shares[pool.gpu_type],
            "set_here": pool.gpu_type in read_overrides(site.folder),
            "hours": [
                {"from": f"{moment:%Y-%m-%dT%H:%M}Z", **_told(asks[pool.gpu_type])}
                for moment, asks in zip(moments, asked, strict=True)
            ],
        }
        for pool in pools
    ]


def table(document: list[dict[str, Any]]) -> str:
    """Return the same for people: hours at which nothing changes are joined."""
    return "\n".join(line for pool in document for line in _lines(pool))


def _lines(pool: Mapping[str, Any]) -> Iterator[str]:
    where = "set by `hansa site ask`" if pool["set_here"] else "from site.yaml or the portal"
    yield f"{pool['gpu_type']}: {pool['gpus']} GPUs, {pool['lent_share']:.0%} lent; base {where}"
    before = None
    for hour in pool["hours"]:
        said = " then ".join(
            f"{part['gpus']} at {format_credits(part['price_micros_per_gpu_hour'])}" for part in hour["parts"]
        )
        if (said, hour["why"]) != before:
            yield f"  {hour['from']}  {said:<32}  {hour['why']}"
        before = said, hour["why"]


def _told(ask: Ask) -> dict[str, Any]:
    return {"parts": _parts(ask.curve), "why": ask.why}


def _parts(curve: Curve) -> list[dict[str, int]]:
    return [{"gpus": part.gpus, "price_micros_per_gpu_hour": part.price} for part in curve]


def _lent_shares(site: SiteSettings) -> dict[str, float]:
    """Return which share of what may be lent of each pool is, by the agent's journal."""
    lent: Counter[str] = Counter()
    if (site.folder / "journal.sqlite3").exists():
        journal = Journal(site.folder / "journal.sqlite3")
        try:
            for record in journal.attempts():
                lent[record.gpu_type] += 0 if record.is_over else len(record.gpu_ids)
        finally:
            journal.close()
    return lent_shares(site.pools, PolicyBook(site.policy, site.policy_file).current(), lent)
