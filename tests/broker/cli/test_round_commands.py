"""`hansa market certificate` and `hansa admin round --documents`: a round checked from outside, with the CA alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker.rounds.clear import hold_round
from broker.rounds.economics import work_out
from broker.transitions import note_change
from tests.broker.cli.calling import Broker, Hansa


@pytest.fixture
def round_number(broker: Broker) -> int:
    broker.market.database.write("change", note_change)
    row = hold_round(broker.market)
    assert row is not None
    work_out(broker.market)
    return row.round_number


@pytest.fixture
def ca(broker: Broker, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    path.write_text(broker.market.authority.ca_pem)
    return path


def test_a_rounds_documents_are_fetched_and_verified_with_its_certificate(
    hansa: Hansa, round_number: int, ca: Path, tmp_path: Path
) -> None:
    fetched = hansa("admin", "round", str(round_number), "--documents", str(tmp_path), who="admin")
    assert fetched.code == 0, fetched.err
    paths = [tmp_path / f"round-{round_number}.{name}.json" for name in ("snapshot", "clearing", "certificate")]
    words = [str(path) for path in paths]
    checked = hansa("market", "verify", *words[:2], "--certificate", words[2], "--ca", str(ca))
    assert checked.code == 0, checked.err
    assert checked.out.startswith("sound")
    clearing = json.loads(paths[1].read_text())
    clearing["certificate"]["turnover_micros_per_hour"] += 1
    paths[1].write_text(json.dumps(clearing))
    wrong = hansa("market", "verify", *words[:2], "--certificate", words[2], "--ca", str(ca))
    assert wrong.code == 1
    assert "not of this clearing: clearing_digest" in wrong.err
    assert hansa("market", "verify", *words[:2], "--certificate", words[2]).code == 2


def test_a_certificate_is_shown_only_where_its_signature_holds(
    hansa: Hansa, round_number: int, ca: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.json"
    shown = hansa("market", "certificate", str(round_number), "--ca", str(ca), "-o", str(kept), who="")
    assert shown.code == 0, shown.err
    for words in ("identity", "price support", "balance             even", "sites better off", "core slack"):
        assert words in shown.out
    statement = json.loads(hansa("market", "certificate", str(kept), "--ca", str(ca), "--json").out)
    assert statement["round_number"] == round_number
    assert statement["economics"]["complete"] is True
    document = json.loads(kept.read_text())
    document["signed"]["signature"] = document["signed"]["signature"][::-1]
    kept.write_text(json.dumps(document))
    forged = hansa("market", "certificate", str(kept), "--ca", str(ca))
    assert (forged.code, "signature" in forged.err) == (1, True)
    kept.write_text("{}")
    assert hansa("market", "certificate", str(kept), "--ca", str(ca)).code == 2


def test_the_payment_rule_is_shown_and_set(hansa: Hansa) -> None:
    assert hansa("admin", "payment-rule", who="admin").out == "uniform\n"
    assert hansa("admin", "payment-rule", "pay_as_bid", who="admin").out == "pay_as_bid\n"
    assert hansa("admin", "payment-rule", who="admin").out == "pay_as_bid\n"
    hansa("admin", "payment-rule", "uniform", who="admin")
    assert hansa("admin", "payment-rule", "auction", who="admin").code != 0
