"""What a replay of a run starts from: the outer state before its first round, and how its fragments lie in the model.

    START/
      layout.json           Layout: which elements of which parameters each fragment has
      outer.safetensors     a state file (`training.checkpoint`) without what is one site's alone

`training.synchronizer` writes it where the attempt says so; `training.lab.replay` reads it, without the model's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.checkpoint import State, for_joiners, read_state, write_state, write_text
from training.errors import CheckpointError
from training.fragments import FRAGMENTS_MAX, Fragment, Piece, layout_digest

LAYOUT: Final = "layout.json"
OUTER: Final = "outer.safetensors"
_LAYOUT_BYTES_MAX: Final = 1 << 26
_PIECES_MAX: Final = 100_000


class PieceRow(BaseModel):
    """Elements `start` to `stop` - 1 of a flattened parameter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=1000)
    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    embedding: bool = False


class Layout(BaseModel):
    """The fragments of a model, in the order of their numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fragments: tuple[tuple[PieceRow, ...], ...] = Field(min_length=1, max_length=FRAGMENTS_MAX)


def write_start(folder: Path, fragments: Sequence[Fragment], state: State) -> None:
    """Write what a replay starts from, unless an earlier start of the same run is there."""
    if (folder / LAYOUT).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = tuple(
        tuple(
            PieceRow(name=each.name, start=each.start, stop=each.stop, embedding=each.embedding)
            for each in fragment.pieces
        )
        for fragment in fragments
    )
    write_state(folder / OUTER, for_joiners(state, gradients=False))
    write_text(folder / LAYOUT, Layout(fragments=rows).model_dump_json())


def read_start(folder: Path) -> tuple[tuple[Fragment, ...], State]:
    """Return the fragments and the outer state that `write_start` wrote. Raises CheckpointError where they are not whole."""
    path = folder / LAYOUT
    try:
        if path.stat().st_size > _LAYOUT_BYTES_MAX:
            raise CheckpointError(f"{path.name} exceeds {_LAYOUT_BYTES_MAX} bytes; no run wrote it")
        layout = Layout.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        message = f"{path.name} of the run's start cannot be read ({error}); without it there is nothing to replay from"
        raise CheckpointError(message) from error
    if sum(map(len, layout.fragments)) > _PIECES_MAX or not all(layout.fragments):
        raise CheckpointError(f"{path.name} has empty fragments or more than {_PIECES_MAX} pieces; no run wrote it")
    fragments = tuple(
        Fragment(number, tuple(Piece(each.name, each.start, each.stop, each.embedding) for each in rows))
        for number, rows in enumerate(layout.fragments)
    )
    return fragments, read_state(folder / OUTER, fragments, layout_digest(fragments))
