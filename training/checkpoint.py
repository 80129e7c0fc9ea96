"""Checkpoints and snapshots: a site's state as one safetensors file, written whole or not at all.

A checkpoint holds the outer state (theta, velocity, done samples), this site's carry, its
optimizer, its buffers and its random states. A snapshot is the outer state alone, for a peer that
joins. The model's inner parameters are not in it: right after a round they are the outer ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from training.attempt import NewestCheckpoint
from training.codecs import Values
from training.errors import CheckpointError, ModelError
from training.exchange import SampleRange
from training.fragments import Fragment
from training.parameters import Parameters
from training.roundlog.view import Hash

NEWEST: Final = "newest.json"
# The newest and the one before it, in case a reader holds the older file's name.
CHECKPOINTS_KEPT: Final = 2
_FORMAT: Final = "hansa-state-1"
_OUTER_PARTS: Final = ("theta", "velocity", "carry")
# The model's own parameters, where a site trains on while a round travels.
INNER: Final = "inner"
_OWN_ONLY: Final = frozenset({"carry", INNER})

Tensors = dict[str, torch.Tensor]
OuterParts = dict[str, dict[int, Values]]


class StateHeader(BaseModel):
    """The metadata of a state file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = Field(pattern=f"^{_FORMAT}$")
    site_id: str
    round_number: int = Field(ge=0)
    chain_hash: Hash
    outer_hash: Hash
    layout: Hash
    done: tuple[tuple[int, int], ...]
    inner_steps: int = Field(ge=0)
    optimizer_groups: str = "[]"
    python_random: str = ""
    # Of strategies whose state is more than theta and velocity, or that train on while a round travels: their
    # other arrays, the samples of the block under way, for joiners and for this site, how far it has come,
    # and the samples whose work waits in the carry.
    parts: tuple[str, ...] = Field(default=(), max_length=64)
    pending: tuple[tuple[int, int], ...] = ()
    block: tuple[tuple[int, int], ...] = ()
    owed: tuple[tuple[int, int], ...] = ()
    block_steps: int = Field(default=0, ge=0)
    complete_round: int = Field(default=0, ge=0)
    posted_bytes: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class State:
    """What a state file holds. `outer` maps theta, velocity and carry to values by fragment number."""

    header: StateHeader
    outer: dict[str, dict[int, Values]]
    optimizer: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    torch_random: tuple[torch.Tensor, ...] = ()

    @property
    def done(self) -> tuple[SampleRange, ...]:
        """The samples in the chain up to this state."""
        return ranges_of(self.header.done)


def shared_parts(outer: OuterParts) -> OuterParts:
    """Return the parts of an outer state that are every site's, without those that are one site's alone."""
    return {part: each for part, each in outer.items() if part not in _OWN_ONLY}


def for_joiners(state: State, *, gradients: bool) -> State:
    """Return what a joiner takes of `state`: its shared parts, and the optimizer where sites exchange `gradients`."""
    nothing_own: dict[str, Any] = {
        "python_random": "",
        "parts": tuple(part for part in state.header.parts if part not in _OWN_ONLY),
        "block": (),
        "block_steps": 0,
        "owed": (),
        "posted_bytes": 0,
    }
    if not gradients:
        nothing_own["optimizer_groups"] = "[]"
    header = state.header.model_copy(update=nothing_own)
    return State(header, shared_parts(state.outer), state.optimizer if gradients else {})


def ranges_of(pairs: Sequence[tuple[int, int]]) -> tuple[SampleRange, ...]:
    """Return what a header's pairs stand for."""
    return tuple(SampleRange(start, stop) for start, stop in pairs)


def pairs_of(ranges: Sequence[SampleRange]) -> tuple[tuple[int, int], ...]:
    """Return ranges as a header holds them."""
    return tuple((each.start, each.stop) for each in ranges)


def write_state(path: Path, state: State) -> None:
    """Write `state` to `path` atomically and durably."""
    tensors: Tensors = {}
    for part, fragments in state.outer.items():
        tensors |= {f"{part}/{number}": torch.from_numpy(values) for number, values in fragments.items()}
    tensors |= {f"optimizer/{name}": each for name, each in state.optimizer.items()}
    tensors |= {f"buffer/{name}": each for name, each in state.buffers.items()}
    tensors |= {f"random/{rank}": each for rank, each in enumerate(state.torch_random)}
    part_path = path.with_name(f".{path.name}.part")
    save_file(
        {name: each.contiguous() for name, each in tensors.items()},
        part_path,
        {"hansa": state.header.model_dump_json()},
    )
    _settle(part_path, path)


