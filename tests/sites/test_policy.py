"""The owner's policy: what it refuses, with which code and reach, and what of it is announced beforehand."""

from __future__ import annotations

import datetime as dt
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sites.errors import PolicyError
from sites.inventory import Measured, Terms, offer
from sites.leases import refused_renewals
from sites.policy import Asked, Policy, PolicyBook, load_policy, objections
from sites.protocol import RefusalScope
from sites.settings import SiteSettings, load_settings
from sites.site_cli import app
from tests.sites.conftest import StartAgent, job
from tests.sites.market import Grant, Market
from tests.sites.test_leases import HOUSE, SPEC, order, record, standing
from tests.sites.test_settings import GOOD, write

NOW = dt.datetime(2030, 1, 7, 12, tzinfo=dt.UTC)
HOME = {"data": {"home_site": "hamburg"}}
PROPOSAL = Asked(site_id="hamburg", tenant_id="fugger", spec=SPEC, gpus=2, pool_gpus=8, peers=(), term_s=3600)
CASE = Path(__file__).parents[2] / "training/examples/cases/pretraining.yaml"


def spec(**market: Any) -> Any:
    return SPEC.model_copy(update={"market": SPEC.market.model_validate(SPEC.market.model_dump() | market)})


@pytest.mark.parametrize(
    ("policy", "changes", "code", "scope"),
    [
        ({"tenants_refused": ["fugger"]}, {}, "policy.tenant", "site"),
        ({"tenants_allowed": ["welser"]}, {}, "policy.tenant", "site"),
        ({"tenants_allowed": []}, {}, "policy.tenant", "site"),
        ({"workdirs_allowed": ["1" * 64]}, {}, "policy.workdir", "site"),
        ({"setup_allowed": False}, {}, "policy.setup", "site"),
        ({"hours": {"open": [{"from": "20:00", "to": "07:00"}]}}, {}, "policy.hours", "site"),
        ({"lease_hours_max": 0.5}, {}, "policy.lease_hours", "site"),
        ({"gpus_max_per_lease": 1}, {}, "policy.gpus_max", "configuration"),
        ({"local_share": 0.8}, {}, "policy.local_share", "configuration"),
        ({"local_share": 0.25}, {"lent": 5}, "policy.local_share", "configuration"),
        ({"peers_refused": ["florenz"]}, {"peers": ("florenz",)}, "policy.peers", "gangs"),
        ({"data_stays": True}, {"spec": spec(**HOME), "peers": ("bremen",)}, "policy.data", "gangs"),
        ({"data_stays": True}, {"spec": spec(**HOME, sites_max=2), "peers": None}, "policy.data", "gangs"),
    ],
)
def test_a_proposal_is_refused_with_a_code_and_its_reach(
    policy: dict[str, Any], changes: dict[str, Any], code: str, scope: str
) -> None:
    found = objections(Policy.model_validate(policy), replace(PROPOSAL, **changes), NOW)
    assert [(row.code, row.scope) for row in found] == [(code, scope)]


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ({}, {}),
        ({"tenants_allowed": ["fugger"], "tenants_refused": ["medici"]}, {}),
        ({"workdirs_allowed": [SPEC.workdir_digest]}, {}),
        ({"hours": {"open": [{"from": "08:00", "to": "20:00"}]}}, {}),
        ({"lease_hours_max": 1}, {}),
        ({"gpus_max_per_lease": 2}, {}),
        ({"local_share": 0.25}, {"lent": 4}),
        ({"peers_refused": ["florenz"]}, {"peers": ("bremen",)}),
        ({"data_stays": True}, {"spec": spec(**HOME)}),
        ({"data_stays": True, "data_may_go_to": ["bremen"]}, {"spec": spec(**HOME), "peers": ("bremen",)}),
        ({"data_stays": True}, {"spec": spec(data={"home_site": "bremen"}), "peers": ("bremen",)}),
    ],
)
def test_what_no_rule_forbids_is_welcome(policy: dict[str, Any], changes: dict[str, Any]) -> None:
    assert objections(Policy.model_validate(policy), replace(PROPOSAL, **changes), NOW) == []


def test_a_refusal_by_hours_says_from_when_on_the_site_may_be_asked_again() -> None:
    policy = Policy.model_validate({"hours": {"open": [{"from": "20:00", "to": "07:00"}]}})
    (found,) = objections(policy, PROPOSAL, NOW)
    assert found.until_ms == round(NOW.replace(hour=20).timestamp() * 1000)


def test_a_lease_that_has_lasted_long_enough_is_not_renewed() -> None:
    running = record(began_ms=1_000_000)
    active = order(phase="active", term_s=3600, term_ends_ms=1_000_000 + 2 * 3_600_000)
    house = replace(HOUSE, policy=Policy(lease_hours_max=3))
    assert refused_renewals([active], standing(running), house) == []
    (refused,) = refused_renewals([active], standing(running), replace(house, policy=Policy(lease_hours_max=2.9)))
    assert (refused.code, refused.scope) == ("policy.lease_hours", RefusalScope.SITE)
    (refused,) = refused_renewals([active], standing(running), replace(house, policy=Policy(tenants_allowed=())))
    assert refused.code == "policy.tenant"


