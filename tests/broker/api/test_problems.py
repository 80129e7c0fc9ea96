"""One error shape, whatever is sent; every code is in the API's chapter."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from werkzeug.test import TestResponse

import broker
from broker.api.auth import TABLE
from broker.api.problems import PROBLEM_TYPE
from broker.errors import BrokerError
from sites.errors import BundleError
from tests.broker.api.conftest import World, code_of, spec
from tests.broker.api.test_access import IDS, ROWS, _path

ROOT = Path(broker.__file__).parent
SHAPE = {"type", "title", "status", "detail", "code", "errors", "request_id"}
# Word for word what the chapter's table holds.
CHAPTER = (ROOT / "api" / "README.md").read_text()


def assert_problem(answer: TestResponse, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.content_type == PROBLEM_TYPE
    document = json.loads(answer.data)
    assert set(document) == SHAPE
    assert (document["status"], document["code"]) == (status, code)
    assert document["type"] == f"urn:hansa:problem:{code}"
    assert document["detail"]
    assert document["request_id"] == answer.headers["X-Request-Id"]
    assert f"| `{code}` | {status} |" in CHAPTER


@pytest.mark.parametrize(("row", "access"), ROWS, ids=IDS)
def test_every_route_refuses_in_the_one_shape(world: World, row: tuple[str, str], access: object) -> None:
    method, rule = row
    path = _path(rule)
    answers = [world.client.open(path, method="PATCH")]
    if TABLE[row].who.value != "anyone":
        answers.append(world.client.open(path, method=method))
    answers.append(world.client.open(path, method=method, headers={"Authorization": "Basic eDp5"}, data=b"\xff"))
    for answer in answers:
        if answer.status_code >= 400:
            assert_problem(answer, answer.status_code, code_of(answer))
    assert answers[0].status_code == 405


def test_what_is_not_there_and_what_is_not_allowed(world: World) -> None:
    assert_problem(world.call("GET", "/v1/nothing"), 404, "request.route")
    answer = world.call("DELETE", "/v1/jobs")
    assert_problem(answer, 405, "request.method")
    assert set(answer.headers["Allow"].split(", ")) >= {"GET", "POST"}
    assert_problem(world.call("GET", "/v1/jobs?limit=0", "acme"), 422, "request.invalid")
    assert_problem(world.call("GET", "/v1/jobs?limit=201", "acme"), 422, "request.invalid")
    assert_problem(world.call("GET", "/v1/jobs?cursor=AAAA", "acme"), 400, "page.cursor")
    assert_problem(world.call("GET", "/v1/rounds/99999999999999999999999", "acme"), 422, "request.invalid")
    assert_problem(world.call("GET", "/v1/jobs/job_%00", "acme"), 422, "request.invalid")


HOSTILE = {
    "cut": (b'{"name": ', 400, "request.malformed"),
    "empty": (b"", 400, "request.malformed"),
    "not utf-8": (b'{"name": "\xff"}', 400, "request.malformed"),
    "NaN": (b'{"name": NaN}', 400, "request.malformed"),
    "Infinity": (b'{"name": -Infinity}', 400, "request.malformed"),
    "1e400": (b'{"name": 1e400}', 400, "request.malformed"),
    "NUL": (b'{"name": "a\\u0000b"}', 400, "request.malformed"),
    "NUL in a key": (b'{"a\\u0000b": 1}', 400, "request.malformed"),
    "lone surrogate": (b'{"name": "\\ud800"}', 400, "request.malformed"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, 400, "request.malformed"),
    "deep in an object": (b'{"a":' * 50 + b"1" + b"}" * 50, 400, "request.malformed"),
    "list": (b"[]", 422, "request.invalid"),
    "text of JSON": (b'"{}"', 422, "request.invalid"),
    "null": (b"null", 422, "request.invalid"),
    "huge integer": (b'{"name": ' + b"9" * 4000 + b"}", 422, "request.invalid"),
    "unknown field": (b'{"nmae": "x"}', 422, "request.invalid"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bodies_are_refused_by_name(world: World, case: str) -> None:
    body, status, code = HOSTILE[case]
    for path in ("/v1/quote", "/v1/jobs"):
        headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
        assert_problem(world.call("POST", path, "acme", data=body, headers=headers), status, code)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_json_must_be_said_to_be_json(world: World, kind: str) -> None:
    answer = world.call("POST", "/v1/quote", "acme", data=b"{}", headers={"Content-Type": kind})
    assert_problem(answer, 415, "request.media_type")


def test_each_fault_of_a_spec_has_its_pointer_and_not_its_value(world: World) -> None:
    document = spec(name="-bad-", envs={"HANSA_KEY": "s3cr3t-value"})
    document["market"] |= {"budget_micros": 0, "sync": {"patience_s": 1e308}}
    answer = world.post("/v1/jobs", "acme", document)
    assert_problem(answer, 422, "request.invalid")
    pointers = {fault["pointer"] for fault in json.loads(answer.data)["errors"]}
    assert pointers == {"/name", "/envs", "/market/budget_micros", "/market/sync/patience_s"}
    assert "s3cr3t-value" not in answer.text


def test_a_fault_of_our_own_says_nothing_but_its_request_id(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        secret = "hansa_tenant_" + "a" * 16 + "_" + "b" * 64
        raise RuntimeError(f"internals: {secret} at /srv/market.sqlite3")

    monkeypatch.setattr("broker.api.job_routes.job_detail", broken)
    monkeypatch.setattr("broker.api.job_routes.job_row", lambda *_: None)
    with structlog.testing.capture_logs() as lines:
        answer = world.call("GET", "/v1/jobs/job_a", "acme", headers={"X-Request-Id": "from-the-caller"})
    assert_problem(answer, 500, "broker.failed")
    assert "internals" not in answer.text
    assert "sqlite" not in answer.text
    assert "from-the-caller" in answer.text
    (line,) = (line for line in lines if line["event"] == "request.fault")
    assert "internals: [cut out] at" in line["trace"]
    assert "bbbbbbbb" not in repr(lines)
    assert world.tokens["acme"].split("_")[3] not in repr(lines)


def test_a_made_up_request_id_is_replaced(world: World) -> None:
    answer = world.call("GET", "/healthz", headers={"X-Request-Id": "short"})
    assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["X-Request-Id"])


def _kinds() -> Iterator[type[Exception]]:
    """Every error of the broker that can travel over HTTP, and those of bundles, which the API passes on."""
    for module in pkgutil.walk_packages(broker.__path__, "broker."):
        if not module.name.startswith(("broker.cli", "broker.demo", "broker.tasks", "broker.database.migrations")):
            importlib.import_module(module.name)
    waiting: list[type[Exception]] = [BrokerError, BundleError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith(("broker.", "sites.")):
            yield kind


def test_every_code_of_the_broker_is_in_the_chapter_with_its_status() -> None:
    rows = {(str(vars(kind)["code"]), getattr(kind, "status", 422)) for kind in _kinds() if "code" in vars(kind)}
    missing = {row for row in rows if f"| `{row[0]}` | {row[1]} |" not in CHAPTER}
    assert missing == set()
    listed = set(re.findall(r"^\| `([a-z_.]+)` \| \d+ \|", CHAPTER, re.MULTILINE))
    assert listed == {code for code, _ in rows}


def test_refusals_are_documented_as_they_are_sent(world: World) -> None:
    document = world.client.get("/openapi/openapi.json").get_json()
    answers = document["paths"]["/v1/jobs/{job_id}"]["get"]["responses"]
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    assert [answers[status]["content"] for status in ("404", "422", "429", "503")] == [problem] * 4
    sent = world.call("GET", "/v1/jobs/job_nothing", "acme")
    assert (sent.status_code, sent.content_type) == (404, "application/problem+json")
