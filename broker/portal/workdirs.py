"""Workdirs on their way in through the browser: an uploaded bundle, or the bundled example."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file
from typing import IO, Final

from werkzeug.datastructures import FileStorage

from broker.market import Market
from broker.portal.forms import EXAMPLE
from broker.uploads import check_workdir, take_chunk, workdir_upload
from sites.bundle import pack

_CHUNK_BYTES: Final = 4_000_000


@dataclass(frozen=True, slots=True)
class Workdir:
    """A workdir that the market holds; `name` is what its sender called it."""

    digest: str
    name: str


def keep_upload(market: Market, tenant_id: str, sent: FileStorage) -> Workdir:
    """Keep an uploaded .tar.gz. Raises what `take_chunk` and `check_workdir` raise."""
    return Workdir(_keep(market, tenant_id, sent.stream), (sent.filename or "workdir.tar.gz")[-100:])


def keep_example(market: Market, tenant_id: str) -> Workdir:
    """Keep the bundled example as a workdir."""
    return Workdir(_keep(market, tenant_id, io.BytesIO(_packed_example())), "the example")


@cache
def _packed_example() -> bytes:
    with as_file(EXAMPLE) as folder:
        return pack(folder)


def _keep(market: Market, tenant_id: str, stream: IO[bytes]) -> str:
    digest = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # a seekable binary file, as it asks for
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    offset = 0
    while True:
        chunk = stream.read(_CHUNK_BYTES)
        upload = workdir_upload(market, tenant_id, digest, offset=offset, size_bytes=size)
        progress = take_chunk(market, upload, chunk, check_workdir)
        offset += len(chunk)
        if progress.complete:
            return digest
