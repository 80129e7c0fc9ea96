"""Every round leaves a certificate that anyone with the market's CA can check, and later what sharing was worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from broker.allocation.clearing import Clearing
from broker.allocation.compile import compile_market
from broker.allocation.snapshot import Snapshot
from broker.allocation.table_rows import from_snapshot
from broker.allocation.verify import verify
from broker.allocation.won import Market
from broker.database.certificates import RoundCertificate
from broker.database.tables import Tenant
from broker.identity.authority import Authority
from broker.queries.market import find_certificate
from broker.rounds import economics as module
from broker.rounds.certificate import (
    CertificateError,
    SignedCertificate,
    Statement,
    balance_of,
    differences,
    open_certificate,
)
from broker.rounds.economics import economics_of, keep_up, leave_out_old, threshold_audit, work_out
from broker.settings import Settings
from tests.broker.speaking import Scene
from tests.simulation.founding import TENANT_ID
from training.clock import ManualClock
from training.roundlog.signing import canonical_json


def _document(scene: Scene, number: int = 1) -> SignedCertificate:
    row = scene.market.database.read(lambda session: find_certificate(session, number))
    return SignedCertificate.model_validate_json(row.document)


def _statement(scene: Scene, number: int = 1) -> Statement:
    return open_certificate(_document(scene, number), scene.market.authority.ca_pem)


def _documents(scene: Scene) -> tuple[Snapshot, Clearing]:
    row = scene.round()
    assert row is not None
    artifacts = scene.market.artifacts
    return (
        Snapshot.from_json(artifacts.get_bytes(row.snapshot_digest)),
        Clearing.from_json(artifacts.get_bytes(row.clearing_digest)),
    )


def test_a_committed_round_is_signed_with_its_figures(scene: Scene) -> None:
    scene.submit(2)
    scene.submit(2, sites_max=2)
    snapshot, clearing = _documents(scene)
    statement = _statement(scene)
    assert differences(statement, clearing) == []
    assert verify(snapshot, clearing) == []
    assert (statement.jobs_considered, statement.jobs_placed, statement.jobs_dropped) == (2, 2, 0)
    assert statement.balance.is_even
    assert statement.balance.charges_micros_per_hour > 0
    assert (statement.buyers_above_value, statement.pools_below_ask) == (0, 0)
    proof = statement.certificate
    lost = proof.regret_sum_micros_per_hour + proof.slack_sum_micros_per_hour
    assert proof.bound_micros_per_hour - proof.welfare_micros_per_hour == lost
    assert {"compile", "rounding", "write"} <= set(statement.seconds)
    assert statement.economics_state == "pending"


def test_a_certificate_of_another_market_or_altered_or_by_another_key_does_not_hold(
    scene: Scene, tmp_path: Path
) -> None:
    scene.submit(2)
    scene.round()
    document, ca = _document(scene), scene.market.authority.ca_pem
    other = Authority(tmp_path / "other", ManualClock())
    with pytest.raises(CertificateError, match="did not vouch"):
        open_certificate(document, other.ca_pem)
    signed = document.signed.model_copy(update={"payload": document.signed.payload[:-8] + "AAAAAAA="})
    with pytest.raises(CertificateError, match="altered"):
        open_certificate(document.model_copy(update={"signed": signed}), ca)
    # The CA vouches for gateways and sites too: none of those may state what a round was.
    certificate = scene.market.authority.server_certificate().certificate_path.read_text()
    with pytest.raises(CertificateError, match="not one for rounds"):
        open_certificate(document.model_copy(update={"key_pem": certificate}), ca)
    forged = SignedCertificate(signed=other.sign_round("round-certificate", b"{}"), key_pem=document.key_pem)
    with pytest.raises(CertificateError, match="another key"):
        open_certificate(forged, ca)


def test_a_statement_says_in_which_figure_it_is_not_about_a_clearing(scene: Scene) -> None:
    scene.submit(2)
    _, clearing = _documents(scene)
    statement = _statement(scene)
    cheaper = clearing.placements[0].pools[0].model_copy(update={"payout_micros_per_gpu_hour": 1})
    row = clearing.placements[0].model_copy(update={"pools": (cheaper,)})
    other = clearing.model_copy(update={"placements": (row, *clearing.placements[1:])})
    assert {text.split(":")[0] for text in differences(statement, other)} == {"clearing_digest", "balance"}


def _at_home(scene: Scene, site_id: str) -> None:
    def set_home(session: Session) -> None:
        session.get_one(Tenant, TENANT_ID).home_site = site_id

    scene.write(set_home)


def test_economics_are_worked_out_after_the_commit_and_signed(scene: Scene) -> None:
    _at_home(scene, "ada")
    scene.submit(2)
    scene.submit(4, sites_max=2)
    scene.round()
    assert work_out(scene.market) == 1
    assert work_out(scene.market) is None
    statement = _statement(scene)
    economics = statement.economics
    assert (statement.economics_state, economics is not None) == ("done", True)
    assert economics is not None
    assert (economics.sites, economics.coalitions, economics.complete) == (3, 6, True)
    assert economics.jobs_without_home == 0
    assert economics.sites_better_off == 3
    # ada's customers need four slots across sites, and ada has two: alone it has less.
    assert economics.gain_least is not None
    assert economics.gain_least > 1
    assert economics.core_slack_micros_per_hour >= -statement.certificate.gap_micros_per_hour - 10
    assert economics.division_distance is not None
    assert economics.threshold is not None
    assert economics.threshold.trades == 2
    assert economics.threshold.paid_micros_per_hour == statement.balance.charges_micros_per_hour
    row = scene.market.database.read(lambda session: find_certificate(session, 1))
    assert hashlib.sha256(row.sites.encode()).hexdigest() == economics.sites_digest
    sites = json.loads(row.sites)
    assert [site["site_id"] for site in sites] == ["ada", "bob", "cid"]
    # Shapley divides what all have together.
    whole = sum(site["federated_micros_per_hour"] for site in sites)
    assert abs(sum(site["shapley_micros_per_hour"] for site in sites) - whole) <= 0.02 * whole


def test_a_site_whose_customers_have_no_home_has_nothing_alone(scene: Scene) -> None:
    scene.submit(2)
    scene.round()
    work_out(scene.market)
    economics = _statement(scene).economics
    assert economics is not None
    assert (economics.jobs_without_home, economics.gain_least, economics.division_distance) == (1, None, None)


def test_a_budget_of_time_leaves_coalitions_out_and_says_so(scene: Scene) -> None:
    _at_home(scene, "ada")
    scene.submit(2)
    scene.submit(2)
    snapshot, clearing = _documents(scene)
    ticks = iter(range(1000))
    economics, rows = economics_of(snapshot, clearing, tick=lambda: float(next(ticks)), budget_s=4.0)
    assert 0 < economics.coalitions < 6
    assert not economics.complete
    assert (economics.division_distance, economics.threshold) == (None, None)
    assert economics.sites_digest == hashlib.sha256(canonical_json(rows)).hexdigest()


def test_the_newest_round_comes_first_and_the_oldest_are_left_out(scene: Scene) -> None:
    for _ in range(4):
        scene.submit(1)
        scene.round()
    settings = Settings(home=scene.market.settings.home, economics_rounds_max=2)
    market = type(scene.market)(
        **{name: getattr(scene.market, name) for name in scene.market.__slots__ if name != "settings"},  # type: ignore[arg-type]  # every other part as it is
        settings=settings,
    )
    waited: list[bool] = []
    keep_up(market, wait=lambda: bool(waited.append(True)) or True)
    assert [_statement(scene, number).economics_state for number in (1, 2, 3, 4)] == [
        "left_out",
        "left_out",
        "done",
        "done",
    ]
    assert waited == [True]
    assert leave_out_old(market) == 0


def test_a_round_whose_documents_are_gone_is_left_out(scene: Scene) -> None:
    scene.submit(1)
    row = scene.round()
    assert row is not None
    scene.market.artifacts.discard_document(row.snapshot_digest)
    assert work_out(scene.market) == 1
    assert _statement(scene).economics_state == "left_out"


def test_two_workers_sign_the_economics_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.submit(1)
    scene.round()
    original: Callable[..., object] = module.economics_of

    def slow(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(module, "economics_of", original)
        assert work_out(scene.market) == 1  # the other worker, meanwhile
        signed.append(_document(scene))
        return original(*arguments, **options)

    signed: list[SignedCertificate] = []
    monkeypatch.setattr(module, "economics_of", slow)
    assert work_out(scene.market) == 1
    assert _document(scene) == signed[0]
    assert scene.market.database.read(lambda session: session.get_one(RoundCertificate, 1)).economics == "done"


def test_the_threshold_rule_is_an_audit_and_never_asks_above_the_value(scene: Scene) -> None:
    for gpus in (2, 2, 2, 1):
        scene.submit(gpus)
    snapshot, clearing = _documents(scene)
    tables = from_snapshot(snapshot)
    audit = threshold_audit(Market(tables, compile_market(tables)), snapshot, clearing)
    assert audit is not None
    worth = sum(row.value_micros_per_hour for row in clearing.placements)
    asks = sum(pool.gpus for row in clearing.placements for pool in row.pools) * 100_000
    assert asks <= audit.threshold_micros_per_hour <= worth
    assert audit.paid_micros_per_hour == balance_of(clearing).charges_micros_per_hour
    assert audit.shading_gain_most_micros_per_hour <= audit.shading_gain_micros_per_hour
