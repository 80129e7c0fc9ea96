"""A market's columns as bytes: a `.npz` (one npy member per column, compressed), read with care.

numpy reads the same file (`np.load(path, allow_pickle=False)`). Here a file is untrusted: every
member's name, header and size are checked against the schema before anything is allocated for it,
object arrays do not exist, and a member may not be larger than its header says. Writing gives the
same bytes for the same market.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Final

import numpy as np
from numpy.lib import format as npy

from broker.allocation.errors import DocumentError
from broker.allocation.table_checks import check_version, checked
from broker.allocation.tables import ROWS_MAX, SCHEMA, Array, Column, Tables, column_names

# A file of the largest market that a snapshot may be stays below.
FILE_BYTES_MAX: Final = 1_000_000_000
CONTENT_BYTES_MAX: Final = 2_000_000_000
_HEADER_BYTES_MAX: Final = 512
# The earliest moment that a zip can state: a file's bytes do not depend on when it was written.
_ZIP_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
# zlib's fastest level: within a tenth of the best size on these columns, several times faster.
_COMPRESSION_LEVEL: Final = 1
_ZIP_MAGIC: Final = b"PK"


def is_table_file(content: bytes) -> bool:
    """Return whether bytes look like a file of columns."""
    return content.startswith(_ZIP_MAGIC)


def to_bytes(tables: Tables) -> bytes:
    """Return the tables as a compressed `.npz`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION_LEVEL) as archive:
        for name in column_names():
            member = io.BytesIO()
            npy.write_array(member, tables[name], version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _ZIP_EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, member.getbuffer())
    return file.getvalue()


def from_bytes(content: bytes) -> Tables:
    """Return the tables in a `.npz`. Raises DocumentError where it is damaged, too large or not such a file."""
    if len(content) > FILE_BYTES_MAX:
        raise DocumentError(f"the file has {len(content)} bytes, at most {FILE_BYTES_MAX} are read; split the market")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return checked(_members(archive))
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        struct.error,
        NotImplementedError,
        RuntimeError,
        OSError,
    ) as error:
        message = f"the file is damaged or no .npz ({str(error)[:200]}); fetch it again, or write it anew"
        raise DocumentError(message) from None


def _members(archive: zipfile.ZipFile) -> dict[str, Array]:
    """Return every column of the archive, sizes checked before they are read."""
    infos = archive.infolist()
    wanted = set(column_names())
    names = [info.filename.removesuffix(".npy") for info in infos]
    if "market.version" in names:
        # First, since another version may well have other columns.
        info = infos[names.index("market.version")]
        check_version(_array(archive, info, "market.version", SCHEMA["market"]["version"], 1))
    unknown = [name for name in names if name not in wanted]
    if unknown or len(set(names)) != len(names):
        what = f"unknown column {unknown[0][:100]!r}" if unknown else "a column twice"
        raise DocumentError(f"the file has {what}; it must be a market's columns as this version of Hansa writes them")
    if sum(info.file_size for info in infos) > CONTENT_BYTES_MAX:
        raise DocumentError(f"the file unpacks to more than {CONTENT_BYTES_MAX} bytes; split the market")
    arrays = {}
    for name, info in zip(names, infos, strict=True):
        group, _, column = name.partition(".")
        arrays[name] = _array(archive, info, name, SCHEMA[group][column], ROWS_MAX[group])
    return arrays


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, column: Column, rows_max: int) -> Array:
    """Read one column whose header agrees with the schema and with the member's size."""
    with archive.open(info) as member:
        try:
            if npy.read_magic(member) != (1, 0):
                raise DocumentError(f"{name}: only npy format 1.0 is read; write the file anew")
            shape, fortran, dtype = npy.read_array_header_1_0(member, max_header_size=_HEADER_BYTES_MAX)
        except (ValueError, TypeError, SyntaxError) as error:
            raise DocumentError(f"{name}: no npy header ({str(error)[:200]}); write the file anew") from None
        text = column.dtype == "S" and dtype.kind == "S" and 1 <= dtype.itemsize <= column.high
        if fortran or len(shape) != 1 or not (text or (column.dtype != "S" and dtype == np.dtype(column.dtype))):
            wanted = f"text of at most {column.high:.0f} bytes" if column.dtype == "S" else column.dtype
            raise DocumentError(f"{name} is {dtype} of shape {shape}; it must be one column of {wanted}")
        if shape[0] > rows_max:
            raise DocumentError(f"{name} has {shape[0]} rows, at most {rows_max} are read; split the market")
        size = shape[0] * dtype.itemsize
        if info.file_size - member.tell() != size:
            raise DocumentError(
                f"{name} is {info.file_size} bytes long, not what its header says; fetch the file again"
            )
        values = member.read(size)
        if len(values) != size:
            raise DocumentError(f"{name} is truncated; fetch the file again")
        # Reading to the end makes zipfile compare the checksum.
        if member.read(1):
            raise DocumentError(f"{name} is longer than its header says; fetch the file again")
        return np.frombuffer(values, dtype=dtype)
