"""Files named by their digest: workdirs, checkpoints, outputs, snapshots.

An upload may be cut and resumed: its bytes grow in a partial file of its own owner, and the file
gets its name only once all of it has the digest that it claims. Nobody's half upload can spoil
another's, and a name never changes what it stands for.

    ROOT/files/ab/abcd…          whole files
    ROOT/documents/ab/abcd….z    small documents, compressed; named by what they unpack to
    ROOT/partial/OWNER.abcd…     uploads under way
    ROOT/locks/ab                empty; held while what is said of a file and the file are brought together
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, ClassVar, Final

from broker.errors import ConflictError, NotFoundError, RefusedError

DOCUMENT_BYTES_MAX: Final = 1024**3
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_OWNER: Final = re.compile(r"[a-z0-9_-]{1,80}")


class ArtifactMissingError(NotFoundError):
    """No artifact of that digest is held."""

    code: ClassVar[str] = "artifact.missing"


class ArtifactTooLargeError(RefusedError):
    """More bytes than an artifact may have, or than it was announced with."""

    code = "artifact.too_large"
    status = 413


class ArtifactDigestError(RefusedError):
    """A whole upload whose bytes are not those that its name promises."""

    code = "artifact.digest"


class ArtifactOffsetError(ConflictError):
    """A chunk that would leave a gap; `held_bytes` says where to go on."""

    code = "artifact.offset"

    def __init__(self, held_bytes: int) -> None:
        """Say where the upload stands."""
        self.held_bytes = held_bytes
        super().__init__(f"{held_bytes} bytes of this upload are held; go on from there")


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of an upload is held."""

    held_bytes: int
    complete: bool


