"""Datasets at a site: brought from a real server, cut lines resumed, verified, kept up to a cap, refused with a code."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sites import data_source
from sites.data_source import source_allowed
from sites.data_store import DataStore
from sites.dataset import MANIFEST_FILE, make_manifest, read_manifest
from sites.errors import (
    DataAlteredError,
    DataCacheFullError,
    DataDigestError,
    DataError,
    DataManifestError,
    DataMissingError,
    DataPathError,
    DataSourceError,
    DataTooLargeError,
    DataUnreachableError,
    StagingStoppedError,
)
from sites.protocol import ExitCause
from sites.settings import DataSettings
from tests.sites.conftest import StartAgent, job
from tests.sites.market import Grant, Market
from tests.sites.waiting import wait_until
from training.clock import SystemClock
from training.spec import DataReference

BIG = bytes(range(256)) * 20_000  # 5 MB


class Web:
    """A server of one folder that knows ranges, can cut a line, and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        self.cut_after: int | None = None
        self.knows_ranges = True
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/corpus"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range", "")
        self.asked.append((request.path, asked))
        path = self.folder / request.path.removeprefix("/corpus/")
        if request.path.startswith("/moved/"):
            request.send_response(302)
            request.send_header("Location", self.url)
            request.end_headers()
            return
        if not path.is_file():
            request.send_error(404)
            return
        content = path.read_bytes()
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.knows_ranges else 0
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        if self.cut_after is not None and len(content) > self.cut_after:
            content, self.cut_after = content[: start + self.cut_after], None
            request.close_connection = True
        request.wfile.write(content[start:])


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_source, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return dataset(tmp_path / "corpus", {"big.bin": BIG, "notes/a.txt": b"alpha"})


@pytest.fixture
def web(corpus: Path) -> Iterator[Web]:
    web = Web(corpus)
    yield web
    web.server.shutdown()
    web.server.server_close()


def dataset(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / MANIFEST_FILE).write_bytes(make_manifest(folder))
    return folder


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()


def reference(folder: Path, source: str | None, **changes: Any) -> DataReference:
    return DataReference(
        **{"name": "corpus", "sha256": digest_of(folder), "size_gb": 0.01, "source": source, **changes}
    )


def store(tmp_path: Path, cache_gb: float = 1.0, datasets: tuple[Path, ...] = ()) -> DataStore:
    settings = DataSettings(cache_gb=cache_gb, datasets=datasets)
    return DataStore(tmp_path / "site" / "data", settings, SystemClock())


def never() -> bool:
    return False


def test_a_dataset_is_brought_over_a_cut_line_and_verified(tmp_path: Path, web: Web, corpus: Path) -> None:
    here, wanted = store(tmp_path), reference(corpus, web.url)
    web.cut_after = 3_000_000
    here.stage(wanted, [web.url], never)
    assert (here.folder_of(wanted) / "big.bin").read_bytes() == BIG
    assert (here.folder_of(wanted) / "notes/a.txt").read_bytes() == b"alpha"
    assert [asked for path, asked in web.asked if path == "/corpus/big.bin"] == ["", "bytes=3000000-"]
    assert (here.folder_of(wanted) / "big.bin").stat().st_mode & 0o777 == 0o444
    told = here.announced([web.url])
    assert told is not None
    assert told.held == {wanted.sha256: len(BIG) + 5}
    # From then on it is here: nothing is asked of the source, by this agent or another.
    asked = len(web.asked)
    here.stage(wanted, [], never)
    store(tmp_path).stage(wanted, [], never)
    assert len(web.asked) == asked


def test_a_staging_that_was_stopped_goes_on_under_another_agent(tmp_path: Path, web: Web, corpus: Path) -> None:
    wanted, looks = reference(corpus, web.url), iter(range(100))
    with pytest.raises(StagingStoppedError):
        store(tmp_path).stage(wanted, [web.url], lambda: next(looks) > 5)
    store(tmp_path).stage(wanted, [web.url], never)
    (resumed,) = [asked for path, asked in web.asked if path == "/corpus/big.bin" and asked]
    assert int(resumed.removeprefix("bytes=").rstrip("-")) > 0


def test_a_source_without_ranges_is_read_from_the_start(tmp_path: Path, web: Web, corpus: Path) -> None:
    web.knows_ranges, web.cut_after = False, 3_000_000
    here, wanted = store(tmp_path), reference(corpus, web.url)
    here.stage(wanted, [web.url], never)
    assert (here.folder_of(wanted) / "big.bin").read_bytes() == BIG


def test_a_folder_of_the_host_is_a_source_where_the_owner_allows_it(tmp_path: Path, corpus: Path) -> None:
    here, wanted = store(tmp_path), reference(corpus, f"file://{corpus}")
    here.stage(wanted, [f"file://{tmp_path}"], never)
    assert (here.folder_of(wanted) / "big.bin").read_bytes() == BIG
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "link").symlink_to(corpus)
    linked = reference(dataset(tmp_path / "other", {"x": b"x"}), f"file://{tmp_path}/open/link")
    with pytest.raises(DataSourceError):
        here.stage(linked, [f"file://{tmp_path}/open"], never)


