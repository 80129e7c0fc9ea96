"""Reads CSV files, plain or gzipped, within limits, and names the line of whatever is wrong."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from broker.backtest.errors import BacktestError

FILE_BYTES_MAX: Final = 1 << 30
ROWS_MAX: Final = 5_000_000
FIELD_LENGTH_MAX: Final = 200
QUOTED: Final = 60


def rows(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...], error: type[BacktestError]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row) of a CSV file with a header.

    Raises `error` for a missing or unknown column, a row of another length, a file that is no text
    or too large; OSError where it cannot be opened.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if packed else raw
        text = io.TextIOWrapper(_Limited(stream, path, error), encoding="utf-8", newline="")  # type: ignore[type-var]  # a RawIOBase reads as well as a buffer
        try:
            yield from _rows(csv.reader(text, strict=True), path, required, optional, error)
        except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, csv.Error) as problem:
            raise error(f"{path.name}: not a readable CSV file ({problem}); give plain or gzipped UTF-8") from None


def _rows(
    reader: Iterator[list[str]],
    path: Path,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    error: type[BacktestError],
) -> Iterator[tuple[int, dict[str, str]]]:
    header = next(reader, None)
    known = ", ".join((*required, *optional))
    if not header:
        raise error(f"{path.name}: the file is empty; it needs a header line with the columns {known}")
    header = [name.strip() for name in header]
    missing = [name for name in required if name not in header]
    if missing:
        raise error(f"{path.name} line 1: the column {missing[0]!r} is missing; needed: {', '.join(required)}")
    unknown = [name for name in header if name not in (*required, *optional)]
    if unknown:
        raise error(f"{path.name} line 1: unknown column {unknown[0][:QUOTED]!r}; known: {known}")
    doubled = [name for name in header if header.count(name) > 1]
    if doubled:
        raise error(f"{path.name} line 1: the column {doubled[0]!r} stands twice")
    for line, fields in enumerate(reader, start=2):
        if not fields:
            continue
        if len(fields) != len(header):
            raise error(f"{path.name} line {line}: {len(fields)} fields where the header has {len(header)}")
        if line > ROWS_MAX:
            raise error(f"{path.name}: more than {ROWS_MAX:,} rows; cut the trace into shorter ones")
        if max(map(len, fields)) > FIELD_LENGTH_MAX:
            raise error(f"{path.name} line {line}: a field is longer than {FIELD_LENGTH_MAX} characters")
        yield line, dict(zip(header, fields, strict=True))


class _Limited(io.RawIOBase):
    """Hands on a stream and refuses to go beyond the limit, so that a small gzip cannot fill the memory."""

    def __init__(self, stream: io.BufferedIOBase | gzip.GzipFile, path: Path, error: type[BacktestError]) -> None:
        super().__init__()
        self._stream, self._path, self._error, self._size = stream, path, error, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # what TextIOWrapper passes
        read = self._stream.readinto(buffer) or 0
        self._size += read
        if self._size > FILE_BYTES_MAX:
            raise self._error(f"{self._path.name}: larger than {FILE_BYTES_MAX >> 20} MiB when unpacked")
        return read