def test_what_a_round_can_know_is_announced_instead_of_vetoed(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD.replace("    gpus: 2\n    ask: 0.25", "    gpus: 8\n    ask: 0.25")))
    policy = Policy.model_validate(
        {
            "local_share": 0.25,
            "gpus_max_per_lease": 4,
            "peers_refused": ["bremen"],
            "hours": {"open": [{"from": "20:00", "to": "07:00"}]},
        }
    )
    offered = offer(settings, Measured(), Terms(policy, {}, draining=False, now=NOW))
    pool = offered.pools[0]
    assert (len(pool.gpu_ids), pool.job_gpus_max) == (6, 4)
    assert offered.links == ()
    opens = round(NOW.replace(hour=20).timestamp() * 1000)
    assert (pool.reserved[0].to_ms, pool.reserved[0].gpus) == (opens, 8)
    assert offered.policy_digest == policy.digest
    later = offer(settings, Measured(), Terms(policy, {}, draining=False, now=NOW + dt.timedelta(hours=3)))
    assert later == offered, "an offer that changes by itself would call for a round each time"


def test_a_pool_that_is_kept_whole_is_not_offered(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD))
    assert offer(settings, Measured(), Terms(Policy(local_share=1.0), {}, draining=False, now=NOW)).pools == ()


def test_a_policy_is_read_again_when_it_changes_and_a_broken_one_leaves_the_old_in_force(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("tenants_refused: [medici]\n")
    book = PolicyBook(Policy(), path)
    assert book.current().tenants_refused == ("medici",)
    path.write_text("tenants_refused: [medici, fugger]\n")
    assert book.current().tenants_refused == ("medici", "fugger")
    path.write_text("tenants_refused: [medici, fugger]\nlocal_share: 3\n")
    assert book.current().tenants_refused == ("medici", "fugger")
    assert "line 2, local_share" in book.fault
    path.unlink()
    assert book.current().tenants_refused == ("medici", "fugger")
    path.write_text("{}\n")
    os.utime(path, ns=(1, 1))
    assert (book.current(), book.fault) == (Policy(), "")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("tenants_refused: [a]\nlocal_share: 2\n", 2, "local_share"),
        ("\nhours:\n  zone: UTC\n  open: [{from: 08:00, to: 99:00}]\n", 4, "not a time of day"),
        ("tenants: [a]\n", 1, "Extra inputs"),
        ("tenants_allowed: [a]\ntenants_refused: [a]\n", 1, "both allowed and refused"),
        ("data_may_go_to: [bremen]\n", 1, "exceptions from data_stays"),
        ("workdirs_allowed: [short]\n", 1, "workdirs_allowed.0"),
    ],
)
def test_a_fault_is_told_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(PolicyError) as told:
        load_policy(tmp_path / "policy.yaml")
    assert f"line {line}," in str(told.value)
    assert words in str(told.value)


def test_a_site_takes_its_policy_from_one_place(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("local_share: 0.5\n")
    settings = load_settings(write(tmp_path, GOOD + "policy_file: policy.yaml\n"))
    assert settings.policy_file == (tmp_path / "policy.yaml").resolve()
    with pytest.raises(Exception, match="stands in one place"):
        load_settings(write(tmp_path, GOOD + "policy_file: policy.yaml\npolicy: {gpus_max_per_lease: 2}\n"))


@pytest.fixture
def settings(settings: SiteSettings) -> SiteSettings:
    path = settings.folder.parent / "policy.yaml"
    path.write_text("tenants_refused: [tenant]\n")
    return settings.model_copy(update={"policy_file": path})


def test_a_veto_reaches_the_broker_with_its_code_and_the_owner_may_change_their_mind(
    market: Market, settings: SiteSettings, start_agent: StartAgent, tmp_path: Path
) -> None:
    agent = start_agent()
    market.grants["lease_a"] = Grant("lease_a", "job_a", job(market, tmp_path / "job", "pass"))
    assert agent.tick()
    assert agent.tick()
    said = market.vetoes["lease_a"]
    assert (said.code, said.scope) == ("policy.tenant", RefusalScope.SITE)
    assert not market.confirmations
    assert agent.records == []
    before = market.heartbeats[-1].offer.policy_digest
    assert settings.policy_file is not None
    settings.policy_file.write_text("{}\n")
    assert agent.tick()
    assert market.heartbeats[-1].offer.policy_digest != before


def test_the_command_judges_a_job(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("tenants_refused: [medici]\npeers_refused: [florenz]\n")

    def check(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["policy", "check", str(path), *words])
        return result.exit_code, result.output

    code, output = check()
    assert code == 0
    assert "tenants   all, not medici" in output
    assert check(str(CASE), "--tenant", "fugger")[0] == 0
    code, output = check(str(CASE), "--tenant", "medici", "--peer", "florenz", "--json")
    assert code == 1
    assert [row["code"] for row in json.loads(output)["refusals"]] == ["policy.tenant", "policy.peers"]
    path.write_text("local_share: 2\n")
    code, output = check()
    assert code == 1
    assert "[policy.invalid]" in output
    path.write_text("{}")
    code, output = check(str(tmp_path / "none.yaml"))
    assert (code, "is no job" in output) == (1, True)
