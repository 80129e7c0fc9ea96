"""What admins type; `init` on an empty home, the rest over the API."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from sqlalchemy import delete

from broker.database.probes import LinkMeasurement
from broker.database.tables import Link
from sites.identity import decode_join_string
from tests.broker.cli.calling import Broker, Hansa


def test_init_makes_a_market_whose_first_token_is_an_admins(hansa: Hansa, tmp_path: Path) -> None:
    home = tmp_path / "market"
    outcome = hansa("admin", "init", "--json", HANSA_HOME=str(home))
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["token"].startswith("hansa_admin_")
    assert "BEGIN CERTIFICATE" in Path(document["ca"]).read_text()
    assert (home / "market.sqlite3").exists()


def test_init_makes_no_second_admin_by_itself(hansa: Hansa, tmp_path: Path) -> None:
    home = {"HANSA_HOME": str(tmp_path / "market")}
    assert hansa("admin", "init", "--equity", "1.5", **home).code == 0
    again = hansa("admin", "init", "--equity", "1.5", **home)
    assert again.code == 2
    assert "--another" in again.err
    assert hansa("admin", "init", "--another", **home).code == 0
    assert hansa("admin", "init", "--equity", "0.0000001", "--another", **home).code == 2


def test_the_market_gets_equity_once_for_a_key(hansa: Hansa) -> None:
    before = json.loads(hansa("admin", "equity", "2", "--json", who="admin").out)["balance_micros"]
    for _ in range(2):
        outcome = hansa("admin", "equity", "1.5", "--key", "more", "--json", who="admin")
        assert json.loads(outcome.out)["balance_micros"] == before + 1_500_000


def test_tenant_is_opened_given_credits_and_a_token(hansa: Hansa) -> None:
    assert hansa("admin", "tenant", "create", "hanse", "--name", "Hanse", who="admin").code == 0
    deposited = hansa("admin", "tenant", "deposit", "hanse", "1.5", "--json", who="admin")
    assert json.loads(deposited.out) == {"tenant_id": "hanse", "balance_micros": 1_500_000}
    token = hansa("admin", "tenant", "token", "hanse", who="admin").out.strip()
    assert "1.5 credits" in hansa("account", HANSA_TOKEN=token).out
    assert "hanse" in hansa("admin", "tenant", "list", who="admin").out


def test_the_same_key_never_deposits_twice(hansa: Hansa) -> None:
    hansa("admin", "tenant", "create", "thrifty", who="admin")
    for _ in range(2):
        outcome = hansa("admin", "tenant", "deposit", "thrifty", "1", "--key", "gift", "--json", who="admin")
        assert json.loads(outcome.out)["balance_micros"] == 1_000_000


def test_amount_below_a_micro_credit_is_wrong_usage(hansa: Hansa) -> None:
    assert hansa("admin", "tenant", "deposit", "acme", "0.0000001", who="admin").code == 2


def test_invitation_is_a_join_string_for_that_site(hansa: Hansa, broker: Broker) -> None:
    join = decode_join_string(hansa("admin", "site", "invite", "visby", who="admin").out)
    assert (join.site_id, join.url) == ("visby", broker.url)


def test_sites_are_listed_with_their_asks(hansa: Hansa) -> None:
    assert "cpu-slot at 0.5" in hansa("admin", "site", "list", who="admin").out


def test_site_statement_says_what_it_earned(hansa: Hansa) -> None:
    listed = json.loads(hansa("admin", "site", "list", "--json", who="admin").out)["items"]
    outcome = hansa("admin", "site", "statement", listed[0]["site_id"], who="admin")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1].startswith("earned ")
    assert hansa("admin", "site", "statement", "nowhere", who="admin").code == 4


def test_links_are_listed_as_declared_and_as_measured(hansa: Hansa, broker: Broker) -> None:
    assert "no site declares a link yet" in hansa("admin", "links", who="admin").out
    now_ms = broker.market.clock.now_ms()
    declared = {"bandwidth_bits_per_s": 1e9, "delay_s": 0.01, "loss": 0.0, "egress_price_micros_per_gb": 0}
    measured = {"bandwidth_bits_per_s": 2.5e8, "delay_s": 0.0213, "loss": 0.004, "sent_bits_per_s": 2.5e8}
    rows = [
        Link(source="lubeck", target="visby", **declared),
        Link(source="visby", target="lubeck", **declared),
        LinkMeasurement(
            source="lubeck",
            target="visby",
            probe_id="probe_a",
            measured_ms=now_ms - 7_200_000,
            received_bits_per_s=9e9,
            disagreement="lubeck says 250 Mbit/s went, visby that 9e+03 came",
            **measured,
        ),
    ]
    broker.market.database.write("measure", lambda session: session.add_all(rows))
    lines = hansa("admin", "links", who="admin").out.splitlines()
    told = ["lubeck", "->", "visby", "1.0", "Gbit/s", "250.0", "Mbit/s", "250.0", "Mbit/s", "21.3", "ms", "0.40", "%"]
    assert lines[1].split() == [*told, "2.0", "h", "0.65"]
    assert "-" in lines[2].split()
    assert lines[3] == "lubeck -> visby: lubeck says 250 Mbit/s went, visby that 9e+03 came"
    (first, second) = json.loads(hansa("admin", "links", "--json", who="admin").out)["items"]
    assert first["counted"] == {"bandwidth_bits_per_s": 2.5e8, "delay_s": 0.0213, "loss": 0.004}
    assert (second["measured"], second["counted"], second["age_s"]) == (None, second["declared"], None)
    broker.market.database.write(
        "forget", lambda session: [session.execute(delete(row)) for row in (Link, LinkMeasurement)]
    )
    assert hansa("admin", "links").code != 0  # a tenant has no business with them


def test_person_gets_another_password_and_is_shut_out(hansa: Hansa, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("correct horse battery\n")
    with_file = ("--password-file", str(password))
    assert hansa("admin", "user", "create", "ada", "--role", "admin", *with_file, who="admin").code == 0
    assert hansa("admin", "user", "password", "ada", *with_file, who="admin").code == 0
    assert hansa("admin", "user", "close", "ada", who="admin").out == "ada may no longer sign in\n"
    assert hansa("admin", "user", "password", "nobody", *with_file, who="admin").code == 4


def test_books_sum_to_nought_and_the_audit_is_clean(hansa: Hansa) -> None:
    assert json.loads(hansa("admin", "ledger", "--json", who="admin").out)["sum_micros"] == 0
    assert "sum 0" in hansa("admin", "ledger", who="admin").out
    assert hansa("admin", "audit", who="admin").out == "sound: every invariant holds\n"


def test_frozen_market_is_said_to_be_so(hansa: Hansa) -> None:
    assert hansa("admin", "freeze", "--reason", "test", who="admin").code == 0
    assert "frozen" in hansa("account").out
    assert hansa("admin", "thaw", who="admin").code == 0
    assert "frozen" not in hansa("account").out


def test_round_that_was_never_held_is_exit_code_4(hansa: Hansa) -> None:
    assert hansa("admin", "round", "999", who="admin").code == 4
    assert hansa("admin", "replay", "999", who="admin").code == 4


def test_context_is_kept_for_its_owner_alone_and_used(hansa: Hansa, broker: Broker, tmp_path: Path) -> None:
    words = ("config", "set", "--context", "lab", "--url", broker.url, "--token", broker.tokens["acme"])
    assert hansa(*words).code == 0
    path = tmp_path / "config.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert hansa("account", HANSA_URL="", HANSA_TOKEN="").code == 0
    shown = hansa("config", "show")
    assert "* lab" in shown.out
    assert broker.tokens["acme"] not in shown.out


def test_unknown_context_and_unknown_key_are_wrong_usage(hansa: Hansa, tmp_path: Path) -> None:
    assert hansa("account", HANSA_CONTEXT="nowhere").code == 2
    (tmp_path / "config.toml").write_text('[contexts.default]\nurll = "x"\n')
    outcome = hansa("account")
    assert outcome.code == 2
    assert "urll" in outcome.err


def test_a_tenants_budget_and_floor_are_set_and_lifted(hansa: Hansa) -> None:
    hansa("admin", "tenant", "create", "bounded", who="admin")
    set_to = hansa("admin", "tenant", "limit", "bounded", "--budget", "2", "--floor", "3", "--json", who="admin")
    assert json.loads(set_to.out) == {"tenant_id": "bounded", "budget_micros_per_hour": 2_000_000, "floor_gpus": 3}
    assert "no bound, floor 0 GPUs" in hansa("admin", "tenant", "limit", "bounded", who="admin").out
    assert hansa("admin", "tenant", "limit", "nobody", who="admin").code == 4
    assert hansa("admin", "tenant", "limit", "bounded", "--floor=-1", who="admin").code == 2