Spoil = Callable[[Path], None]


@pytest.mark.parametrize(
    ("spoil", "changes", "kind"),
    [
        (lambda folder: (folder / "big.bin").write_bytes(BIG[:-1] + b"x"), {}, DataDigestError),
        (lambda folder: (folder / "big.bin").write_bytes(BIG + b"x"), {}, DataDigestError),
        (lambda folder: (folder / "big.bin").write_bytes(BIG[:-1]), {}, DataUnreachableError),
        (lambda folder: (folder / "notes/a.txt").unlink(), {}, DataUnreachableError),
        (lambda _: None, {"sha256": "0" * 64}, DataDigestError),
        (lambda _: None, {"size_gb": 0.001}, DataTooLargeError),
        (lambda _: None, {"source": None}, DataMissingError),
    ],
    ids=["other bytes", "longer", "shorter", "missing file", "other manifest", "too large", "no source"],
)
def test_what_is_not_the_dataset_is_refused_with_a_code_and_never_shown(
    tmp_path: Path, web: Web, spoil: Spoil, changes: dict[str, Any], kind: type[DataError]
) -> None:
    corpus = web.folder
    wanted = reference(corpus, **{"source": web.url, **changes})
    spoil(corpus)
    here = store(tmp_path)
    with pytest.raises(kind) as refused:
        here.stage(wanted, [web.url], never)
    assert refused.value.code.startswith("data.")
    assert not here.folder_of(wanted).exists()
    told = here.announced([])
    assert told is not None
    assert told.held == {}


@pytest.mark.parametrize(
    "paths",
    [
        ["../escape"],
        ["/etc/passwd"],
        ["a/../../b"],
        ["a//b"],
        ["a", "a"],
        ["a", "a/b"],
        ["a\\b"],
        ["nul\0"],
        [MANIFEST_FILE],
    ],
)
def test_paths_that_no_dataset_may_hold_are_refused(paths: list[str]) -> None:
    files = [{"path": path, "size_bytes": 1, "sha256": "0" * 64} for path in paths]
    content = json.dumps({"files": files}).encode()
    with pytest.raises(DataPathError):
        read_manifest(content, hashlib.sha256(content).hexdigest())


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    for content in (b"{}", b"[]", b"\xff", b'{"files": [], "more": 1}'):
        with pytest.raises(DataManifestError):
            read_manifest(content, hashlib.sha256(content).hexdigest())
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "out").symlink_to("/etc/passwd")
    with pytest.raises(DataPathError):
        make_manifest(tmp_path / "linked")


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("https://a.org/open/x", True),
        ("https://a.org/open", True),
        ("https://a.org/opened", False),
        ("https://a.org/open/../secret", False),
        ("https://a.org/open/%2e%2e/secret", False),
        ("https://a.org/open/%252e%252e/secret", False),
        ("https://a.org.evil.net/open/x", False),
        ("https://user@a.org/open/x", False),
        ("https://a.org/open/x?y", False),
        ("http://a.org/open/x", False),
        ("http://169.254.169.254/latest", False),
        ("file:///etc", False),
    ],
)
def test_only_what_lies_below_the_owners_addresses_is_a_source(source: str, *, allowed: bool) -> None:
    assert source_allowed(source, ["https://a.org/open/"]) is allowed


def test_no_redirect_is_followed_and_no_other_address_dialled(tmp_path: Path, web: Web, corpus: Path) -> None:
    moved = web.url.replace("/corpus", "/moved")
    with pytest.raises(DataUnreachableError):
        store(tmp_path).stage(reference(corpus, moved), [moved], never)
    asked = len(web.asked)
    with pytest.raises(DataSourceError):
        store(tmp_path).stage(reference(corpus, web.url), ["https://a.org/"], never)
    assert len(web.asked) == asked


def test_what_was_not_used_for_longest_goes_first_and_nothing_in_use(tmp_path: Path) -> None:
    here = store(tmp_path, cache_gb=0.0025)
    sets = [dataset(tmp_path / f"set-{number}", {"data": bytes([number]) * 1_000_000}) for number in range(4)]
    wanted = [reference(each, f"file://{each}") for each in sets]
    allowed = [f"file://{tmp_path}"]
    for number, each in enumerate(wanted[:2]):
        here.stage(each, allowed, never)
        os.utime(here.folder_of(each), (number, number))
    here.stage(wanted[0], allowed, never)  # used again: the other one is older now
    here.stage(wanted[2], allowed, never)
    held = here.announced([])
    assert held is not None
    assert set(held.held) == {wanted[0].sha256, wanted[2].sha256}
    here.use("attempt", wanted[:1])
    here.use("other attempt", wanted[2:3])
    with pytest.raises(DataCacheFullError):
        here.stage(wanted[3], allowed, never)
    here.release("other attempt")
    here.stage(wanted[3], allowed, never)
    assert here.folder_of(wanted[0]).exists()
    with pytest.raises(DataCacheFullError):
        store(tmp_path / "small", cache_gb=0.0005).stage(wanted[0], allowed, never)


