"""A tenant's way through the API: quote, submit, list, watch, cancel, fetch."""

from __future__ import annotations

import hashlib
import json

from sqlalchemy.orm import Session

from broker.allocation.clearing import Certificate
from broker.database.tables import Artifact, JobArtifact, Lease, Placement, Round
from broker.streams import streams_of
from tests.broker.api.conftest import WORKDIR, World, code_of, spec


def _submit(world: World, who: str = "acme", key: str = "k") -> str:
    answer = world.post("/v1/jobs", who, spec(), key=key)
    assert answer.status_code == 201, answer.text
    return str(answer.get_json()["job_id"])


def test_a_submitted_job_is_shown_with_its_budget_held(trading: World) -> None:
    job = trading.call("GET", f"/v1/jobs/{_submit(trading)}", "acme").get_json()
    assert (job["state"], job["reason_code"], job["progress"]) == ("queued", "waiting", 0)
    assert (job["budget_micros"], job["held_micros"], job["cost_micros"]) == (5_000_000, 5_000_000, 0)
    assert job["placement"] is None
    assert job["spec"]["resources"] == {"accelerators": [{"gpu_type": "H100", "count_min": 1, "count_max": 2}]}
    account = trading.call("GET", "/v1/account", "acme").get_json()
    assert (account["balance_micros"], account["held_micros"]) == (95_000_000, 5_000_000)


def test_a_quote_prices_candidates_and_changes_nothing(trading: World) -> None:
    before = trading.call("GET", "/v1/admin/ledger", "admin").get_json()
    answer = trading.call("POST", "/v1/quote", "acme", json=spec())
    assert answer.status_code == 200, answer.text
    rows = answer.get_json()["items"]
    assert {tuple(row["sites"]) for row in rows} == {("lyon",)}
    assert all(row["samples_per_s"] > 0 and row["total_micros"] > 0 for row in rows)
    assert trading.call("GET", "/v1/admin/ledger", "admin").get_json() == before
    assert trading.call("GET", "/v1/jobs", "acme").get_json()["items"] == []


def test_refusals_of_submit_have_codes_of_their_own(trading: World) -> None:
    cases = {
        "job.workdir_missing": spec(workdir_digest="0" * 64),
        "job.deadline_past": spec(market=spec()["market"] | {"deadline_ms": 1}),
        "job.never_possible": spec(
            resources={"accelerators": [{"gpu_type": "H100", "count_min": 4000, "count_max": 4000}]}
        ),
        "ledger.insufficient": spec(market=spec()["market"] | {"budget_micros": 10**14}),
    }
    for code, document in cases.items():
        answer = trading.post("/v1/jobs", "acme", document, key=code)
        assert (answer.status_code, code_of(answer)) == (422, code), answer.text


