"""Immutable blobs on disk by digest, and the ones that are still arriving in chunks.

A blob arrives in chunks of `chunk_bytes` at offsets of its grid, in any order and over any number
of connections; it counts as held only after its digest was verified. Chunks of an unfinished
blob are forgotten when the gateway restarts: the sender asks what is missing and resumes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from training.roundlog.errors import Reason, Refusal

CHUNK_BYTES: Final = 1 << 20
"""The largest chunk; one of a small blob is smaller, down to a quarter of it."""
_CHUNKS_WANTED: Final = 64
_CHUNK_BYTES_MIN: Final = 1 << 18
# One contribution of each member for this round and the next, and a snapshot.
ARRIVING_MAX: Final = 32
_HASH_READ_BYTES: Final = 1 << 22


def chunk_bytes(size_bytes: int) -> int:
    """Return the chunk of a blob of this size: both ends know it, so nobody needs to say it.

    Some 64 chunks let the connections that a lossy link slows down leave their share to the others; a chunk costs
    a round trip, so none is smaller than 256 KiB.
    """
    chunk = _CHUNK_BYTES_MIN
    while chunk < CHUNK_BYTES and chunk * _CHUNKS_WANTED < size_bytes:
        chunk *= 2
    return chunk


@dataclass(slots=True)
class Arrival:
    """A blob on its way: its announced size, and the chunks that are still missing."""

    size_bytes: int
    descriptor: int
    missing: set[int]
    finishing: asyncio.Lock = field(default_factory=asyncio.Lock)


class BlobStore:
    """The blobs of one gateway, in one folder. Digests name files; nothing from outside does."""

    def __init__(self, folder: Path) -> None:
        """Open the folder and forget what had not arrived in full."""
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._arrivals: dict[str, Arrival] = {}
        for leftover in self._folder.glob("*.part"):
            leftover.unlink()
        self._held = {path.name: path.stat().st_size for path in self._folder.iterdir()}

    def held(self, digest: str) -> bool:
        """Say whether the whole blob is here."""
        return digest in self._held

    def digests(self) -> tuple[str, ...]:
        """Return the digests of all blobs that are here."""
        return tuple(sorted(self._held))

    def size_bytes(self, digest: str) -> int:
        """Return the size of a blob that is held."""
        return self._held[digest]

    def path(self, digest: str) -> Path:
        """Return where a blob that is held lies."""
        return self._folder / digest

    def read(self, digest: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop` of a blob that is held."""
        with self.path(digest).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def take(self, path: Path, digest: str) -> None:
        """Move a file whose digest the caller computed into the store."""
        size = path.stat().st_size
        path.replace(self.path(digest))
        self._held[digest] = size

    def drop(self, digest: str) -> None:
        """Forget a blob, whether it is held or on its way."""
        self._abandon(digest)
        if self._held.pop(digest, None) is not None:
            self.path(digest).unlink(missing_ok=True)

    def keep_only(self, digests: set[str], arriving: set[str]) -> None:
        """Drop every held blob outside `digests`, and every arriving one outside both."""
        for digest in [*self._held]:
            if digest not in digests:
                self.drop(digest)
        for digest in [*self._arrivals]:
            if digest not in digests and digest not in arriving:
                self._abandon(digest)

    def begin(self, digest: str, size_bytes: int) -> None:
        """Expect a blob. Raises Refusal where too many are on their way or the size changed."""
        if self.held(digest):
            return
        arrival = self._arrivals.get(digest)
        if arrival is not None:
            if arrival.size_bytes != size_bytes:
                message = f"blob {digest[:12]}… was announced with {arrival.size_bytes} bytes, now with {size_bytes}"
                raise Refusal(Reason.CHANGED, message)
            return
        if len(self._arrivals) >= ARRIVING_MAX:
            raise Refusal(Reason.BUSY, f"{ARRIVING_MAX} blobs are arriving already; try again")
        if size_bytes == 0:
            self._begin_empty(digest)
            return
        descriptor = os.open(self._part(digest), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._arrivals[digest] = Arrival(size_bytes, descriptor, set(range(-(-size_bytes // chunk_bytes(size_bytes)))))

    def missing(self, digest: str) -> tuple[int, ...]:
        """Return the chunks that a blob still lacks, none where it is held. Raises Refusal if unexpected."""
        if self.held(digest):
            return ()
        return tuple(sorted(self._arriving(digest).missing))

    def chunk_span(self, digest: str, chunk: int) -> tuple[int, int]:
        """Return where a chunk of an arriving blob starts and stops, in bytes."""
        size = self._arriving(digest).size_bytes
        length = chunk_bytes(size)
        return chunk * length, min((chunk + 1) * length, size)

    def check_span(self, digest: str, offset: int, length: int) -> None:
        """Check that `length` bytes at `offset` are one chunk of an arriving blob. Raises Refusal."""
        size = self._arriving(digest).size_bytes
        chunk = chunk_bytes(size)
        expected = min(chunk, size - offset)
        if offset < 0 or offset % chunk or offset >= size or length != expected:
            message = f"{length} bytes at offset {offset} are no chunk of a blob of {size} bytes"
            raise Refusal(Reason.OFFSET, message)

    def write(self, digest: str, offset: int, payload: bytes) -> None:
        """Write one chunk. A repeat of a chunk that is here changes nothing."""
        self.check_span(digest, offset, len(payload))
        arrival = self._arriving(digest)
        chunk = offset // chunk_bytes(arrival.size_bytes)
        if chunk in arrival.missing:
            os.pwrite(arrival.descriptor, payload, offset)
            arrival.missing.discard(chunk)

    async def finish(self, digest: str, check: Callable[[Path], None] | None = None) -> bool:
        """Verify and keep a blob of which no chunk is missing; return whether it is held now.

        `check` may refuse the content further. Raises Refusal, and forgets the blob, where the
        content is not what was announced.
        """
        arrival = self._arrivals.get(digest)
        if arrival is None or arrival.missing:
            return self.held(digest)
        async with arrival.finishing:
            if self.held(digest):
                return True
            part = self._part(digest)
            try:
                # Both read the whole file; hashing leaves the interpreter lock, so they run side by side.
                checks = [asyncio.to_thread(_check_digest, part, digest)]
                if check is not None:
                    checks.append(asyncio.to_thread(check, part))
                await asyncio.gather(*checks)
            except (Refusal, FileNotFoundError):
                self._abandon(digest)
                raise
            if self._arrivals.get(digest) is not arrival:
                return self.held(digest)
            part.replace(self.path(digest))
            self._held[digest] = arrival.size_bytes
            self._abandon(digest)
        return True

    def _begin_empty(self, digest: str) -> None:
        if digest != hashlib.sha256().hexdigest():
            raise Refusal(Reason.DIGEST, "an empty blob has the digest of no bytes")
        self.path(digest).touch()
        self._held[digest] = 0

    def _arriving(self, digest: str) -> Arrival:
        arrival = self._arrivals.get(digest)
        if arrival is None:
            raise Refusal(Reason.UNANNOUNCED, f"blob {digest[:12]}… was not announced; post its header first")
        return arrival

    def _abandon(self, digest: str) -> None:
        arrival = self._arrivals.pop(digest, None)
        if arrival is not None:
            os.close(arrival.descriptor)
            self._part(digest).unlink(missing_ok=True)

    def _part(self, digest: str) -> Path:
        return self._folder / f"{digest}.part"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_fragments(path: Path, parts: tuple[tuple[int, str], ...]) -> None:
    """Check that a file is made of parts with these (size, digest). Raises Refusal."""
    with path.open("rb") as file:
        for number, (size, digest) in enumerate(parts):
            found = hashlib.sha256()
            remaining = size
            while remaining and (piece := file.read(min(remaining, _HASH_READ_BYTES))):
                found.update(piece)
                remaining -= len(piece)
            if remaining or found.hexdigest() != digest:
                raise Refusal(Reason.DIGEST, f"fragment {number} is not what its header says")


def _check_digest(path: Path, digest: str) -> None:
    found = file_digest(path)
    if found != digest:
        message = f"the blob announced as {digest[:12]}… has digest {found[:12]}…; send it again"
        raise Refusal(Reason.DIGEST, message)
