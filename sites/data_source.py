"""Where a dataset's bytes come from: a folder at a web address, or one of the host's, as far as the owner allows it.

The addresses are tenants', so nothing is opened that the owner's `data_sources_allowed` does not cover, and no redirect
is followed. A cut transfer goes on where it broke off.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import quote, unquote, urlsplit

import httpx

from sites.errors import DataDigestError, DataSourceError, DataUnreachableError, StagingStoppedError

CHUNK_BYTES: Final = 1024 * 1024
TIMEOUT_S: Final = 30.0
# Tries without a byte of progress between them; the pauses double.
TRIES_MAX: Final = 4
FIRST_PAUSE_S: Final = 0.5
_PLAIN: Final = re.compile(r"(https?|file)://[A-Za-z0-9._:\[\]-]*/[A-Za-z0-9._~/%+,=@-]*")

Stop = Callable[[], bool]


def source_allowed(source: str, prefixes: Sequence[str]) -> bool:
    """Return whether the owner's list covers an address. A prefix covers what lies below its last stroke.

    An address with a user, a query, or a step upwards, plain or encoded, is covered by none.
    """
    if _PLAIN.fullmatch(source) is None or "//" in urlsplit(source).path:
        return False
    if any(part in ("..", ".") for part in unquote(unquote(urlsplit(source).path)).split("/")):
        return False
    below = f"{source.rstrip('/')}/"
    return any(below.startswith(f"{prefix.rstrip('/')}/") for prefix in prefixes)


class Source:
    """The folder at one address."""

    def __init__(self, url: str, prefixes: Sequence[str], stop: Stop) -> None:
        """Read from `url`. Raises DataSourceError where the owner does not allow it."""
        if not source_allowed(url, prefixes):
            raise DataSourceError(
                f"the owner of this site does not let datasets come from {url[:200]}; see data_sources_allowed in its policy"
            )
        self._url = url.rstrip("/")
        self._stop = stop
        self._folder: Path | None = None
        self._http: httpx.Client | None = None
        if url.startswith("file:"):
            self._folder = Path(unquote(urlsplit(url).path)).resolve()
            if not source_allowed(f"file://{quote(str(self._folder))}", prefixes):
                raise DataSourceError(
                    f"{url[:200]} is a link to a folder that the owner does not let datasets come from"
                )
        else:
            # No proxy and no name from the environment: the owner's list is about addresses that are dialled.
            self._http = httpx.Client(verify=ssl.create_default_context(), trust_env=False, follow_redirects=False)

    def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            self._http.close()

    def small(self, path: str, bytes_max: int) -> bytes:
        """Return a small file whole. Raises DataUnreachableError."""
        taken = bytearray()

        def write(chunk: bytes) -> None:
            taken.extend(chunk)
            if len(taken) > bytes_max:
                raise DataDigestError(f"{path} is larger than the {bytes_max} bytes that it may have")

        def whole() -> None:
            taken.clear()
            self._read(path, 0, write, taken.clear)

        self._tried(whole, lambda: 0)
        return bytes(taken)

    def fetch(self, path: str, partial: Path, *, size_bytes: int, sha256: str) -> None:
        """Write a file to `partial`, verified; goes on where a former try broke off.

        Raises DataDigestError where the source twice gives other bytes, DataUnreachableError, StagingStoppedError.
        """
        for last in (False, True):
            with partial.open("ab") as stream:
                self._tried(lambda stream=stream: self._append(path, stream, size_bytes), stream.tell)  # type: ignore[misc]  # bound now
            with partial.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == sha256:
                    return
            partial.unlink()  # of an older state of the source, perhaps: from the start, once
            if last:
                raise DataDigestError(f"{path} at the source has other bytes than the manifest names; mend the source")

    def _append(self, path: str, stream: BinaryIO, size_bytes: int) -> None:
        def write(chunk: bytes) -> None:
            if stream.tell() + len(chunk) > size_bytes:
                stream.truncate(0)
                raise DataDigestError(f"{path} at the source is longer than the manifest says; mend the source")
            stream.write(chunk)

        def restart() -> None:
            stream.truncate(0)
            stream.seek(0)

        if stream.tell() < size_bytes:
            self._read(path, stream.tell(), write, restart)
        if stream.tell() < size_bytes:
            raise DataUnreachableError(f"{path} broke off at {stream.tell()} of {size_bytes} bytes; it is tried again")

    def _read(self, path: str, offset: int, write: Callable[[bytes], None], restart: Callable[[], None]) -> None:
        if self._folder is not None:
            self._read_file(self._folder, path, offset, write)
        else:
            self._read_web(path, offset, write, restart)

    def _read_file(self, folder: Path, path: str, offset: int, write: Callable[[bytes], None]) -> None:
        whole = (folder / path).resolve()
        if not whole.is_relative_to(folder):
            raise DataSourceError(f"{path} leads out of the source's folder by a link")
        try:
            with whole.open("rb") as stream:
                stream.seek(offset)
                while chunk := stream.read(CHUNK_BYTES):
                    self._go_on()
                    write(chunk)
        except OSError as error:
            raise DataUnreachableError(f"{path} cannot be read at the source ({error.strerror})") from None

    def _read_web(self, path: str, offset: int, write: Callable[[bytes], None], restart: Callable[[], None]) -> None:
        assert self._http is not None, "a source is a folder or an address"
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        try:
            with self._http.stream("GET", f"{self._url}/{quote(path)}", headers=headers, timeout=TIMEOUT_S) as answer:
                if answer.status_code == httpx.codes.OK and offset:
                    restart()  # it knows no ranges
                elif answer.status_code not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
                    raise DataUnreachableError(f"the source answers {answer.status_code} to {path}")
                for chunk in answer.iter_raw():
                    self._go_on()
                    write(chunk)
        except httpx.HTTPError as error:
            raise DataUnreachableError(f"{path} cannot be fetched ({error or type(error).__name__})") from None

    def _tried(self, read: Callable[[], None], reached: Callable[[], int]) -> None:
        """Read, again after a pause where the line broke; only tries without progress are counted."""
        failed, before = 0, reached()
        while True:
            self._go_on()
            try:
                read()
            except DataUnreachableError:
                failed = 1 if reached() > before else failed + 1
                before = reached()
                if failed >= TRIES_MAX:
                    raise
                _pause(FIRST_PAUSE_S * 2 ** (failed - 1))
            else:
                return

    def _go_on(self) -> None:
        if self._stop():
            raise StagingStoppedError("the attempt was ended while its data came")


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)
