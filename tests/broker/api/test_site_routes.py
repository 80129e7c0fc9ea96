"""Sites: in by a one-time token, then signed requests that count once each."""

from __future__ import annotations

import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.audit import audit
from broker.database.tables import Event, Lease, LeasedGpu, Site, SiteCertificate, Table
from broker.database.uploads import SiteUpload
from broker.identity.join import LIFE_S
from broker.streams import streams_of
from sites.identity import certificate_request_pem, decode_join_string, site_uri
from sites.protocol import REQUEST_AGE_MS_MAX
from tests.broker.api.conftest import WORKDIR, World, code_of, spec
from tests.broker.api.test_jobs import _lease

BEAT = "/site/v1/heartbeat"


def _invite(world: World, site_id: str = "lyon") -> str:
    answer = world.post("/v1/admin/sites/invite", "admin", {"site_id": site_id})
    assert answer.status_code == 201, answer.text
    return decode_join_string(answer.get_json()["join_string"]).token


def _enrol(world: World, token: str, key: Ed25519PrivateKey, site_id: str = "lyon") -> tuple[int, str]:
    body = {"site_id": site_id, "join_token": token, "csr_pem": certificate_request_pem(key, site_uri(site_id))}
    answer = world.client.post("/site/v1/enrol", json=body)
    return answer.status_code, "" if answer.status_code == 200 else code_of(answer)


def test_a_site_joins_and_is_heard(world: World) -> None:
    world.join("lyon")
    answer = world.beat("lyon")
    assert answer.status_code == 200, answer.text
    assert answer.get_json()["heartbeat_s"] == world.market.settings.heartbeat_s
    (row,) = world.call("GET", "/v1/admin/sites", "admin").get_json()["items"]
    assert (row["state"], row["pools"][0]["pool_id"]) == ("live", "lyon/H100")


def test_a_join_token_works_once_for_its_own_site_for_a_quarter_of_an_hour(world: World) -> None:
    key, stranger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    refused = (401, "join.refused")
    token = _invite(world)
    assert _enrol(world, token, key, "oslo") == refused
    assert _enrol(world, "0" * 64, key) == refused
    assert _enrol(world, token, key)[0] == 200
    assert _enrol(world, token, key)[0] == 200, "the answer was lost: the same key may ask again"
    assert _enrol(world, token, stranger) == refused
    late = _invite(world, "oslo")
    world.clock.advance_s(LIFE_S)
    assert _enrol(world, late, key, "oslo") == refused
    assert _enrol(world, token, key) == refused


def test_only_a_hash_of_a_secret_is_kept(world: World) -> None:
    secrets = [_invite(world), world.tokens["acme"].split("_")[3]]
    tables = Table.metadata.sorted_tables
    rows = world.market.database.read(lambda session: [session.execute(select(table)).all() for table in tables])
    assert any("acme" in repr(row) for row in rows)
    for secret in secrets:
        assert secret not in repr(rows)
        for path in world.market.settings.home.rglob("market.sqlite3*"):
            assert secret.encode() not in path.read_bytes()


def test_a_site_that_joins_again_counts_anew_and_its_former_key_is_out(world: World) -> None:
    former = world.join("lyon")
    assert world.beat("lyon").status_code == 200
    world.join("lyon")
    assert world.beat("lyon").status_code == 200
    world.sites["lyon"] = former
    assert code_of(world.beat("lyon")) == "site.certificate_revoked"


def test_a_site_that_joins_again_has_its_first_heartbeats_taken_and_its_history_says_so(world: World) -> None:
    """Enrolment resets the number of the last heartbeat too: else the first ones would be overtaken by a former's."""
    world.join("lyon")
    for _ in range(5):
        assert world.beat("lyon").status_code == 200
    site = world.market.database.read(lambda session: session.get_one(Site, "lyon"))
    assert site.heartbeat_sequence == site.sequence_max >= 5
    world.join("lyon")
    fresh = world.market.database.read(lambda session: session.get_one(Site, "lyon"))
    assert (fresh.heartbeat_sequence, fresh.sequence_max, fresh.sequence_seen) == (0, 0, "0")
    answer = world.beat("lyon")
    assert answer.status_code == 200, answer.text
    assert world.market.database.read(audit) == []
    events = world.market.database.read(lambda session: list(session.scalars(select(Event).order_by(Event.event_id))))
    assert [event.after for event in events if event.kind == "agent"] == ["rejoined"]


def test_a_removed_site_is_out_for_good(world: World) -> None:
    world.join("lyon")
    assert world.post("/v1/admin/sites/lyon/remove", "admin", {}).status_code == 200
    answer = world.beat("lyon")
    assert (answer.status_code, code_of(answer)) == (401, "site.certificate_revoked")
    again = world.post("/v1/admin/sites/invite", "admin", {"site_id": "lyon"})
    assert (again.status_code, code_of(again)) == (409, "request.conflict")
    assert world.post("/v1/admin/sites/oslo/remove", "admin", {}).status_code == 404


