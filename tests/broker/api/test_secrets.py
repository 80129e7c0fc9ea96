"""A tenant's secrets: stored as ciphertext, listed by name, given to the site that starts their job, to nobody else."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.tables import Event, Table
from broker.database.tenant_secrets import TenantSecret
from broker.tenant_secrets import SECRETS_PER_TENANT_MAX, VALUE_BYTES_MAX
from sites.protocol import Heartbeat, Offer, PoolOffer, Skill
from sites.secret_box import box_public_key, new_box_key, open_box, secrets_context
from tests.broker.api.conftest import World, code_of, spec
from tests.broker.api.test_jobs import _lease
from tests.broker.api.test_site_routes import _set_state

VALUE = "never-in-clear-51c9"


def put(world: World, who: str, name: str, value: str = VALUE) -> tuple[int, str]:
    answer = world.call("PUT", f"/v1/secrets/{name}", who, json={"value": value})
    assert value[:1000] not in answer.text, "no answer repeats a value"
    return answer.status_code, "" if answer.status_code == 200 else code_of(answer)


def beat_with_skill(world: World) -> None:
    pool = PoolOffer(gpu_type="H100", gpu_ids=("gpu-0", "gpu-1"), ask_micros_per_gpu_hour=1_000_000)
    beat = Heartbeat(agent_version="1", boot="b", offer=Offer(pools=(pool,)), skills=(Skill.SECRETS,))
    assert world.signed("lyon", "POST", "/site/v1/heartbeat", beat.model_dump_json().encode()).status_code == 200


def leased(world: World, state: str = "active") -> str:
    """Submit a job that names a secret, lease it to lyon, and return the lease."""
    beat_with_skill(world)
    job_id = world.post("/v1/jobs", "acme", spec(secrets=["HF_TOKEN"])).get_json()["job_id"]
    lease_id = _lease(world, job_id)
    _set_state(world, lease_id, state)
    return lease_id


def test_a_secret_is_listed_by_name_replaced_and_deleted_and_never_kept_in_clear(trading: World) -> None:
    assert put(trading, "acme", "HF_TOKEN") == (200, "")
    assert put(trading, "acme", "HF_TOKEN", VALUE + "2") == (200, "")
    assert put(trading, "rival", "HF_TOKEN", VALUE + "3") == (200, "")
    (row,) = trading.call("GET", "/v1/secrets", "acme").get_json()["items"]
    assert row == {"name": "HF_TOKEN", "set_ms": trading.clock.now_ms()}
    tables = Table.metadata.sorted_tables
    rows = trading.market.database.read(lambda session: [session.execute(select(table)).all() for table in tables])
    assert "HF_TOKEN" in repr(rows)
    assert VALUE not in repr(rows)
    for path in trading.market.settings.home.rglob("*"):
        assert not path.is_file() or VALUE.encode() not in path.read_bytes(), path
    events = trading.market.database.read(lambda session: session.scalars(select(Event.detail)).all())
    assert "secret HF_TOKEN set" in events
    assert trading.call("DELETE", "/v1/secrets/HF_TOKEN", "acme").status_code == 200
    assert trading.call("GET", "/v1/secrets", "acme").get_json()["items"] == []
    assert code_of(trading.call("DELETE", "/v1/secrets/HF_TOKEN", "acme")) == "request.not_found"
    assert len(trading.call("GET", "/v1/secrets", "rival").get_json()["items"]) == 1


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("HF_TOKEN", "", "request.invalid"),
        ("HF_TOKEN", "x" * (VALUE_BYTES_MAX + 1), "request.invalid"),
        ("HF_TOKEN", "é" * VALUE_BYTES_MAX, "secret.terms"),
        ("HF_TOKEN", "nul\0", "request.malformed"),
        (".hidden", VALUE, "request.invalid"),
        ("a b", VALUE, "request.invalid"),
        ("x" * 64, VALUE, "request.invalid"),
    ],
    ids=["empty", "long", "long in bytes", "nul", "hidden", "blank", "long name"],
)
def test_what_is_no_secret_is_refused_by_name(trading: World, name: str, value: str, code: str) -> None:
    answer = trading.call("PUT", f"/v1/secrets/{name}", "acme", json={"value": value})
    assert code_of(answer) == code
    assert not value or value[:50] not in answer.text
    assert trading.call("GET", "/v1/secrets", "acme").get_json()["items"] == []


def test_a_tenant_has_a_bounded_number_of_secrets(trading: World) -> None:
    def fill(session: Session) -> None:
        for number in range(SECRETS_PER_TENANT_MAX):
            session.add(TenantSecret(tenant_id="acme", name=f"N{number}", sealed=b"", set_ms=0))

    trading.market.database.write("fill", fill)
    assert put(trading, "acme", "ONE_MORE") == (422, "secret.terms")
    assert put(trading, "acme", "N7") == (200, "")


def test_a_job_needs_its_secrets_stored_and_a_site_that_keeps_them(trading: World) -> None:
    asked = spec(secrets=["HF_TOKEN"])
    put(trading, "rival", "HF_TOKEN")
    missing = trading.post("/v1/jobs", "acme", asked)
    assert (missing.status_code, code_of(missing)) == (422, "secret.missing")
    put(trading, "acme", "HF_TOKEN")
    nowhere = trading.post("/v1/jobs", "acme", asked)
    assert code_of(nowhere) == "job.never_possible"
    assert "no private place for its secrets at lyon" in nowhere.get_json()["detail"]
    assert trading.post("/v1/quote", "acme", asked).get_json()["items"] == []
    beat_with_skill(trading)
    assert trading.post("/v1/jobs", "acme", asked).status_code == 201
    assert trading.post("/v1/quote", "acme", asked).get_json()["items"]


def test_the_site_that_starts_the_job_gets_the_value_in_a_box_for_itself(trading: World) -> None:
    put(trading, "acme", "HF_TOKEN")
    lease_id = leased(trading)
    key = new_box_key()
    body = json.dumps({"public_key": box_public_key(key)}).encode()
    path = f"/site/v1/leases/{lease_id}/1/secrets"
    answer = trading.signed("lyon", "POST", path, body)
    assert answer.status_code == 200, answer.text
    box = bytes.fromhex(answer.get_json()["box"])
    assert VALUE not in answer.text
    assert json.loads(open_box(key, box, secrets_context(lease_id, 1))) == {"HF_TOKEN": VALUE}
    handed = trading.market.database.read(
        lambda session: session.scalars(select(Event.detail).where(Event.kind == "secrets")).all()
    )
    assert handed == ["HF_TOKEN"]
    # To nobody else, for no other lease, and not twice for one signature.
    trading.join("oslo")
    assert code_of(trading.signed("oslo", "POST", path, body)) == "request.not_found"
    assert code_of(trading.signed("lyon", "POST", path.replace("/1/", "/2/"), body)) == "lease.stale_epoch"
    assert code_of(trading.signed("lyon", "POST", path, b'{"public_key": "' + b"0" * 64 + b'"}')) == "request.refused"
    assert trading.call("POST", path, "acme", json={"public_key": "0" * 64}).status_code == 401
    signed = trading.sites["lyon"].sign_request("POST", path, body).as_dict() | {"Content-Type": "application/json"}
    assert trading.client.post(path, data=body, headers=signed).status_code == 200
    assert code_of(trading.client.post(path, data=body, headers=signed)) == "site.sequence_replayed"
    trading.call("DELETE", "/v1/secrets/HF_TOKEN", "acme")
    assert code_of(trading.signed("lyon", "POST", path, body)) == "secret.missing"


def test_no_value_for_a_lease_that_is_not_active(trading: World) -> None:
    put(trading, "acme", "HF_TOKEN")
    lease_id = leased(trading, "confirmed")
    body = json.dumps({"public_key": box_public_key(new_box_key())}).encode()
    refused = trading.signed("lyon", "POST", f"/site/v1/leases/{lease_id}/1/secrets", body)
    assert (refused.status_code, code_of(refused)) == (409, "request.conflict")


def test_ciphertext_moved_to_another_tenant_does_not_open(trading: World) -> None:
    put(trading, "rival", "HF_TOKEN")
    put(trading, "acme", "HF_TOKEN", "own")
    lease_id = leased(trading)

    def steal(session: Session) -> None:
        stolen = session.get_one(TenantSecret, ("rival", "HF_TOKEN")).sealed
        session.get_one(TenantSecret, ("acme", "HF_TOKEN")).sealed = stolen

    trading.market.database.write("steal", steal)
    body = json.dumps({"public_key": box_public_key(new_box_key())}).encode()
    refused = trading.signed("lyon", "POST", f"/site/v1/leases/{lease_id}/1/secrets", body)
    assert (refused.status_code, code_of(refused)) == (409, "secret.unreadable")
