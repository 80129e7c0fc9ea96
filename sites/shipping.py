"""What an attempt leaves, brought to the broker: its log and measurements, checkpoints and outputs.

Everything goes in small steps on the agent's transfer threads; what the broker holds is told back
to the agent, which keeps it in the journal, so nothing is sent twice after a restart.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from sites.attempt_folder import AttemptFolder, open_left_by_ranks
from sites.client import Broker
from sites.errors import RequestRefusedError
from sites.journal import AttemptRecord
from sites.protocol import OUTPUT_NAME_LENGTH_MAX, STREAM_CHUNK_BYTES_MAX
from training.attempt import NewestCheckpoint

STREAMS: Final = {"log": "rank.log", "metrics": "metrics.jsonl"}
STREAM_CHUNK_BYTES: Final = 256 * 1024
CHUNKS_PER_STEP_MAX: Final = 8
OUTPUTS_MAX: Final = 100
# A stream that is full at the broker is not read on: its offset is set beyond every file.
FULL: Final = 1 << 62
_NEWEST_BYTES_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Shipped:
    """What one step brought to the broker; `more` says that another step has work to do."""

    stream_bytes: dict[str, int] = field(default_factory=dict)
    checkpoint: NewestCheckpoint | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    more: bool = False


def ship(
    broker: Broker, folder: AttemptFolder, record: AttemptRecord, *, outputs: bool, output_bytes_max: int
) -> Shipped:
    """Send what is new. Raises SiteError where the broker is away; what was sent is found again then."""
    stream_bytes = dict(record.stream_bytes)
    more = False
    for name in STREAMS:
        more |= _ship_stream(broker, folder, record, name, stream_bytes)
    checkpoint = _ship_checkpoint(broker, folder, record, output_bytes_max)
    held = _ship_outputs(broker, folder, record, output_bytes_max) if outputs else dict(record.outputs)
    return Shipped(stream_bytes, checkpoint, held, more)


def _ship_stream(broker: Broker, folder: AttemptFolder, record: AttemptRecord, name: str, held: dict[str, int]) -> bool:
    assert STREAM_CHUNK_BYTES <= STREAM_CHUNK_BYTES_MAX, "the protocol's bound is the larger"
    try:
        with open_left_by_ranks(folder.root, STREAMS[name]) as stream:
            for _ in range(CHUNKS_PER_STEP_MAX):
                offset = held.get(name, 0)
                if offset >= FULL:
                    return False
                stream.seek(offset)
                chunk = stream.read(STREAM_CHUNK_BYTES)
                if not chunk:
                    return False
                state = broker.append_stream(record.lease_id, record.epoch, name, offset, chunk)
                held[name] = FULL if state.full else state.held_bytes
    except FileNotFoundError:
        return False
    return True


def _ship_checkpoint(
    broker: Broker, folder: AttemptFolder, record: AttemptRecord, bytes_max: int
) -> NewestCheckpoint | None:
    try:
        with open_left_by_ranks(folder.root, "checkpoint", "newest.json") as stream:
            newest = NewestCheckpoint.model_validate_json(stream.read(_NEWEST_BYTES_MAX))
        if newest == record.checkpoint:
            return newest
        with open_left_by_ranks(folder.root, "checkpoint", newest.file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != newest.size_bytes or size > bytes_max:
                return record.checkpoint  # being replaced just now, or not what it says
            broker.store_artifact(newest.digest, stream, size)
    except (FileNotFoundError, ValidationError, RequestRefusedError):
        return record.checkpoint
    return newest


def _ship_outputs(broker: Broker, folder: AttemptFolder, record: AttemptRecord, bytes_max: int) -> dict[str, str]:
    held = dict(record.outputs)
    left = bytes_max
    for name in _output_names(folder):
        if name in held or len(held) >= OUTPUTS_MAX:
            continue
        try:
            with open_left_by_ranks(folder.root, "output", *name.split("/")) as stream:
                size = os.fstat(stream.fileno()).st_size
                left -= size
                if left < 0:
                    break  # the operator's limit for one attempt; the log of the agent has the names
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                stream.seek(0)
                broker.store_artifact(digest, stream, size)
        except (FileNotFoundError, RequestRefusedError):
            continue
        held[name] = digest
    return held


def _output_names(folder: AttemptFolder) -> list[str]:
    names = []
    root = folder.root / "output"
    for path, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        for file in sorted(files):
            name = (Path(path) / file).relative_to(root).as_posix()
            if name.isprintable() and len(name) <= OUTPUT_NAME_LENGTH_MAX:
                names.append(name)
        if len(names) > OUTPUTS_MAX * 10:
            break
    return sorted(names)