def test_pages_show_every_job_once_though_new_ones_come(trading: World) -> None:
    made = [_submit(trading, key=f"k{number}") for number in range(5)]
    trading.clock.advance_s(1)
    seen: list[str] = []
    cursor = ""
    while True:
        page = trading.call("GET", f"/v1/jobs?limit=2{cursor}", "acme").get_json()
        seen += [job["job_id"] for job in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
        _submit(trading, key=f"later{len(seen)}")
    assert sorted(seen) == sorted(made)


def test_a_cursor_is_good_for_its_own_list_and_tenant_only(trading: World) -> None:
    for number in range(2):
        _submit(trading, key=f"k{number}")
        _submit(trading, "rival", key=f"k{number}")
    cursor = trading.call("GET", "/v1/jobs?limit=1", "acme").get_json()["next_cursor"]
    for who, path in (("rival", "/v1/jobs?"), ("acme", "/v1/jobs?state=queued&"), ("acme", "/v1/rounds?")):
        answer = trading.call("GET", f"{path}cursor={cursor}", who)
        assert (answer.status_code, code_of(answer)) == (400, "page.cursor")
    changed = cursor[:-2] + ("AA" if cursor[-2:] != "AA" else "BB")
    assert code_of(trading.call("GET", f"/v1/jobs?cursor={changed}", "acme")) == "page.cursor"


def test_the_list_can_be_narrowed_to_a_state(trading: World) -> None:
    kept, ended = _submit(trading, key="a"), _submit(trading, key="b")
    cancelled = trading.post(f"/v1/jobs/{ended}/cancel", "acme", {}).get_json()
    assert cancelled["state"] == "cancelled"
    for state, job_id in (("queued", kept), ("cancelled", ended)):
        (job,) = trading.call("GET", f"/v1/jobs?state={state}", "acme").get_json()["items"]
        assert job["job_id"] == job_id
    assert code_of(trading.call("GET", "/v1/jobs?state=lost", "acme")) == "request.invalid"
    again = trading.post(f"/v1/jobs/{ended}/cancel", "acme", {})
    assert (again.status_code, code_of(again)) == (409, "request.conflict")


def test_events_tell_a_jobs_story_in_order(trading: World) -> None:
    job_id = _submit(trading)
    trading.post(f"/v1/jobs/{job_id}/cancel", "acme", {})
    first = trading.call("GET", f"/v1/jobs/{job_id}/events?limit=1", "acme").get_json()
    rest = trading.call("GET", f"/v1/jobs/{job_id}/events?cursor={first['next_cursor']}", "acme").get_json()
    story = [event["after"] for event in first["items"] + rest["items"] if event["kind"] == "job"]
    assert story == ["queued", "cancelled"]


def test_the_workdir_comes_back_whole_and_by_range(trading: World) -> None:
    job_id = _submit(trading)
    (row,) = trading.call("GET", f"/v1/jobs/{job_id}/artifacts", "acme").get_json()["items"]
    assert (row["kind"], row["digest"], row["size_bytes"]) == (
        "workdir",
        hashlib.sha256(WORKDIR).hexdigest(),
        len(WORKDIR),
    )
    whole = trading.call("GET", row["path"], "acme")
    assert whole.data == WORKDIR
    assert whole.headers["Content-Disposition"].startswith("attachment")
    assert whole.headers["X-Content-Type-Options"] == "nosniff"
    part = trading.call("GET", row["path"], "acme", headers={"Range": "bytes=10-"})
    assert (part.status_code, part.data) == (206, WORKDIR[10:])
    beyond = trading.call("GET", row["path"], "acme", headers={"Range": "bytes=999999-"})
    assert (beyond.status_code, code_of(beyond)) == (416, "request.range")
    kept = trading.call("GET", row["path"], "acme", headers={"If-None-Match": whole.headers["ETag"]})
    assert kept.status_code == 304
    missing = trading.call("GET", f"/v1/jobs/{job_id}/artifacts/../../etc/passwd", "acme")
    assert missing.status_code == 404


CERTIFICATE = Certificate(
    bound_micros_per_hour=12,
    welfare_micros_per_hour=9,
    gap_micros_per_hour=3,
    lp_objective_micros_per_hour=12.0,
    regret_sum_micros_per_hour=3,
    slack_sum_micros_per_hour=0,
    uplift_micros_per_hour=0,
    turnover_micros_per_hour=0,
    checks={},
)


def _lease(world: World, job_id: str, epoch: int = 1) -> str:
    """Write a placement by hand: streams are tested here, rounds elsewhere."""

    def work(session: Session) -> str:
        session.merge(
            Round(
                round_number=1,
                taken_ms=0,
                committed_ms=0,
                snapshot_digest="",
                clearing_digest="",
                status="optimal",
                solver="s",
                solve_s=0.1,
                prices='{"lyon/H100": 7}',
                certificate=CERTIFICATE.model_dump_json(),
                dropped="[]",
                jobs_considered=1,
                placements_made=1,
            )
        )
        session.flush()
        session.add(
            Placement(
                placement_id=f"placement_{epoch}",
                job_id=job_id,
                epoch=epoch,
                round_number=1,
                state="ended",
                configuration="{}",
                configuration_key="lyon/H100:1",
                award="{}",
                why="best",
                samples_per_s_predicted=1.0,
                value_micros_per_hour=1,
                charge_micros_per_hour=7,
                uplift_micros_per_hour=0,
                term_s=60,
                reserved_micros=0,
                proposed_ms=0,
                proposal_ends_ms=0,
            )
        )
        session.flush()
        lease = Lease(
            lease_id=f"lease_{epoch}",
            placement_id=f"placement_{epoch}",
            job_id=job_id,
            epoch=epoch,
            site_id="lyon",
            pool_id="lyon/H100",
            gpu_type="H100",
            gpus=1,
            price_micros_per_gpu_hour=7,
            state="ended",
        )
        session.add(lease)
        return str(lease.lease_id)

    return world.market.database.write("lease", work)


def test_a_log_is_read_on_from_where_it_was_left(trading: World) -> None:
    job_id = _submit(trading)
    empty = trading.call("GET", f"/v1/jobs/{job_id}/log", "acme").get_json()
    assert (empty["text"], empty["next_offset"], empty["sites"]) == ("", 0, [])
    lease_id = _lease(trading, job_id)
    streams = streams_of(trading.market)
    streams.append(lease_id, "log", 0, "Grüße\n".encode())
    first = trading.call("GET", f"/v1/jobs/{job_id}/log?site=lyon", "acme").get_json()
    assert (first["text"], first["epoch"], first["sites"]) == ("Grüße\n", 1, ["lyon"])
    streams.append(lease_id, "log", first["next_offset"], b"step 2\n")
    more = trading.call("GET", f"/v1/jobs/{job_id}/log?offset={first['next_offset']}", "acme").get_json()
    assert more["text"] == "step 2\n"
    assert trading.call("GET", f"/v1/jobs/{job_id}/log?site=oslo", "acme").get_json()["text"] == ""


def test_measurements_come_once_each_and_only_whole_lines(trading: World) -> None:
    job_id = _submit(trading)
    lease_id = _lease(trading, job_id)
    streams = streams_of(trading.market)
    streams.append(lease_id, "metrics", 0, b'{"step": 1, "loss": 2.5}\nnot json\n{"step": 2, "lo')
    first = trading.call("GET", f"/v1/jobs/{job_id}/metrics", "acme").get_json()
    assert first["items"] == [{"step": 1, "loss": 2.5, "site_id": "lyon", "epoch": 1}]
    held = streams.state(lease_id, "metrics").held_bytes
    streams.append(lease_id, "metrics", held, b'ss": NaN}\n')
    since = first["next_since"]
    second = trading.call("GET", f"/v1/jobs/{job_id}/metrics?since={since}", "acme")
    assert json.loads(second.data)["items"] == [{"step": 2, "loss": None, "site_id": "lyon", "epoch": 1}]
    since = second.get_json()["next_since"]
    assert trading.call("GET", f"/v1/jobs/{job_id}/metrics?since={since}", "acme").get_json()["items"] == []


def test_prices_and_rounds_are_public_and_placements_are_not(trading: World) -> None:
    job_id = _submit(trading)
    _lease(trading, job_id)
    prices = trading.call("GET", "/v1/prices?pool=lyon/H100").get_json()
    assert prices["items"][0]["price_micros_per_gpu_hour"] == 7
    assert prices["history"] == [{"round_number": 1, "committed_ms": 0, "price_micros_per_gpu_hour": 7}]
    assert [row["gap_micros_per_hour"] for row in trading.call("GET", "/v1/rounds").get_json()["items"]] == [3]
    seen = {
        who: [row["job_id"] for row in trading.call("GET", "/v1/rounds/1", who).get_json()["placements"]]
        for who in (None, "acme", "rival", "admin")
    }
    assert seen == {None: [], "acme": [job_id], "rival": [], "admin": [job_id]}


def test_an_output_is_fetched_by_its_name(trading: World) -> None:
    job_id = _submit(trading)
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    trading.market.artifacts.append(digest, content, owner="site-lyon", offset=0, size_bytes=len(content))

    def work(session: Session) -> None:
        session.add(Artifact(digest=digest, size_bytes=7, complete=True, created_ms=0))
        session.flush()
        session.add(
            JobArtifact(
                job_id=job_id,
                kind="output",
                name="out/model.bin",
                digest=digest,
                epoch=1,
                round_number=0,
                samples_done=0,
                created_ms=0,
            )
        )

    trading.market.database.write("output", work)
    answer = trading.call("GET", f"/v1/jobs/{job_id}/artifacts/out/model.bin", "acme")
    assert (answer.status_code, answer.data) == (200, content)
    assert answer.headers["Hansa-Digest"] == digest
    assert trading.call("GET", f"/v1/jobs/{job_id}/artifacts/out/model.bin", "rival").status_code == 404


def test_a_frozen_market_takes_no_job_until_it_is_thawed(trading: World) -> None:
    assert trading.post("/v1/admin/freeze", "admin", {"reason": "drill"}).get_json()["changed"]
    answer = trading.post("/v1/jobs", "acme", spec())
    assert (answer.status_code, code_of(answer)) == (409, "market.frozen")
    assert trading.call("GET", "/v1/account", "acme").get_json()["frozen"]
    assert not trading.post("/v1/admin/freeze", "admin", {}).get_json()["changed"]
    trading.post("/v1/admin/thaw", "admin", {})
    assert trading.post("/v1/jobs", "acme", spec()).status_code == 201


def test_a_retry_of_a_submit_is_answered_though_the_market_was_frozen_since(trading: World) -> None:
    first = trading.post("/v1/jobs", "acme", spec(), key="once")
    assert first.status_code == 201
    trading.post("/v1/admin/freeze", "admin", {"reason": "drill"})
    again = trading.post("/v1/jobs", "acme", spec(), key="once")
    assert (again.status_code, again.get_json()["job_id"]) == (201, first.get_json()["job_id"])
    assert code_of(trading.post("/v1/jobs", "acme", spec(), key="twice")) == "market.frozen"


def test_the_invoice_is_open_while_the_job_is(trading: World) -> None:
    job_id = _submit(trading)
    answer = trading.call("GET", f"/v1/jobs/{job_id}/invoice", "acme")
    assert answer.status_code == 200, answer.text
    assert (answer.get_json()["hold_micros"], answer.get_json()["final"]) == (5_000_000, False)