def _raw(world: World, headers: dict[str, str], body: bytes = b"{}", path: str = BEAT) -> str:
    answer = world.client.post(path, data=body, headers={"Content-Type": "application/json"} | headers)
    assert answer.status_code in {401, 422}, answer.text
    return code_of(answer)


def test_each_flaw_of_a_signed_request_has_its_own_code(world: World) -> None:
    identity = world.join("lyon")
    fresh = lambda: identity.sign_request("POST", BEAT, b"{}").as_dict()  # noqa: E731
    assert _raw(world, fresh()) == "request.invalid", "signed well: only the body is wrong"
    assert _raw(world, {}) == "credential.missing"
    assert _raw(world, fresh() | {"Hansa-Sequence": "-1"}) == "credential.malformed"
    assert _raw(world, fresh() | {"Hansa-Sequence": "0"}) == "credential.malformed"
    assert _raw(world, fresh() | {"Hansa-Time-Ms": "9" * 19}) == "credential.malformed"
    assert _raw(world, fresh() | {"Hansa-Signature": "!"}) == "credential.malformed"
    assert _raw(world, fresh() | {"Hansa-Certificate": "Z"}) == "credential.malformed"
    assert _raw(world, fresh() | {"Hansa-Certificate": "abc"}) == "site.certificate_unknown"
    assert _raw(world, fresh() | {"Hansa-Sequence": "77"}) == "site.signature_invalid"
    assert _raw(world, fresh() | {"Hansa-Time-Ms": "77"}) == "site.signature_invalid"
    assert _raw(world, fresh(), body=b"{ }") == "site.signature_invalid"
    assert _raw(world, fresh(), path=f"{BEAT}?x=1") == "site.signature_invalid"
    for signed in (identity.sign_request("PUT", BEAT, b"{}"), identity.sign_request("POST", "/site/v1/enrol", b"{}")):
        assert _raw(world, signed.as_dict()) == "site.signature_invalid"
    old = fresh()
    world.clock.step_utc_s(REQUEST_AGE_MS_MAX / 1000 + 1)
    assert _raw(world, old) == "site.time_outside_window"
    early = fresh()
    world.clock.step_utc_s(-REQUEST_AGE_MS_MAX / 1000 - 1)
    assert _raw(world, early) == "site.time_outside_window"
    world.clock.advance_s(world.market.settings.site_certificate_s + 1)
    assert _raw(world, fresh()) == "site.certificate_expired"


def test_another_sites_key_does_not_sign_for_this_one(world: World) -> None:
    world.join("lyon")
    oslo = world.join("oslo").sign_request("POST", BEAT, b"{}").as_dict()
    lyon = world.sites["lyon"].sign_request("POST", BEAT, b"{}").as_dict()
    mixed = oslo | {"Hansa-Certificate": lyon["Hansa-Certificate"]}
    assert _raw(world, mixed) == "site.signature_invalid"


def test_a_replayed_heartbeat_changes_nothing(world: World) -> None:
    world.join("lyon")
    assert world.beat("lyon").status_code == 200
    body = json.dumps({"agent_version": "1", "boot": "b", "offer": {"pools": []}}).encode()
    signed = world.sites["lyon"].sign_request("POST", BEAT, body).as_dict()
    assert world.client.post(BEAT, data=body, headers={"Content-Type": "application/json"} | signed).status_code == 200
    assert world.beat("lyon").status_code == 200
    before = _row(world)
    world.clock.advance_s(1)
    assert _raw(world, signed, body) == "site.sequence_replayed"
    assert _row(world) == before


def _row(world: World) -> tuple[object, ...]:
    def work(session: Session) -> tuple[object, ...]:
        site = session.get_one(Site, "lyon")
        events = session.query(Event).count()
        return site.offer, site.version, site.heard_ms, site.sequence_seen, events

    return world.market.database.read(work)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"boot": ', "request.malformed"),
        (b'{"boot": "\\u0000"}', "request.malformed"),
        (b'{"boot": NaN}', "request.invalid"),
        (b"[" * 50_000, "request.malformed"),
        (b"[]", "request.invalid"),
        (b'{"surprise": 1}', "request.invalid"),
    ],
)
def test_hostile_heartbeats_are_refused_by_name(world: World, body: bytes, code: str) -> None:
    world.join("lyon")
    answer = world.signed("lyon", "POST", BEAT, body)
    assert answer.status_code in {400, 422}
    assert code_of(answer) == code


def test_a_certificate_is_renewed_with_the_heartbeat(world: World) -> None:
    identity = world.join("lyon")
    world.clock.advance_s(world.market.settings.site_certificate_s * 0.7)
    csr = identity.renewal_csr_pem()
    assert csr is not None
    body = {"agent_version": "1", "boot": "b", "offer": {"pools": []}, "renewal_csr_pem": csr}
    answer = world.signed("lyon", "POST", BEAT, json.dumps(body).encode())
    identity.replace_certificate(answer.get_json()["certificate_pem"])
    world.clock.advance_s(world.market.settings.site_certificate_s * 0.7)
    assert world.beat("lyon").status_code == 200
    rows = world.market.database.read(lambda session: list(session.scalars(select(SiteCertificate))))
    assert len(rows) == 2


