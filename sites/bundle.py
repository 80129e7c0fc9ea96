"""Workdir bundles: a folder as one content-addressed archive, and back without trust.

A bundle is a gzipped tar in its plainest form (ustar headers, files and folders only). `pack` is
deterministic: equal folders give equal bytes, so a resubmitted job uploads nothing. Reading is
strict because the bytes come from strangers: headers are taken one 512-byte block at a time
instead of through tarfile's extraction, so that no long-name or pax record can ask for memory,
no link can lead outside, and a bomb is cut while it unrolls.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import IO, Final

from sites.errors import (
    BundleDigestError,
    BundleError,
    BundleMemberError,
    BundlePathError,
    BundleReservedNameError,
    BundleTooLargeError,
)
from training.spec import RESERVED_WORKDIR_NAMES

# A workdir is code and small inputs. Data sets belong where the job's script fetches them.
PACKED_BYTES_MAX: Final = 64 * 1024 * 1024
UNPACKED_BYTES_MAX: Final = 512 * 1024 * 1024
MEMBERS_MAX: Final = 10_000
PATH_LENGTH_MAX: Final = 250
IGNORE_FILE: Final = ".hansaignore"
IGNORE_LINES_MAX: Final = 1000
# Never part of a job, whatever the ignore file says: version control, caches, local environments.
ALWAYS_IGNORED: Final = (".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv", "venv", ".DS_Store", IGNORE_FILE)

_BLOCK: Final = 512
_CHUNK: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class BundleLimits:
    """What a bundle may be at most."""

    packed_bytes_max: int = PACKED_BYTES_MAX
    unpacked_bytes_max: int = UNPACKED_BYTES_MAX
    members_max: int = MEMBERS_MAX


@dataclass(frozen=True, slots=True)
class BundleSummary:
    """What a bundle holds."""

    digest: str
    members: int
    unpacked_bytes: int


def pack(folder: Path, limits: BundleLimits | None = None) -> bytes:
    """Return `folder` as a bundle. Honours a `.hansaignore` in it (globs, one a line).

    Raises BundleError where the folder holds links, reserved top-level names or too much.
    """
    limits = limits or BundleLimits()
    paths = _listed(folder, limits)
    buffer = io.BytesIO()
    # No file name and no time in the gzip header: the same folder must give the same digest.
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=6) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path in paths:
            name = path.relative_to(folder).as_posix()
            _add(archive, path, name)
            if buffer.tell() > limits.packed_bytes_max:
                raise BundleTooLargeError(_too_large(f"{folder} packs to more than", limits.packed_bytes_max))
    packed = buffer.getvalue()
    if len(packed) > limits.packed_bytes_max:
        raise BundleTooLargeError(_too_large(f"{folder} packs to more than", limits.packed_bytes_max))
    return packed


def digest_of(packed: bytes) -> str:
    """Return the name of a bundle: the SHA-256 of its bytes."""
    return hashlib.sha256(packed).hexdigest()


def inspect(source: IO[bytes], limits: BundleLimits | None = None) -> BundleSummary:
    """Check a bundle without writing a file. `source` is read from its start to its end.

    Raises BundleError for the first rule that the bundle breaks.
    """
    return _read(source, None, limits or BundleLimits())


def unpack(archive: Path, digest: str, target: Path, limits: BundleLimits | None = None) -> BundleSummary:
    """Unpack the bundle in `archive` to the new folder `target`, whole or not at all.

    Raises BundleDigestError unless its bytes have `digest`, another BundleError for the first rule
    that it breaks; `target` then does not exist.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o755, parents=True)
    try:
        with archive.open("rb") as source:
            _check_digest(source, digest)
            summary = _read(source, partial, limits or BundleLimits())
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return summary


def _check_digest(source: BufferedReader, digest: str) -> None:
    if hashlib.file_digest(source, "sha256").hexdigest() != digest:
        raise BundleDigestError("the bundle's bytes are not those that the job names; upload the workdir again")
    source.seek(0)


def _listed(folder: Path, limits: BundleLimits) -> list[Path]:
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; name the workdir of the job")
    patterns = _ignore_patterns(folder)
    found: list[Path] = []
    total = 0
    waiting = [folder]
    while waiting:
        for entry in sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name):
            path = Path(entry.path)
            name = path.relative_to(folder)
            if _ignored(name, patterns, is_folder=entry.is_dir(follow_symlinks=False)):
                continue
            _check_name(name.as_posix())
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_size
            else:
                raise BundleMemberError(
                    f"{name} is a link or a device; copy what it points to into the workdir, or list it in {IGNORE_FILE}"
                )
            found.append(path)
            if len(found) > limits.members_max:
                raise BundleTooLargeError(f"{folder} holds more than {limits.members_max} files; use {IGNORE_FILE}")
            if total > limits.unpacked_bytes_max:
                raise BundleTooLargeError(_too_large(f"{folder} holds more than", limits.unpacked_bytes_max))
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    member = tarfile.TarInfo(name)
    if path.is_dir():
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(member)
        return
    executable = path.stat().st_mode & 0o100
    member.mode = 0o755 if executable else 0o644
    with path.open("rb") as stream:
        member.size = os.fstat(stream.fileno()).st_size
        try:
            archive.addfile(member, stream)
        except ValueError:
            raise BundlePathError(f"{name} is too long a path; at most about {PATH_LENGTH_MAX} letters") from None
        except OSError:
            raise BundleError(f"{name} changed while it was read; pack again when nothing writes to it") from None


def _ignore_patterns(folder: Path) -> list[str]:
    path = folder / IGNORE_FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    if len(lines) > IGNORE_LINES_MAX:
        raise BundleTooLargeError(f"{IGNORE_FILE} has more than {IGNORE_LINES_MAX} lines")
    own = [line.strip() for line in lines]
    return [*ALWAYS_IGNORED, *(line for line in own if line and not line.startswith("#"))]


