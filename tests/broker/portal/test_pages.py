"""What the pages are made of: bounded queries, bounded sizes, vendored files as they were published."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from broker.portal.workdirs import keep_example
from broker.queries.jobs import count_jobs
from tests.broker.portal.conftest import Client
from tests.broker.portal.scene import HOSTILE, Scene, spec_of, submit

pytestmark = pytest.mark.xdist_group("portal")

VENDOR = Path(__file__).parents[3] / "broker" / "portal" / "static" / "vendor"
PAGE_BYTES_MAX = 200_000
PAGES = {
    "ada": ("/jobs", "/jobs/new", "/jobs/new?by=file", "/market", "/jobs/{spanning}", "/jobs/{spanning}/live"),
    "root": ("/admin/sites", "/admin/sites/bremen", "/admin/rounds", "/admin/rounds/1", "/admin/tenants"),
}


def count_bobs_jobs(session: Session) -> dict[str, int]:
    return count_jobs(session, "bob")


@contextmanager
def _counted(engine: Engine) -> Iterator[list[str]]:
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_a_list_takes_as_many_queries_for_forty_jobs_as_for_a_few(client_of: dict[str, Client], scene: Scene) -> None:
    client = client_of["bob"].client
    with _counted(scene.market.database.engine) as few:
        before = client.get("/jobs").text.count('data-label="Job"')
    workdir = keep_example(scene.market, "bob").digest
    assert before < 10
    for number in range(40 - before):
        submit(scene, "bob", spec_of(f"job-{number}", workdir, gpus=1, sites_max=1, budget_micros=1_000))
    with _counted(scene.market.database.engine) as many:
        assert client.get("/jobs").text.count('data-label="Job"') == 40
    assert len(many) == len(few)


def test_a_long_list_has_pages_that_neither_repeat_nor_skip(client_of: dict[str, Client], scene: Scene) -> None:
    workdir = keep_example(scene.market, "bob").digest
    for number in range(55):
        submit(scene, "bob", spec_of(f"more-{number}", workdir, gpus=1, sites_max=1, budget_micros=1_000))
    client = client_of["bob"].client
    names: list[str] = []
    path: str | None = "/jobs"
    while path:
        text = client.get(path).text
        names += re.findall(r'href="/jobs/(job_\w+)"', text)
        following = re.search(r'rel="next" href="([^"]+)"', text)
        path = following[1].replace("&amp;", "&") if following else None
    assert len(names) == len(set(names)) == sum(scene.market.database.read(count_bobs_jobs).values()) > 50
    assert client.get("/jobs?after=made-up").status_code == 400


def test_no_page_is_large_or_slow_to_read_for_its_queries(client_of: dict[str, Client], scene: Scene) -> None:
    for who, paths in PAGES.items():
        for path in paths:
            with _counted(scene.market.database.engine) as statements:
                answer = client_of[who].client.get(path.format(**scene.jobs))
            assert answer.status_code == 200
            assert len(answer.data) < PAGE_BYTES_MAX
            assert len(statements) <= 20, f"{path}: {len(statements)} statements"


def test_hostile_text_is_markup_nowhere(client_of: dict[str, Client], scene: Scene) -> None:
    texts = [
        client_of[who].client.get(path.format(**scene.jobs)).text for who, paths in PAGES.items() for path in paths
    ]
    assert any("window.hacked" in text for text in texts), "the scene has hostile text to show"
    assert not any(HOSTILE in text for text in texts)
    tried = client_of["root"]
    form = {"site_id": HOSTILE, "form_token": tried.form_token}
    answer = tried.client.post("/admin/sites/invite", data=form)
    assert answer.status_code == 422
    assert "<script>window" not in answer.text
    assert "<script>window" not in tried.client.get(f"/jobs/{HOSTILE}").text


def test_vendored_files_are_as_published() -> None:
    rows = re.findall(r"^\| (\S+) \| .* \| ([0-9a-f]{64}) \|$", (VENDOR / "VERSION.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in VENDOR.glob("*.min.*")}
    for name, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
    assert {path.name for path in VENDOR.glob("*-LICENSE.txt")} == {"htmx-LICENSE.txt", "uplot-LICENSE.txt"}


def test_static_files_are_kept_by_browsers_under_the_name_of_their_content(client_of: dict[str, Client]) -> None:
    text = client_of["ada"].client.get("/jobs").text
    addresses = re.findall(r'(?:src|href)="(/static/[^"]+)"', text)
    assert len(addresses) >= 6
    for address in addresses:
        answer = client_of["ada"].client.get(address)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["Cache-Control"]


def test_a_rounds_page_shows_its_statement_and_what_sharing_was_worth(client_of: dict[str, Client]) -> None:
    text = client_of["root"].client.get("/admin/rounds/1").text
    for words in (
        "balance</dt><dd>even",
        "What sharing was worth",
        "core slack",
        "bremen",
        "hansa market certificate 1",
    ):
        assert words in text
