"""The artifact store and the streams: resumable, capped, and never another's bytes under a name."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.artifacts import (
    ArtifactDigestError,
    ArtifactMissingError,
    ArtifactOffsetError,
    ArtifactStore,
    ArtifactTooLargeError,
)
from broker.streams import StreamStore

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def _upload(store: ArtifactStore, content: bytes, owner: str = "tenant_a", piece: int = 1000) -> None:
    digest = hashlib.sha256(content).hexdigest()
    for offset in range(0, max(1, len(content)), piece):
        store.append(digest, content[offset : offset + piece], owner=owner, offset=offset, size_bytes=len(content))


def test_pieces_become_the_named_file_and_pieces_sent_twice_change_nothing(store: ArtifactStore) -> None:
    for _ in range(2):
        for offset in range(0, 5000, 1000):
            chunk = CONTENT[offset : offset + 1000]
            progress = store.append(DIGEST, chunk, owner="a", offset=offset, size_bytes=len(CONTENT))
        assert not progress.complete
    assert store.progress(DIGEST, "a").held_bytes == 5000
    assert store.append(DIGEST, CONTENT[4500:], owner="a", offset=4500, size_bytes=len(CONTENT)).complete
    with store.open(DIGEST) as stream:
        assert stream.read() == CONTENT


def test_an_empty_artifact_is_whole_at_once(store: ArtifactStore) -> None:
    _upload(store, b"")
    assert store.size_bytes(hashlib.sha256(b"").hexdigest()) == 0


def test_a_gap_is_refused_with_what_is_held(store: ArtifactStore) -> None:
    store.append(DIGEST, CONTENT[:10], owner="a", offset=0, size_bytes=len(CONTENT))
    with pytest.raises(ArtifactOffsetError) as refused:
        store.append(DIGEST, CONTENT[20:30], owner="a", offset=20, size_bytes=len(CONTENT))
    assert refused.value.held_bytes == 10


def test_bytes_of_another_digest_never_get_the_name(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactDigestError):
        store.append(DIGEST, CONTENT[:-1] + b"x", owner="a", offset=0, size_bytes=len(CONTENT))
    with pytest.raises(ArtifactMissingError):
        store.open(DIGEST)
    assert store.progress(DIGEST, "a").held_bytes == 0


def test_one_owners_garbage_does_not_spoil_anothers_upload(store: ArtifactStore) -> None:
    store.append(DIGEST, b"garbage", owner="mallory", offset=0, size_bytes=len(CONTENT))
    _upload(store, CONTENT, owner="alice")
    assert store.progress(DIGEST, "mallory").complete


def test_more_than_announced_is_refused(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactTooLargeError):
        store.append(DIGEST, CONTENT, owner="a", offset=0, size_bytes=len(CONTENT) - 1)


def test_many_uploaders_of_one_owner_end_with_one_whole_file(store: ArtifactStore) -> None:
    faults: list[Exception] = []

    def upload() -> None:
        try:
            _upload(store, CONTENT, piece=97)
        except Exception as fault:  # noqa: BLE001  a thread's fault must reach the test, whatever it is
            faults.append(fault)

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    with store.open(DIGEST) as stream:
        assert stream.read() == CONTENT


def test_documents_come_back_by_the_digest_of_what_they_unpack_to(store: ArtifactStore, tmp_path: Path) -> None:
    digest = store.put_bytes(CONTENT)
    assert digest == DIGEST == store.put_bytes(CONTENT)
    assert store.get_bytes(digest) == CONTENT
    (kept,) = (tmp_path / "artifacts" / "documents").rglob("*.z")
    assert kept.stat().st_size < len(CONTENT) / 5
    store.discard_document(digest)
    with pytest.raises(ArtifactMissingError):
        store.get_bytes(digest)


def test_idle_uploads_are_swept_and_fresh_ones_kept(store: ArtifactStore, tmp_path: Path) -> None:
    for owner in ("old", "new"):
        store.append(DIGEST, b"half", owner=owner, offset=0, size_bytes=99)
    os.utime(tmp_path / "artifacts" / "partial" / f"old.{DIGEST}", (1000, 1000))
    now_ms = round((tmp_path / "artifacts" / "partial" / f"new.{DIGEST}").stat().st_mtime * 1000)
    assert store.sweep_partials(now_ms, 60_000) == 1
    assert store.progress(DIGEST, "new").held_bytes == 4


@given(cuts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=30))
def test_a_stream_holds_a_prefix_of_what_was_sent_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int]]
) -> None:
    streams = StreamStore(tmp_path_factory.mktemp("streams"), bytes_max=50)
    sent = bytes(range(100))
    for offset, length in cuts:
        state = streams.append("lease_1", "log", offset, sent[offset : offset + length])
        assert state.held_bytes <= 50
        assert state.full == (state.held_bytes == 50)
    held = streams.read("lease_1", "log", 0)
    assert held == sent[: len(held)]
    assert streams.state("lease_1", "log").held_bytes == len(held)


def test_a_stream_is_read_on_from_an_offset(tmp_path: Path) -> None:
    streams = StreamStore(tmp_path, bytes_max=1000)
    streams.append("lease_1", "metrics", 0, b"one\ntwo\n")
    assert streams.read("lease_1", "metrics", 4) == b"two\n"
    assert streams.read("lease_1", "metrics", 99) == b""
    assert streams.read("lease_2", "metrics", 0) == b""
