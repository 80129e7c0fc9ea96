"""`hansa site statement`: what this site earned, what its customers spent, and what it would have been worth alone.

The agent asks for it now and then and keeps it in the site's folder, where the command reads it: two processes that sign requests
with one identity would spoil each other's sequence numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from pricing.money import MILLISECONDS_PER_HOUR, format_credits
from sites.client import Broker
from sites.errors import SiteError, StatementError
from sites.identity import write_private
from sites.protocol import SiteStatement

STATEMENT_FILE: Final = "statement.json"
STATEMENT_DAYS: Final = 30
# How old a statement may become: it is read by people, and each costs the broker a query over a month.
STATEMENT_AGE_S: Final = 600.0

_log = structlog.get_logger(__name__)


def fetch_statement(broker: Broker, folder: Path) -> None:
    """Ask the broker and keep what it says; a broker that does not answer, or is too old to know, changes nothing.

    Raises nothing that a site may meet: it runs on a thread of its own, where nobody would see it.
    """
    try:
        found = broker.statement(STATEMENT_DAYS)
        write_private(folder / STATEMENT_FILE, found.model_dump_json().encode())
    except SiteError as error:
        _log.info("statement.unanswered", code=error.code, detail=str(error)[:300])
    except OSError as error:
        _log.warning("statement.not_kept", detail=str(error))


def kept_statement(folder: Path) -> SiteStatement:
    """Return the newest statement that the agent was told. Raises StatementError where there is none."""
    try:
        return SiteStatement.model_validate_json((folder / STATEMENT_FILE).read_bytes())
    except FileNotFoundError:
        raise StatementError(
            f"no statement is in {folder} yet: the agent asks for one within its first minute; see that it runs "
            "(hansa site run), and that the broker is not of an older version"
        ) from None
    except (OSError, ValidationError) as error:
        raise StatementError(f"{folder / STATEMENT_FILE} cannot be read ({str(error)[:200]}); delete it") from None


def lines(statement: SiteStatement, now_ms: int) -> Iterator[str]:
    """Yield a statement for people."""
    earned = statement.payout_micros + statement.link_revenue_micros - statement.refunded_micros
    days = (statement.until_ms - statement.since_ms) / 86_400_000
    age_min = max(0, now_ms - statement.until_ms) / 60_000
    yield f"site {statement.site_id}, the {days:.0f} days until {age_min:.0f} minutes ago, in credits"
    gpu_hours = statement.gpu_milliseconds / MILLISECONDS_PER_HOUR
    yield f"  earned with GPUs     {format_credits(statement.payout_micros):>14}   {gpu_hours:.2f} GPU-hours, {statement.leases} leases"
    yield f"  earned with links    {format_credits(statement.link_revenue_micros):>14}"
    yield f"  given back           {format_credits(statement.refunded_micros):>14}   for lost work"
    yield f"  earned               {format_credits(earned):>14}"
    yield f"  spent by customers   {format_credits(statement.spent_by_customers_micros):>14}   tenants whose home is this site, anywhere"
    yield f"  on the account       {format_credits(statement.balance_micros):>14}"
    if not statement.rounds_known:
        yield "  alone                       unknown   the market has worked out no round's economics in this time"
        return
    hours = statement.covered_ms / MILLISECONDS_PER_HOUR
    yield (
        f"  worth here           {format_credits(statement.worth_federated_micros):>14}   "
        f"to this site and its customers, over {statement.rounds_known} rounds that cover {hours:.1f} hours"
    )
    yield f"  worth alone          {format_credits(statement.worth_alone_micros):>14}   the same GPUs and jobs in a market of their own"
