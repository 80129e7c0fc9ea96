"""A round's certificate is everyone's to check, its documents the admin's; admins are named in what they set."""

from __future__ import annotations

import hashlib
import json

from broker.allocation.clearing import Clearing
from broker.allocation.snapshot import Snapshot
from broker.rounds.certificate import SignedCertificate, differences, open_certificate
from broker.rounds.clear import hold_round
from broker.rounds.economics import work_out
from tests.broker.api.conftest import World, code_of


def test_anyone_may_check_a_rounds_certificate_with_the_markets_ca(trading: World) -> None:
    row = hold_round(trading.market)
    assert row is not None
    answer = trading.client.get("/v1/rounds/1/certificate").get_json()
    signed = SignedCertificate.model_validate({name: answer[name] for name in ("signed", "key_pem")})
    statement = open_certificate(signed, trading.market.authority.ca_pem)
    assert statement.model_dump(mode="json") == answer["statement"]
    clearing = Clearing.from_json(trading.call("GET", "/v1/admin/rounds/1/clearing", "admin").data)
    assert differences(statement, clearing) == []
    missing = trading.client.get("/v1/rounds/99/certificate")
    assert (missing.status_code, code_of(missing)) == (404, "request.not_found")


def test_snapshots_clearings_and_the_sites_rows_are_the_admins(trading: World) -> None:
    row = hold_round(trading.market)
    assert row is not None
    work_out(trading.market)
    snapshot = trading.call("GET", "/v1/admin/rounds/1/snapshot", "admin").data
    assert hashlib.sha256(snapshot).hexdigest() == row.snapshot_digest
    assert Snapshot.from_json(snapshot).round_number == 1
    sites = trading.call("GET", "/v1/admin/rounds/1/sites", "admin").get_json()
    assert sites["economics"] == "done"
    stated = trading.client.get("/v1/rounds/1/certificate").get_json()["statement"]["economics"]
    canonical = json.dumps(sites["items"], sort_keys=True, separators=(",", ":"))
    assert stated["sites_digest"] == hashlib.sha256(canonical.encode()).hexdigest()
    for what in ("snapshot", "clearing", "sites"):
        assert trading.call("GET", f"/v1/admin/rounds/1/{what}", "acme").status_code == 403
    trading.market.artifacts.discard_document(row.snapshot_digest)
    gone = trading.call("GET", "/v1/admin/rounds/1/snapshot", "admin")
    assert (gone.status_code, code_of(gone)) == (404, "artifact.missing")


def test_the_payment_rule_is_set_by_an_admin_who_is_named_and_holds_from_the_next_round(trading: World) -> None:
    assert trading.call("GET", "/v1/admin/payment-rule", "admin").get_json() == {"payment_rule": "uniform"}
    hold_round(trading.market)
    set_ = trading.post("/v1/admin/payment-rule", "admin", {"payment_rule": "pay_as_bid"})
    assert set_.get_json() == {"payment_rule": "pay_as_bid", "changed": True}
    again = trading.post("/v1/admin/payment-rule", "admin", {"payment_rule": "pay_as_bid"})
    assert again.get_json()["changed"] is False
    hold_round(trading.market)
    rules = [
        trading.client.get(f"/v1/rounds/{number}/certificate").get_json()["statement"]["payment_rule"]
        for number in (1, 2)
    ]
    assert rules == ["uniform", "pay_as_bid"]
    wrong = trading.post("/v1/admin/payment-rule", "admin", {"payment_rule": "second_price"})
    assert wrong.status_code == 422
    assert trading.post("/v1/admin/payment-rule", "acme", {"payment_rule": "uniform"}).status_code == 403
    (event,) = [row for row in _events(trading) if row["kind"] == "payment_rule"]
    assert (event["before"], event["after"]) == ("uniform", "pay_as_bid")
    assert event["actor"].startswith("token ")


def test_who_froze_the_market_or_gave_credits_is_on_record_for_admins_alone(trading: World) -> None:
    trading.post("/v1/admin/freeze", "admin", {"reason": "maintenance"})
    trading.post("/v1/admin/thaw", "admin", {})
    trading.post("/v1/admin/tenants/acme/deposit", "admin", {"amount_micros": 5}, key="five")
    rows = _events(trading)
    named = {(row["kind"], row["after"]) for row in rows if row["actor"]}
    assert {("market", "frozen"), ("market", "thawed"), ("tenant", "deposit")} <= named
    token = next(row["actor"] for row in rows if row["after"] == "frozen").removeprefix("token ")
    assert token in trading.tokens["admin"]
    home = trading.post("/v1/admin/tenants", "admin", {"tenant_id": "lyons-own", "home_site": "lyon"})
    assert home.status_code == 201
    (created,) = [
        row for row in _events(trading) if row["kind"] == "tenant" and row["actor"] and row["after"] == "created"
    ]
    assert created["actor"] == f"token {token}"


def test_who_invited_or_removed_a_site_or_changed_an_account_is_on_record(trading: World) -> None:
    person = {"login": "eva", "password": "a long enough password", "role": "admin"}
    assert trading.post("/v1/admin/sites/invite", "admin", {"site_id": "oslo"}).status_code == 201
    assert trading.post("/v1/admin/sites/lyon/remove", "admin", {}).status_code == 200
    assert trading.post("/v1/admin/users", "admin", person).status_code == 201
    changed = trading.post("/v1/admin/users/eva/password", "admin", {"password": "another long password"})
    assert changed.status_code == 200
    assert trading.post("/v1/admin/users/eva/close", "admin", {}).status_code == 200
    actors = {(row["kind"], row["after"]): row["actor"] for row in _events(trading)}
    wanted = [
        ("invitation", "made"),
        ("site", "removed"),
        ("user", "created"),
        ("user", "password"),
        ("user", "disabled"),
    ]
    assert {event: str(actors[event]).partition(" ")[0] for event in wanted} == dict.fromkeys(wanted, "token")


def _events(world: World) -> list[dict[str, str]]:
    items: list[dict[str, str]] = world.call("GET", "/v1/admin/events?limit=100", "admin").get_json()["items"]
    return items
