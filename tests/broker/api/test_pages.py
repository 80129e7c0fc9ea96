"""What grows with the market is read page by page: prices, statements, balances; totals are of everything."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.orm import Session

from broker import ledger
from broker.database.tables import Job, Lease, Placement, Pool, Round, Table, UsageReport
from broker.invoices import STATEMENT_LINES_MAX, statement
from tests.broker.api.conftest import World, code_of

JOBS = 205


def row(table: type[Table], **given: Any) -> dict[str, Any]:
    """A row with nothing in the columns that are not given."""
    needed = [column for column in table.__table__.columns if not column.nullable or column.name in given]
    return {column.name: given.get(column.name, column.type.python_type()) for column in needed}


def sell(session: Session) -> None:
    """Let the site lyon have served many jobs, each for two micro-credits and one of link revenue."""
    numbers = range(JOBS)
    session.execute(insert(Round), [row(Round, round_number=1)])
    session.execute(
        insert(Job), [row(Job, job_id=f"j{number:03}", tenant_id="acme", state="finished") for number in numbers]
    )
    session.execute(
        insert(Placement),
        [
            row(Placement, placement_id=f"p{number}", job_id=f"j{number:03}", round_number=1, state="ended")
            for number in numbers
        ],
    )
    session.execute(
        insert(Lease),
        [
            row(
                Lease,
                lease_id=f"l{number}",
                placement_id=f"p{number}",
                job_id=f"j{number:03}",
                site_id="lyon",
                pool_id="lyon/H100",
                state="ended",
            )
            for number in numbers
        ],
    )
    session.execute(
        insert(UsageReport),
        [
            row(
                UsageReport,
                lease_id=f"l{number}",
                sequence=1,
                charge_micros=3,
                payout_micros=2,
                link_revenue_micros=1,
                gpu_micros=3,
            )
            for number in numbers
        ],
    )


def pages(world: World, path: str, who: str | None, limit: int) -> list[dict[str, Any]]:
    """Follow a list to its end."""
    found = [world.call("GET", f"{path}?limit={limit}", who).get_json()]
    while found[-1]["next_cursor"]:
        assert len(found) < 20
        found.append(world.call("GET", f"{path}?limit={limit}&cursor={found[-1]['next_cursor']}", who).get_json())
    return found


def test_a_statement_comes_in_pages_whose_totals_are_of_all(trading: World) -> None:
    trading.market.database.write("sell", sell)
    found = pages(trading, "/v1/admin/sites/lyon/statement", "admin", 100)
    assert [len(page["lines"]) for page in found] == [100, 100, 5]
    assert [line["job_id"] for page in found for line in page["lines"]] == [f"j{number:03}" for number in range(JOBS)]
    assert {page["earned_micros"] for page in found} == {3 * JOBS}
    whole = trading.market.database.read(lambda session: statement(session, "lyon"))
    assert (len(whole.lines), whole.next_after) == (STATEMENT_LINES_MAX, "j199")
    with pytest.raises(AssertionError):
        trading.market.database.read(lambda session: statement(session, "lyon", limit=STATEMENT_LINES_MAX + 1))


def test_prices_come_in_pages(trading: World) -> None:
    def offer(session: Session) -> None:
        names = [f"lyon/T{number:03}" for number in range(250)]
        session.execute(insert(Pool), [row(Pool, pool_id=name, site_id="lyon", gpu_type="T") for name in names])

    trading.market.database.write("offer", offer)
    first = trading.call("GET", "/v1/prices").get_json()
    assert len(first["items"]) == 200
    found = pages(trading, "/v1/prices", None, 120)
    assert [len(page["items"]) for page in found] == [120, 120, 11]
    names = [item["pool_id"] for page in found for item in page["items"]]
    assert names == sorted(set(names))
    assert len(names) == 251
    assert trading.call("GET", "/v1/prices?limit=201").status_code == 422


def test_balances_come_in_pages_and_their_sum_is_of_all(trading: World) -> None:
    accounts = trading.market.database.read(ledger.balances)
    found = pages(trading, "/v1/admin/ledger", "admin", 3)
    assert [name for page in found for name in page["balances_micros"]] == sorted(accounts)
    assert {page["sum_micros"] for page in found} == {0}
    assert len(found) == -(-len(accounts) // 3) > 1
    assert sum(accounts.values()) == 0


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("/v1/prices", "/v1/admin/ledger"),
        ("/v1/admin/ledger", "/v1/prices"),
        ("/v1/admin/sites/lyon/statement", "/v1/admin/ledger"),
    ],
)
def test_a_cursor_of_one_list_opens_no_other(trading: World, path: str, other: str) -> None:
    trading.market.database.write(
        "offer", lambda session: session.execute(insert(Pool), [row(Pool, pool_id="lyon/T", site_id="lyon")]) and None
    )
    cursor = trading.call("GET", f"{other}?limit=1", None if other == "/v1/prices" else "admin").get_json()[
        "next_cursor"
    ]
    assert cursor
    answer = trading.call("GET", f"{path}?cursor={cursor}", None if path == "/v1/prices" else "admin")
    assert (answer.status_code, code_of(answer)) == (400, "page.cursor")