def test_kept_data_that_was_altered_is_brought_anew_and_the_operators_own_refused(tmp_path: Path, corpus: Path) -> None:
    here, wanted = store(tmp_path), reference(corpus, f"file://{corpus}")
    here.stage(wanted, [f"file://{corpus}"], never)
    kept = here.folder_of(wanted) / "notes/a.txt"
    kept.chmod(0o644)
    kept.write_bytes(b"ALPHA")
    here.stage(wanted, [f"file://{corpus}"], never)
    assert kept.read_bytes() == b"alpha"
    own = store(tmp_path / "own", cache_gb=0, datasets=(corpus,))
    own.stage(reference(corpus, None), [], never)
    assert own.folder_of(wanted) == corpus
    (corpus / "notes/a.txt").write_bytes(b"ALPHA")
    with pytest.raises(DataAlteredError):
        own.stage(reference(corpus, None), [], never)
    assert store(tmp_path / "broken", cache_gb=0, datasets=(tmp_path / "none",)).announced([]).held == {}  # type: ignore[union-attr]  # it takes part


READS = """
import errno, hashlib, json, os, pathlib
data = pathlib.Path(os.environ["HANSA_DATA"], "corpus")
def refused(act):
    try: act()
    except OSError as error: return errno.errorcode[error.errno]
seen = {"big": hashlib.sha256((data / "big.bin").read_bytes()).hexdigest(), "note": (data / "notes/a.txt").read_text(),
        "refused": [refused(lambda: (data / "big.bin").write_bytes(b"x")), refused(lambda: (data / "new").touch()),
                    refused((data / "notes/a.txt").unlink), refused(lambda: (data / "notes/a.txt").chmod(0o666))]}
print("seen", json.dumps(seen), flush=True)
"""


@pytest.mark.parametrize("data_yaml", ["{cache_gb: 1}"])
@pytest.mark.parametrize("sandbox", ["bubblewrap"])
def test_a_rank_reads_its_dataset_below_hansa_data_and_cannot_change_it(
    market: Market, start_agent: StartAgent, tmp_path: Path, corpus: Path
) -> None:
    spec = job(market, tmp_path / "work", READS, data=[reference(corpus, f"file://{corpus}").model_dump()])
    market.grants["lease_a"] = Grant("lease_a", "job_a", spec, gpu_ids=("0",))
    agent = start_agent()
    wait_until(lambda: agent.tick() and "lease_a" in market.reports and market.reports["lease_a"].cause, limit_s=60)
    log = market.streams.get(("lease_a", "log"), b"").decode()
    (said,) = [line for line in log.splitlines() if "seen {" in line] or [log]
    seen = json.loads(said[said.index("{") :])
    assert (seen["big"], seen["note"]) == (hashlib.sha256(BIG).hexdigest(), "alpha")
    assert seen["refused"] == ["EROFS"] * 4
    # The heartbeat says from then on that the site holds it.
    told = market.heartbeats[-1].data
    assert told is not None
    assert told.held == {digest_of(corpus): len(BIG) + 5}


@pytest.mark.parametrize("data_yaml", ["{cache_gb: 1}"])
def test_a_source_that_lies_ends_the_attempt_as_the_tenants_affair(
    market: Market, start_agent: StartAgent, tmp_path: Path, corpus: Path
) -> None:
    spec = job(market, tmp_path / "work", "", data=[reference(corpus, f"file://{corpus}").model_dump()])
    (corpus / "big.bin").write_bytes(BIG[:-1] + b"x")
    market.grants["lease_a"] = Grant("lease_a", "job_a", spec)
    agent = start_agent()
    wait_until(lambda: agent.tick() and "lease_a" in market.reports and market.reports["lease_a"].cause)
    report = market.reports["lease_a"]
    assert report.cause is ExitCause.INPUT
    assert report.detail.startswith("data.digest: big.bin at the source")


@pytest.mark.parametrize("data_yaml", ["{}", "{cache_gb: 0.001}"])
def test_a_proposal_whose_data_cannot_come_is_vetoed_before_it_is_paid(
    market: Market, start_agent: StartAgent, tmp_path: Path, corpus: Path
) -> None:
    wanted = reference(corpus, "https://elsewhere.org/corpus")
    for lease_id, each in {
        "lease_refused": wanted,
        "lease_large": wanted.model_copy(update={"size_gb": 5.0, "source": "http://127.0.0.1/x"}),
        "lease_stays": wanted.model_copy(update={"egress_ok": False}),
    }.items():
        spec = job(market, tmp_path / "work", "", data=[each.model_dump()])
        market.grants[lease_id] = Grant(lease_id, f"job_{lease_id}", spec, gpu_ids=("0",))
    agent = start_agent()
    wait_until(lambda: agent.tick() and len(market.vetoes) == 3)
    codes = {lease_id: veto.code for lease_id, veto in market.vetoes.items()}
    takes_part = market.heartbeats[-1].data is not None
    assert codes == {
        "lease_refused": "policy.data_source",
        "lease_large": "data.too_large" if takes_part else "data.missing",
        "lease_stays": "policy.data_source",
    }
    market.grants.clear()