class ArtifactStore:
    """The content-addressed files below one folder; any number of processes may share it."""

    def __init__(self, root: Path) -> None:
        """Make the folders that are not there yet."""
        self._files = root / "files"
        self._documents = root / "documents"
        self._partial = root / "partial"
        self._locks = root / "locks"
        for folder in (self._files, self._documents, self._partial, self._locks):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def progress(self, digest: str, owner: str, *, afresh: bool = False) -> Progress:
        """Return how much of `digest` is held, counting only this owner's upload if it is not whole.

        `afresh` counts only this owner's upload in any case.
        """
        whole = self._path(digest)
        if whole.exists() and not afresh:
            return Progress(whole.stat().st_size, complete=True)
        partial = self._partial_path(digest, owner)
        return Progress(partial.stat().st_size if partial.exists() else 0, complete=False)

    def append(
        self, digest: str, chunk: bytes, *, owner: str, offset: int, size_bytes: int, afresh: bool = False
    ) -> Progress:
        """Add `chunk` at `offset` to the upload of an artifact of `size_bytes`; complete it with the last byte.

        `afresh` takes every byte from this owner, though the artifact be held already. Sending a chunk again changes nothing. Raises ArtifactOffsetError where the chunk would leave a
        gap, ArtifactTooLargeError past `size_bytes`, ArtifactDigestError where the whole has another
        digest: the upload then starts again from nought.
        """
        whole = self._path(digest)
        if whole.exists() and not afresh:
            return Progress(whole.stat().st_size, complete=True)
        if offset + len(chunk) > size_bytes:
            raise ArtifactTooLargeError(
                f"the chunk ends after the announced {size_bytes} bytes; announce the true size"
            )
        partial = self._partial_path(digest, owner)
        with _locked(partial) as stream:
            if whole.exists() and not afresh:  # another upload of the same owner completed it while this one waited
                partial.unlink(missing_ok=True)
                return Progress(whole.stat().st_size, complete=True)
            held = stream.seek(0, os.SEEK_END)
            if offset > held:
                raise ArtifactOffsetError(held)
            stream.write(chunk[held - offset :])
            stream.flush()
            held = max(held, offset + len(chunk))
            if held < size_bytes:
                return Progress(held, complete=False)
            self._complete(digest, partial, stream)
        return Progress(size_bytes, complete=True)

    def open(self, digest: str) -> BinaryIO:
        """Open a whole artifact for reading. Raises ArtifactMissingError where there is none."""
        return self.file(digest).open("rb")

    def file(self, digest: str) -> Path:
        """Return where a whole artifact lies. Raises ArtifactMissingError where there is none."""
        path = self._path(digest)
        if not path.exists():
            raise ArtifactMissingError(f"the artifact {digest[:12]}… is not held here; upload it first")
        return path.resolve()

    def size_bytes(self, digest: str) -> int:
        """Return the size of a whole artifact. Raises ArtifactMissingError where there is none."""
        with self.open(digest) as stream:
            return os.fstat(stream.fileno()).st_size

    def discard(self, digest: str) -> None:
        """Remove a whole artifact; uploads of it that are under way go on."""
        self._path(digest).unlink(missing_ok=True)

    @contextmanager
    def settled(self, digest: str) -> Iterator[bool]:
        """Say whether a whole artifact is here; that stays so while the body runs.

        Whoever writes or reads the row that promises the file does it in here, and so does who discards it:
        else one could remove what another has just promised.
        """
        path = self._path(digest)
        with (self._locks / digest[:2]).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path.exists()

    def put_bytes(self, content: bytes) -> str:
        """Keep a document and return its digest, that of the bytes before compression."""
        assert len(content) <= DOCUMENT_BYTES_MAX, "a document beyond the limit could not be read back"
        digest = hashlib.sha256(content).hexdigest()
        path = self._document_path(digest)
        if not path.exists():
            partial = self._partial / f"document-{os.getpid()}-{threading.get_ident()}-{digest}"
            with partial.open("wb") as stream:
                stream.write(zlib.compress(content, 6))
                stream.flush()
                os.fsync(stream.fileno())
            _publish(partial, path)
        return digest

    def get_bytes(self, digest: str) -> bytes:
        """Return a document, its digest checked. Raises ArtifactMissingError where it is not held."""
        try:
            packed = self._document_path(digest).read_bytes()
        except FileNotFoundError:
            raise ArtifactMissingError(f"the document {digest[:12]}… is not held; its retention may be over") from None
        content = zlib.decompressobj().decompress(packed, DOCUMENT_BYTES_MAX)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ArtifactDigestError(f"the document {digest[:12]}… was altered on disk; restore it from a backup")
        return content

    def discard_document(self, digest: str) -> None:
        """Remove a document whose retention is over."""
        self._document_path(digest).unlink(missing_ok=True)

    def sweep_partials(self, now_ms: int, age_ms_max: int) -> int:
        """Remove uploads that nobody has touched for `age_ms_max`; return how many."""
        removed = 0
        for partial in self._partial.iterdir():
            try:
                idle_ms = now_ms - round(partial.stat().st_mtime * 1000)
            except FileNotFoundError:
                continue
            if idle_ms > age_ms_max:
                partial.unlink(missing_ok=True)
                removed += 1
        return removed

    def _complete(self, digest: str, partial: Path, stream: BufferedRandom) -> None:
        stream.seek(0)
        if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
            partial.unlink(missing_ok=True)
            raise ArtifactDigestError(
                "the uploaded bytes do not have the digest that names them; upload them again from the start"
            )
        os.fsync(stream.fileno())
        _publish(partial, self._path(digest))

    def _path(self, digest: str) -> Path:
        _require_digest(digest)
        return self._files / digest[:2] / digest

    def _document_path(self, digest: str) -> Path:
        _require_digest(digest)
        return self._documents / digest[:2] / f"{digest}.z"

    def _partial_path(self, digest: str, owner: str) -> Path:
        _require_digest(digest)
        assert _OWNER.fullmatch(owner), f"{owner!r} cannot name an upload"
        return self._partial / f"{owner}.{digest}"


@contextmanager
def _locked(path: Path) -> Iterator[BufferedRandom]:
    """Open `path` for appending, alone: the one who waited opens again if the file has got its name meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if _is_at(path, stream):
                yield stream
                return


def _is_at(path: Path, stream: BufferedRandom) -> bool:
    try:
        return path.stat().st_ino == os.fstat(stream.fileno()).st_ino
    except FileNotFoundError:
        return False


def _publish(partial: Path, path: Path) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _require_digest(digest: str) -> None:
    assert _DIGEST.fullmatch(digest), "a digest is 64 hexadecimal digits; check it at the edge"
