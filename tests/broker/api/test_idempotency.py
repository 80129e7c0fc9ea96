"""The same key never does a thing twice, however many requests race for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import func, select

from broker.database.tables import Hold, Job
from tests.broker.api.conftest import World, code_of, spec


def _count(world: World) -> int:
    return world.market.database.read(lambda session: session.scalar(select(func.count()).select_from(Job)) or 0)


def test_a_storm_of_one_key_makes_one_job_and_one_hold(trading: World) -> None:
    world = trading
    # All of the tenant's credits: a second job could not be paid, so a loser that gets through would be refused.
    document = spec()
    document["market"] |= {"budget_micros": 10**8}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: world.post("/v1/jobs", "acme", document, key="storm"), range(24)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.data for answer in answers}) == 1
    assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1
    assert _count(world) == 1
    held = world.market.database.read(lambda session: session.scalar(select(func.sum(Hold.amount_micros))))
    assert held == 10**8
    assert world.call("GET", "/v1/account", "acme").get_json()["balance_micros"] == 0


def test_the_same_key_for_another_request_is_a_conflict(trading: World) -> None:
    assert trading.post("/v1/jobs", "acme", spec()).status_code == 201
    answer = trading.post("/v1/jobs", "acme", spec(name="other"))
    assert (answer.status_code, code_of(answer)) == (409, "idempotency.conflict")
    assert _count(trading) == 1


def test_keys_of_tenants_are_apart(trading: World) -> None:
    first = trading.post("/v1/jobs", "acme", spec()).get_json()
    second = trading.post("/v1/jobs", "rival", spec()).get_json()
    assert first["job_id"] != second["job_id"]


def test_a_refused_request_leaves_its_key_free(trading: World) -> None:
    answer = trading.post("/v1/jobs", "acme", spec(workdir_digest="0" * 64))
    assert (answer.status_code, code_of(answer)) == (422, "job.workdir_missing")
    assert trading.post("/v1/jobs", "acme", spec()).status_code == 201


def test_a_post_that_creates_or_spends_needs_a_key(trading: World) -> None:
    for key in (None, "", "x" * 201, "tab\tbed"):
        answer = trading.post("/v1/jobs", "acme", spec(), key=key)
        assert answer.status_code in {400, 422}
        assert code_of(answer) in {"idempotency.missing", "request.invalid"}
    answer = trading.post("/v1/admin/tenants/acme/deposit", "admin", {"amount_micros": 1}, key=None)
    assert (answer.status_code, code_of(answer)) == (400, "idempotency.missing")
    assert _count(trading) == 0


def test_a_deposit_is_given_once_for_each_key(world: World) -> None:
    def give(key: str) -> int:
        answer = world.post("/v1/admin/tenants/acme/deposit", "admin", {"amount_micros": 7}, key=key)
        return int(answer.get_json()["balance_micros"])

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(give, ["one"] * 12)) == {7}
    assert give("two") == 14
    answer = world.post("/v1/admin/tenants/rival/deposit", "admin", {"amount_micros": 7}, key="one")
    assert code_of(answer) == "idempotency.conflict"