def _active(world: World) -> tuple[str, str]:
    job_id = world.post("/v1/jobs", "acme", spec()).get_json()["job_id"]
    lease_id = _lease(world, job_id)

    def work(session: Session) -> None:
        session.add(LeasedGpu(lease_id=lease_id, site_id="lyon", gpu_id="gpu-0", live=True))

    world.market.database.write("gpu", work)
    return job_id, lease_id


def _set_state(world: World, lease_id: str, state: str) -> None:
    def work(session: Session) -> None:
        session.get_one(Lease, lease_id).state = state

    world.market.database.write("state", work)


def test_a_site_reads_only_what_its_leases_need(trading: World) -> None:
    digest = hashlib.sha256(WORKDIR).hexdigest()
    path = f"/site/v1/artifacts/{digest}"
    trading.join("oslo")
    assert code_of(trading.signed("lyon", "GET", path)) == "artifact.missing"
    _, lease_id = _active(trading)
    _set_state(trading, lease_id, "active")
    assert trading.signed("lyon", "GET", path).data == WORKDIR
    part = trading.signed("lyon", "GET", path, Range="bytes=5-9")
    assert (part.status_code, part.data) == (206, WORKDIR[5:10])
    refused = trading.signed("oslo", "GET", path)
    assert (refused.status_code, code_of(refused)) == (404, "artifact.missing")
    _set_state(trading, lease_id, "ended")
    assert code_of(trading.signed("lyon", "GET", path)) == "artifact.missing"


def test_a_site_stores_only_while_it_holds_a_lease(trading: World) -> None:
    content = b"checkpoint"
    digest = hashlib.sha256(content).hexdigest()
    path = f"/site/v1/artifacts/{digest}?offset=0&size={len(content)}"
    assert trading.signed("lyon", "PUT", path, content).status_code == 404
    _active(trading)
    # The lease has ended, but its processes live: the last checkpoint is on its way.
    half = trading.signed("lyon", "PUT", path, content[:5]).get_json()
    assert (half["held_bytes"], half["complete"]) == (5, False)
    assert trading.signed("lyon", "PUT", path, content).get_json()["complete"]


def test_a_site_learns_nothing_of_what_others_have_brought(trading: World) -> None:
    """The tenant's workdir is held: a site that only knows the digest brings every byte itself."""
    _active(trading)
    digest, size = hashlib.sha256(WORKDIR).hexdigest(), len(WORKDIR)
    path = f"/site/v1/artifacts/{digest}?offset=0&size={size}"
    asked = trading.signed("lyon", "PUT", path, b"").get_json()
    assert asked == {"digest": digest, "size_bytes": size, "held_bytes": 0, "complete": False}
    brought = lambda: trading.market.database.read(  # noqa: E731
        lambda session: session.get(SiteUpload, ("lyon", digest))
    )
    assert brought() is None
    assert trading.signed("lyon", "PUT", path, WORKDIR).get_json()["complete"]
    assert brought() is not None
    assert trading.signed("lyon", "PUT", path, b"").get_json()["complete"]


def test_streams_take_each_byte_once_and_no_old_epoch(trading: World) -> None:
    _, lease_id = _active(trading)
    trading.join("oslo")
    path = f"/site/v1/leases/{lease_id}/1/streams/log?offset="
    send = lambda site, where, body: trading.signed(  # noqa: E731
        site, "POST", where, body, **{"Content-Type": "application/octet-stream"}
    )
    assert send("lyon", f"{path}0", b"hello ").get_json() == {"held_bytes": 6, "full": False}
    assert send("lyon", f"{path}0", b"hello world").get_json()["held_bytes"] == 11
    assert send("lyon", f"{path}99", b"!").get_json()["held_bytes"] == 11
    assert streams_of(trading.market).read(lease_id, "log", 0) == b"hello world"
    stale = send("lyon", path.replace("/1/", "/2/") + "0", b"x")
    assert (stale.status_code, code_of(stale)) == (409, "lease.stale_epoch")
    assert send("oslo", f"{path}11", b"x").status_code == 404
    assert send("lyon", path.replace("/log", "/passwords") + "0", b"x").status_code == 404
    assert send("lyon", path.replace(lease_id, "lease_none") + "0", b"x").status_code == 404


def test_a_site_is_told_its_own_money_once_for_each_signature(world: World) -> None:
    world.join("lyon")
    world.beat("lyon")
    answer = world.signed("lyon", "GET", "/site/v1/statement?days=7")
    assert answer.status_code == 200, answer.text
    told = answer.get_json()
    assert (told["site_id"], told["payout_micros"], told["until_ms"] - told["since_ms"]) == ("lyon", 0, 7 * 86_400_000)
    assert world.signed("lyon", "GET", "/site/v1/statement?days=0").status_code == 422
    assert world.call("GET", "/site/v1/statement", "admin").status_code == 401
