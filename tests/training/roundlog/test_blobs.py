"""The grid of a blob's chunks, as both ends work it out by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.roundlog.blobs import CHUNK_BYTES, BlobStore, chunk_bytes
from training.roundlog.errors import Refusal

MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "chunk"), [(1, MIB // 4), (16 * MIB, MIB // 4), (16 * MIB + 1, MIB // 2), (33 * MIB, MIB), (1 << 36, MIB)]
)
def test_a_blob_has_some_64_chunks_of_a_quarter_to_a_whole_mib(size: int, chunk: int) -> None:
    assert chunk_bytes(size) == chunk <= CHUNK_BYTES


def test_chunks_of_a_small_blob_are_taken_on_its_own_grid_alone(tmp_path: Path) -> None:
    store, size, digest = BlobStore(tmp_path / "blobs"), 600_000, "0" * 64
    store.begin(digest, size)
    assert store.missing(digest) == (0, 1, 2)
    spans = [store.chunk_span(digest, chunk) for chunk in store.missing(digest)]
    assert spans == [(0, 262_144), (262_144, 524_288), (524_288, 600_000)]
    store.write(digest, 262_144, bytes(262_144))
    assert store.missing(digest) == (0, 2)
    with pytest.raises(Refusal, match="no chunk"):
        store.write(digest, 0, bytes(600_000))
    with pytest.raises(Refusal, match="no chunk"):
        store.write(digest, 100, bytes(262_144))
    store.drop(digest)