def _ignored(name: PurePosixPath | Path, patterns: list[str], *, is_folder: bool) -> bool:
    """Match like a simple .gitignore: a pattern with a slash is for the whole path, else for any name."""
    for pattern in patterns:
        if pattern.endswith("/") and not is_folder:
            continue
        glob = pattern.strip("/")
        subject = name.as_posix() if "/" in pattern.rstrip("/") else name.name
        if fnmatch.fnmatchcase(subject, glob):
            return True
    return False


class _Unzipped:
    """The unzipped bytes of a bundle, never more than the limit."""

    def __init__(self, source: IO[bytes], limits: BundleLimits) -> None:
        self._zipped = gzip.GzipFile(fileobj=source, mode="rb")
        # Headers and padding count too: a bundle of empty members is cut by the member limit.
        self._left = limits.unpacked_bytes_max + 2 * _BLOCK * (limits.members_max + 20)
        self._limit = limits.unpacked_bytes_max

    def exactly(self, size: int) -> bytes:
        """Return the next `size` bytes; `size` is at most a chunk."""
        self._left -= size
        if self._left < 0:
            raise BundleTooLargeError(_too_large("the bundle unpacks to more than", self._limit))
        block = self._zipped.read(size)
        if len(block) != size:
            raise BundleError("the bundle is cut short; upload the workdir again")
        return block

    def chunks(self, size: int) -> Iterator[bytes]:
        """Yield `size` bytes in pieces."""
        while size:
            piece = min(size, _CHUNK)
            yield self.exactly(piece)
            size -= piece


class _Hashing(io.RawIOBase):
    """Count and hash what is read from `source`, and refuse more than `limit` bytes."""

    def __init__(self, source: IO[bytes], limit: int) -> None:
        self._source = source
        self._limit = limit
        self._count = 0
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer has no length
        block = self._source.read(len(buffer))
        self._count += len(block)
        if self._count > self._limit:
            raise BundleTooLargeError(_too_large("the bundle is packed larger than", self._limit))
        self.sha256.update(block)
        buffer[: len(block)] = block
        return len(block)


def _read(source: IO[bytes], target: Path | None, limits: BundleLimits) -> BundleSummary:
    hashing = _Hashing(source, limits.packed_bytes_max)
    unzipped = _Unzipped(BufferedReader(hashing, _CHUNK), limits)
    members = total = 0
    files: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    try:
        while (header := unzipped.exactly(_BLOCK)) != bytes(_BLOCK):
            member = _parse(header)
            members += 1
            total += member.size
            if members > limits.members_max:
                raise BundleTooLargeError(f"the bundle has more than {limits.members_max} members; use {IGNORE_FILE}")
            if total > limits.unpacked_bytes_max:
                raise BundleTooLargeError(_too_large("the bundle unpacks to more than", limits.unpacked_bytes_max))
            path = PurePosixPath(member.name)
            _check_place(path, files, folders, is_file=member.isfile())
            _write(unzipped, member, target / path if target else None)
        while hashing.read(_CHUNK):
            pass  # what follows the end mark is padding: hashed, never unpacked
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise BundleError(
            "the bundle is not a whole .tar.gz; pack the workdir with `hansa` and upload it again"
        ) from None
    return BundleSummary(hashing.sha256.hexdigest(), members, total)


def _check_place(path: PurePosixPath, files: set[PurePosixPath], folders: set[PurePosixPath], *, is_file: bool) -> None:
    """Refuse a file that stands twice, or a path that is both a file and a folder."""
    parents = set(path.parents)
    if path in files or parents & files or (is_file and path in folders):
        raise BundlePathError(f"{str(path)[:100]!r} stands twice in the bundle; pack it with `hansa`")
    folders.update(parents)
    (files if is_file else folders).add(path)


def _parse(header: bytes) -> tarfile.TarInfo:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError, ValueError):
        raise BundleError("the bundle holds a damaged header; pack the workdir with `hansa`") from None
    if not (member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.isdir()):
        raise BundleMemberError(
            f"{member.name[:100]!r} is a link, a device or an extended record; a bundle holds plain files and folders"
        )
    if member.size < 0 or (member.isdir() and member.size):
        raise BundleError(f"{member.name[:100]!r} has an impossible size; pack the workdir with `hansa`")
    _check_name(member.name)
    return member


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or not path.parts
        or ".." in path.parts
        or len(name) > PATH_LENGTH_MAX
        or "\\" in name
        or not name.isprintable()
    ):
        raise BundlePathError(
            f"{name[:100]!r} is not a path that a bundle may hold; keep to plain names in the workdir"
        )
    # training.py and training.cpython-311-x86_64-linux-gnu.so shadow the package as training/ does.
    if path.parts[0].split(".")[0] in RESERVED_WORKDIR_NAMES:
        raise BundleReservedNameError(
            f"{path.parts[0]!r} at the top of the workdir would shadow Hansa's own package; rename it"
        )


def _write(unzipped: _Unzipped, member: tarfile.TarInfo, path: Path | None) -> None:
    if path is None:
        for _ in unzipped.chunks(member.size):
            pass
    elif member.isdir():
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    else:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o755 if member.mode & 0o100 else 0o644)
        with os.fdopen(descriptor, "wb") as stream:
            for chunk in unzipped.chunks(member.size):
                stream.write(chunk)
    unzipped.exactly(-member.size % _BLOCK)


def _too_large(what: str, limit: int) -> str:
    return f"{what} {limit // (1024 * 1024)} MiB; leave data out with {IGNORE_FILE} and let the script fetch it"
