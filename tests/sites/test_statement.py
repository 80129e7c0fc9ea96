"""A site's statement: asked for by the agent, kept in its folder, shown by the command."""

from __future__ import annotations

import json
from pathlib import Path

from sites.client import Broker
from sites.errors import BrokerConnectionError
from sites.identity import write_private
from sites.protocol import SiteStatement
from sites.statement import STATEMENT_DAYS, STATEMENT_FILE, fetch_statement
from tests.sites.conftest import SITE_YAML
from tests.sites.test_site_cli import hansa_site

TOLD = SiteStatement(
    site_id="hamburg",
    since_ms=0,
    until_ms=30 * 86_400_000,
    leases=2,
    gpu_milliseconds=7_200_000,
    payout_micros=5_000_000,
    link_revenue_micros=500_000,
    refunded_micros=250_000,
    spent_by_customers_micros=1_000_000,
    balance_micros=5_250_000,
    rounds_known=3,
    covered_ms=3_600_000,
    worth_federated_micros=6_000_000,
    worth_alone_micros=4_000_000,
)


class Told(Broker):
    def statement(self, days: int) -> SiteStatement:
        assert days == STATEMENT_DAYS
        return TOLD


class Away(Broker):
    def statement(self, days: int) -> SiteStatement:
        raise BrokerConnectionError(f"away for {days} days")


def test_what_the_agent_was_told_is_shown_and_a_silent_broker_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(SITE_YAML)
    folder = tmp_path / "hamburg"
    folder.mkdir()
    words = ("statement", "--settings", str(tmp_path / "site.yaml"))
    code, output = hansa_site(*words)
    assert (code, "[statement.missing]" in output) == (1, True)
    fetch_statement(Told(), folder)
    fetch_statement(Away(), folder)
    fetch_statement(Told(), tmp_path / "gone")  # as where the disk is full: told in the log, on whatever thread
    code, output = hansa_site(*words)
    assert code == 0, output
    rows = {line[:22].strip(): line[22:].split()[0] for line in output.splitlines()[1:]}
    assert (rows["earned"], rows["spent by customers"], rows["worth alone"]) == ("5.25", "1.00", "4.00")
    assert json.loads(hansa_site(*words, "--json")[1])["worth_federated_micros"] == 6_000_000
    write_private(folder / STATEMENT_FILE, TOLD.model_copy(update={"rounds_known": 0}).model_dump_json().encode())
    assert "unknown" in hansa_site(*words)[1]
    write_private(folder / STATEMENT_FILE, b"{")
    assert "cannot be read" in hansa_site(*words)[1]
