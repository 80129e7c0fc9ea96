"""How files come in pieces, whoever brings them: where a piece begins, and how much is held after it."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, Field

from broker.artifacts import Progress
from sites.protocol import ArtifactState

OFFSET_MAX: Final = 2**62


class ChunkQuery(BaseModel):
    """Where a chunk of an artifact begins, and how large the whole is."""

    offset: int = Field(ge=0, le=OFFSET_MAX)
    size: int = Field(ge=0, le=OFFSET_MAX)


def artifact_state(digest: str, size_bytes: int, progress: Progress) -> ArtifactState:
    """Return what an uploader is told."""
    return ArtifactState(
        digest=digest, size_bytes=size_bytes, held_bytes=progress.held_bytes, complete=progress.complete
    )
