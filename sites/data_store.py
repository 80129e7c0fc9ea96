"""The datasets of a site: those that its operator keeps in folders of the host, and those that were brought for jobs.

    data/staging/DIGEST/     being brought: files that are whole and verified, and PARTIAL of the one under way
    data/sets/DIGEST/        whole: manifest.json and the files, read-only
    data/verified/DIGEST     how the files looked when they were last verified

What is brought is kept by digest up to a cap, and what was not used for longest goes first; nothing goes that an attempt
uses. Before each use the files must look exactly as when they were verified (size, times, inode), else they are read
and verified again. A staging that was cut off goes on, also under another agent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog

from sites.data_source import Source, Stop
from sites.dataset import MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest, read_manifest
from sites.errors import (
    DataAlteredError,
    DataCacheFullError,
    DataDigestError,
    DataError,
    DataMissingError,
    DataTooLargeError,
    StagingStoppedError,
)
from sites.protocol import SiteData
from sites.settings import DataSettings
from training.clock import Clock
from training.spec import DataReference

GB: Final = 1_000_000_000
PARTIAL: Final = ".partial"
# Less says more of the start of a transfer than of the line.
MEASURED_BYTES_MIN: Final = 100_000_000

_log = structlog.get_logger(__name__)
Fingerprint = dict[str, list[int]]


class DataStore:
    """What one site holds. Threads may share it; one dataset is brought by one thread at a time."""

    def __init__(self, folder: Path, settings: DataSettings, clock: Clock) -> None:
        """Keep what is brought below `folder`, and look at the operator's own folders."""
        self._clock = clock
        self._folder = folder
        self._settings = settings
        self._lock = threading.Lock()
        self._bringing: dict[str, threading.Lock] = {}
        self._used: dict[object, frozenset[str]] = {}
        self._closed = False
        self._bits_per_s = settings.bandwidth
        for name in ("staging", "sets", "verified"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own = dict(self._registered())
        self._sizes = {path.name: _size_of(path) for path in (folder / "sets").iterdir()}

    def close(self) -> None:
        """Break off what is being brought; it goes on where it was."""
        self._closed = True

    def announced(self, sources: Sequence[str]) -> SiteData | None:
        """Return what the market should know of the site's data, None where it takes no part in it."""
        if not self._settings.takes_part:
            return None
        with self._lock:
            held = self._sizes | {digest: size for digest, (_, size) in self._own.items()}
        return SiteData(
            held=held,
            cache_bytes=round(self._settings.cache_gb * GB),
            fetch_bits_per_s=float(f"{self._bits_per_s:.2g}"),
            sources=tuple(sources),
        )

    def use(self, key: object, references: Sequence[DataReference]) -> None:
        """Let nothing of these go before `release`."""
        with self._lock:
            self._used[key] = frozenset(reference.sha256 for reference in references)

    def release(self, key: object) -> None:
        """Say that an attempt is over."""
        with self._lock:
            self._used.pop(key, None)

    def folder_of(self, reference: DataReference) -> Path:
        """Return where a dataset that was staged lies."""
        own = self._own.get(reference.sha256)
        return self._folder / "sets" / reference.sha256 if own is None else own[0]

    def stage(self, reference: DataReference, prefixes: Sequence[str], stop: Stop) -> None:
        """Have a dataset here, verified. Raises DataError, and StagingStoppedError once `stop` says so."""
        digest = reference.sha256
        with self._lock:
            bringing = self._bringing.setdefault(digest, threading.Lock())

        def is_over() -> bool:
            return self._closed or stop()

        while not bringing.acquire(timeout=0.2):
            if is_over():
                raise StagingStoppedError("the attempt was ended while its data came")
        try:
            if digest in self._own:
                self._verify(self._own[digest][0], digest)
                return
            held = self._folder / "sets" / digest
            if held.is_dir():
                try:
                    self._verify(held, digest)
                except DataAlteredError:
                    _log.exception("data.altered", digest=digest)
                    self._drop(held)
                else:
                    os.utime(held)
                    return
            self._bring(reference, prefixes, is_over)
        finally:
            bringing.release()

    # -- bringing ------------------------------------------------------------------------------

    def _bring(self, reference: DataReference, prefixes: Sequence[str], is_over: Stop) -> None:
        digest, staged = reference.sha256, self._folder / "staging" / reference.sha256
        if reference.source is None:
            raise DataMissingError(f"this site does not hold the dataset {reference.name}, and the job names no source")
        source = Source(reference.source, prefixes, is_over)
        try:
            content = source.small(MANIFEST_FILE, MANIFEST_BYTES_MAX)
            manifest = read_manifest(content, digest, round(reference.size_gb * GB))
            self._make_room(digest, manifest.size_bytes)
            staged.mkdir(mode=0o700, exist_ok=True)
            begun_s, before = self._clock.monotonic_s(), _taken(staged)
            for file in manifest.files:
                target = staged / file.path
                if target.is_file() and target.stat().st_size == file.size_bytes:
                    continue  # it is moved there only once it is verified
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                partial = staged / PARTIAL
                whose = staged / f"{PARTIAL}-of"
                if not whose.exists() or whose.read_text() != file.sha256:
                    partial.unlink(missing_ok=True)
                    whose.write_text(file.sha256)
                source.fetch(file.path, partial, size_bytes=file.size_bytes, sha256=file.sha256)
                partial.chmod(0o444)
                partial.replace(target)
            self._measure(manifest.size_bytes - before, self._clock.monotonic_s() - begun_s)
        except (DataDigestError, DataTooLargeError):
            shutil.rmtree(staged, ignore_errors=True)
            raise
        finally:
            source.close()
        (staged / f"{PARTIAL}-of").unlink(missing_ok=True)
        (staged / MANIFEST_FILE).write_bytes(content)
        held = self._folder / "sets" / digest
        staged.rename(held)
        self._note(digest, _looks(held, manifest))
        with self._lock:
            self._sizes[digest] = manifest.size_bytes
        _log.info("data.staged", digest=digest, size_bytes=manifest.size_bytes)

    def _make_room(self, digest: str, needed_bytes: int) -> None:
        """Remove what was not used for longest until `needed_bytes` fit. Raises DataCacheFullError."""
        cap = round(self._settings.cache_gb * GB)
        if needed_bytes > cap:
            raise DataCacheFullError(
                f"the dataset has {needed_bytes} bytes, and this site keeps at most {cap} for jobs"
            )
        with self._lock:
            busy = frozenset().union(*self._used.values()) | {digest}
            kept = [path for name in ("sets", "staging") for path in (self._folder / name).iterdir()]
            kept = sorted((path for path in kept if path.name != digest), key=lambda path: path.stat().st_mtime)
            sizes = {path: self._sizes.get(path.name) or _taken(path) for path in kept}
            total = sum(sizes.values()) + needed_bytes
            for path in kept:
                if total <= cap:
                    return
                if path.name not in busy:
                    total -= sizes[path]
                    self._remove(path)
        if total > cap:
            raise DataCacheFullError(
                f"{needed_bytes} bytes do not fit beside the data of running jobs; it is tried elsewhere"
            )

    def _drop(self, held: Path) -> None:
        with self._lock:
            self._remove(held)

    def _remove(self, path: Path) -> None:
        _log.info("data.removed", digest=path.name)
        self._sizes.pop(path.name, None)
        (self._folder / "verified" / path.name).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)

    def _measure(self, fetched_bytes: int, lasted_s: float) -> None:
        if fetched_bytes >= MEASURED_BYTES_MIN and lasted_s > 0:
            self._bits_per_s = (self._bits_per_s + fetched_bytes * 8 / lasted_s) / 2

    # -- holding -------------------------------------------------------------------------------

    def _registered(self) -> Mapping[str, tuple[Path, int]]:
        found = {}
        for folder in self._settings.datasets:
            try:
                digest = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
                manifest = _manifest_of(folder, digest)
                _looks(folder, manifest)
                found[digest] = (folder, manifest.size_bytes)
            except (DataError, OSError) as error:
                _log.exception("data.unusable", folder=str(folder), detail=str(error))
        return found

    def _verify(self, folder: Path, digest: str) -> None:
        """Check that a dataset is what its digest says, by reading it where it looks another than when last read."""
        manifest = _manifest_of(folder, digest)
        looks = _looks(folder, manifest)
        try:
            known = json.loads((self._folder / "verified" / digest).read_bytes())
        except (OSError, ValueError):
            known = None
        if known == looks:
            return
        for file in manifest.files:
            with (folder / file.path).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                    raise DataAlteredError(f"{file.path} of the dataset {digest[:12]}… was altered at this site")
        self._note(digest, looks)

    def _note(self, digest: str, looks: Fingerprint) -> None:
        path = self._folder / "verified" / digest
        partial = path.with_name(f"{digest}{PARTIAL}")
        partial.write_text(json.dumps(looks))
        partial.replace(path)


def _manifest_of(folder: Path, digest: str) -> Manifest:
    try:
        return read_manifest((folder / MANIFEST_FILE).read_bytes(), digest)
    except OSError as error:
        raise DataAlteredError(f"{folder} has no {MANIFEST_FILE} that can be read ({error.strerror})") from None
    except DataDigestError as error:
        raise DataAlteredError(str(error)) from None


def _looks(folder: Path, manifest: Manifest) -> Fingerprint:
    """Return how each file looks from outside. Raises DataAlteredError for one that is not there as it should be."""
    found = {}
    for file in manifest.files:
        try:
            seen = (folder / file.path).lstat()
        except OSError:
            raise DataAlteredError(f"{file.path} is missing from {folder}") from None
        if not stat.S_ISREG(seen.st_mode) or seen.st_size != file.size_bytes:
            raise DataAlteredError(f"{file.path} in {folder} is not a plain file of {file.size_bytes} bytes")
        found[file.path] = [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]
    return found


def _size_of(held: Path) -> int:
    try:
        return _manifest_of(held, held.name).size_bytes
    except DataError:
        return _taken(held)


def _taken(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
