"""Markets and clearings as files: JSON, JSON in gzip, or columns in a `.npz`, told apart by content.

What cannot be read ends as wrong usage, with the field and the remedy, never as a traceback.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from broker.cli.errors import UsageError

if TYPE_CHECKING:
    from broker.allocation.document import Document
    from broker.allocation.snapshot import Snapshot
    from broker.allocation.tables import Tables

D = TypeVar("D", bound="Document")

DOCUMENT_BYTES_MAX: Final = 2_000_000_000
SUFFIXES: Final = (".json", ".json.gz", ".npz")
_GZIP_MAGIC: Final = b"\x1f\x8b"
_NEXT_STEP: Final = (
    "`hansa admin round N --documents DIR` fetches a round's documents, `hansa market generate` draws one"
)


def read_tables(path: Path) -> Tables:
    """Return a market's columns from a file of any of the three forms."""
    from broker.allocation import table_file
    from broker.allocation.errors import AllocationError
    from broker.allocation.snapshot import Snapshot
    from broker.allocation.table_rows import from_snapshot

    content = _content(path)
    try:
        if table_file.is_table_file(content):
            return table_file.from_bytes(content)
        return from_snapshot(Snapshot.from_json(content))
    except (ValueError, AllocationError) as error:
        raise _unreadable(path, "snapshot", error) from None


def read_snapshot(path: Path) -> Snapshot:
    """Return a market's rows from a file of any of the three forms."""
    from broker.allocation import table_file
    from broker.allocation.errors import AllocationError
    from broker.allocation.snapshot import Snapshot
    from broker.allocation.table_rows import to_snapshot

    content = _content(path)
    try:
        if table_file.is_table_file(content):
            return to_snapshot(table_file.from_bytes(content))
        return Snapshot.from_json(content)
    except (ValueError, AllocationError) as error:
        raise _unreadable(path, "snapshot", error) from None


def read_document(path: Path, kind: type[D]) -> D:
    """Return a document of one kind from JSON, plain or in gzip."""
    from broker.allocation.errors import AllocationError

    try:
        return kind.from_json(_content(path))
    except (ValueError, AllocationError) as error:
        raise _unreadable(path, kind.__name__.lower(), error) from None


def write_tables(tables: Tables, path: Path) -> None:
    """Write a market in the form that the path's suffix names."""
    from broker.allocation import table_file
    from broker.allocation.table_rows import to_snapshot

    if path.name.endswith(".npz"):
        write(path, table_file.to_bytes(tables))
    else:
        write_document(to_snapshot(tables), path)


def write_document(document: Document, path: Path) -> None:
    """Write a document as JSON, in gzip where the suffix says so; the same document gives the same bytes."""
    content = document.to_json()
    # The time and the name in gzip's header would make equal documents differ.
    write(path, gzip.compress(content, compresslevel=6, mtime=0) if path.name.endswith(".gz") else content)


def writable(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Refuse an output that names no known form or whose folder is not there, before work is done for it."""
    if not path.name.endswith(suffixes):
        raise UsageError(f"cannot tell the form of {path}", next_step=f"end the name in {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", next_step="make it, or choose another")


def write(path: Path, content: bytes) -> None:
    """Write a file, or say why not."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", next_step="choose a place where you may") from None


def _content(path: Path) -> bytes:
    """Return a file's bytes, unpacked where it is gzip, within bounds."""
    try:
        if path.stat().st_size > DOCUMENT_BYTES_MAX:
            raise UsageError(f"{path} is larger than {DOCUMENT_BYTES_MAX} bytes", next_step="split the market")
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}", next_step=_NEXT_STEP) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", next_step=_NEXT_STEP) from None
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            content = packed.read(DOCUMENT_BYTES_MAX + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is damaged gzip: {error}", next_step="fetch the file again") from None
    if len(content) > DOCUMENT_BYTES_MAX:
        raise UsageError(f"{path} unpacks to more than {DOCUMENT_BYTES_MAX} bytes", next_step="split the market")
    return content


def _unreadable(path: Path, kind: str, error: Exception) -> UsageError:
    # pydantic's own lines: how many errors, the field, what is wrong with it.
    lines = [line for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
    return UsageError(f"{path} is not a {kind}: {' '.join(line.strip() for line in lines[:5])}", next_step=_NEXT_STEP)
