"""What the operator asks for in the market's portal, and how much of it this site's own settings let through.

`judge` is pure. The agent keeps the newest wish in a file of its folder, judges it anew whenever it starts, since the
owner may have changed the settings, and offers what comes out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from pricing.money import format_credits
from sites.asks import AskPart
from sites.identity import write_private
from sites.protocol import Wish, WishReply
from sites.settings import PoolSettings, SiteSettings

WISH_FILE: Final = "wish.json"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Judged:
    """A wish as this site takes it: the settings with its asks in them, and whether it asks to drain."""

    settings: SiteSettings
    draining: bool
    reply: WishReply | None


def judge(settings: SiteSettings, wish: Wish | None) -> Judged:
    """Return what `settings` become under a wish: an ask outside its range, or one for a type without one, is refused."""
    if wish is None or not settings.remote.allows_any:
        return Judged(settings, draining=False, reply=None)
    refused: list[str] = []
    taken: dict[str, int] = {}
    for gpu_type, ask in sorted(wish.asks_micros_per_gpu_hour.items()):
        allowed = settings.remote.asks.get(gpu_type)
        if allowed is None:
            refused.append(f"the site's settings let nobody set the ask of {gpu_type[:40]} from here (remote.asks)")
        elif not allowed.least <= ask <= allowed.most:
            refused.append(
                f"{gpu_type} at {format_credits(ask)} is outside "
                f"{format_credits(allowed.least)} to {format_credits(allowed.most)}, which the site's settings allow"
            )
        else:
            taken[gpu_type] = ask
    if wish.draining is not None and not settings.remote.drain:
        refused.append("the site's settings do not let it be drained from here (remote.drain)")
    pools = tuple(_asking(pool, taken[pool.gpu_type]) if pool.gpu_type in taken else pool for pool in settings.pools)
    return Judged(
        settings=settings.model_copy(update={"pools": pools}),
        draining=bool(wish.draining) and settings.remote.drain,
        reply=WishReply(number=wish.number, refused="; ".join(refused)[:1000]),
    )


def kept_wish(settings: SiteSettings) -> Wish | None:
    """Return the wish that this site was told last, None where there is none."""
    try:
        return Wish.model_validate_json((settings.folder / WISH_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        # The broker says it again with the next answer.
        _log.warning("wish.unreadable", detail=str(error)[:300])
        return None


def keep_wish(settings: SiteSettings, wish: Wish) -> None:
    """Keep a wish over restarts of the agent."""
    write_private(Path(settings.folder / WISH_FILE), wish.model_dump_json().encode())


def _asking(pool: PoolSettings, ask: int) -> PoolSettings:
    """Return a pool whose first GPUs cost `ask`; the dearer parts of its curve keep their distance."""
    further = ask - pool.ask_curve[0].price
    curve = tuple(AskPart.model_construct(gpus=part.gpus, price=part.price + further) for part in pool.ask_curve)
    return pool.model_copy(update={"ask": curve if len(curve) > 1 else ask})