def read_state(path: Path, fragments: Sequence[Fragment], layout: str) -> State:
    """Return the state in `path`. Raises CheckpointError unless it is whole and of this model."""
    try:
        with safe_open(path, framework="pt") as file:
            header = StateHeader.model_validate_json((file.metadata() or {}).get("hansa", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    except (OSError, SafetensorError, ValidationError) as error:
        message = f"{path.name} cannot be read as a state file ({error}); start from an older checkpoint"
        raise CheckpointError(message) from error
    if header.layout != layout:
        message = f"{path.name} is the state of another model; the script's model must be the one that wrote it"
        raise CheckpointError(message)
    return State(
        header=header,
        outer={part: _outer_part(path, tensors, part, fragments) for part in (*_OUTER_PARTS, *header.parts)},
        optimizer=_under("optimizer/", tensors),
        buffers=_under("buffer/", tensors),
        torch_random=tuple(tensors[name] for name in _random_names(tensors)),
    )


def _outer_part(path: Path, tensors: Tensors, part: str, fragments: Sequence[Fragment]) -> dict[int, Values]:
    found: dict[int, Values] = {}
    for fragment in fragments:
        tensor = tensors.get(f"{part}/{fragment.number}")
        if tensor is None and part == "carry":
            continue
        whole = tensor is not None and tensor.dtype == torch.float32 and tensor.shape == (fragment.elements,)
        if tensor is None or not whole or not bool(torch.isfinite(tensor).all()):
            message = f"{path.name} lacks a sound {part} of fragment {fragment.number}; start from an older checkpoint"
            raise CheckpointError(message)
        found[fragment.number] = tensor.numpy()
    return found


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _random_names(tensors: Tensors) -> list[str]:
    names = [name for name in tensors if name.startswith("random/")]
    return sorted(names, key=lambda name: int(name.removeprefix("random/")))


def write_checkpoint(folder: Path, state: State, samples_done: int) -> NewestCheckpoint:
    """Write a checkpoint file, then `newest.json` that names it; remove those before the last two."""
    name = f"round-{state.header.round_number:06d}.safetensors"
    write_state(folder / name, state)
    newest = NewestCheckpoint(
        round_number=state.header.round_number,
        chain_hash=state.header.chain_hash,
        outer_hash=state.header.outer_hash,
        file=name,
        digest=_file_digest(folder / name),
        size_bytes=(folder / name).stat().st_size,
        samples_done=samples_done,
    )
    write_text(folder / NEWEST, newest.model_dump_json())
    for old in sorted(folder.glob("round-*.safetensors"))[:-CHECKPOINTS_KEPT]:
        old.unlink()
    return newest


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically and durably."""
    part_path = path.with_name(f".{path.name}.part")
    part_path.write_text(text)
    _settle(part_path, path)


def _settle(part_path: Path, path: Path) -> None:
    with part_path.open("rb") as file:
        os.fsync(file.fileno())
    part_path.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Parameters) -> tuple[Tensors, str]:
    """Return an optimizer's state as whole tensors named `index/key`, and the JSON of all that is no tensor.

    A collective where the model is sharded; the tensors are rank 0's, other ranks get none. Raises ModelError where it keeps
    something that neither tensors nor JSON can hold.
    """
    saved = optimizer.state_dict()
    tensors: Tensors = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in saved["state"].items():
        plain[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                whole = parameters.whole(f"the optimizer's {key}", value)
                if whole is not None:
                    tensors[f"{index}/{key}"] = whole
            else:
                plain[str(index)][key] = value
    groups = [
        {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in group.items()}
        for group in saved["param_groups"]
    ]
    try:
        return tensors, json.dumps({"state": plain, "groups": groups})
    except TypeError as error:
        message = f"{type(optimizer).__name__} keeps state that JSON cannot hold ({error}); use a torch.optim optimizer"
        raise ModelError(message) from error


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Parameters, tensors: Tensors, document: str
) -> None:
    """Give `optimizer` the state that `optimizer_state` returned, sharded as its parameters are now.

    Raises CheckpointError where it does not fit.
    """
    try:
        loaded = json.loads(document)
        state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in loaded["state"].items()}
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, tensor in tensors.items():
            index, _, key = name.partition("/")
            state[int(index)][key] = parameters.sharded_like(stepped[int(index)], tensor)
        groups = [
            {
                key: tuple(value) if isinstance(value, list) and key != "params" else value
                for key, value in group.items()
            }
            for group in loaded["groups"]
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, IndexError, TypeError, ValueError) as error:
        message = f"the checkpoint's optimizer state does not fit {type(optimizer).__name__} ({error})"
        raise CheckpointError(message) from error


def python_random_state() -> str:
    """Return the state of Python's own generator as JSON."""
    version, numbers, gauss = random.getstate()
    return json.dumps([version, list(numbers), gauss])


def restore_random(state: State, rank: int) -> None:
    """Set this rank's torch and Python generators as they were, where the checkpoint has them."""
    if rank < len(state.torch_random):
        torch.set_rng_state(state.torch_random[rank])
    if state.header.python_random:
        version, numbers, gauss = json.loads(state.header.python_random)
        random.setstate((version, tuple(numbers), gauss))


def torch_random_state() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return this rank's torch CPU generator state, for gathering."""
    state: np.ndarray[Any, np.dtype[np.uint8]] = torch.get_rng_state().numpy()
    return state
