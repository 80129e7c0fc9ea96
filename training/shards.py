"""Which elements of a sharded parameter this rank holds: FSDP2's and tensor parallelism's DTensors, seen from outside.

Fragments number the elements of the whole, row-major parameter (`training.fragments`); a rank holds some coordinates along each
axis of it. `training.parameters` reads and writes through this. Whatever shards a parameter (one mesh axis or two, uneven, strided)
is asked of torch itself, by sharding the numbers 0, 1, 2, … of each axis in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from training.errors import ModelError
from training.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

Numbers = npt.NDArray[np.int64]
Selection = slice | Numbers


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Return whether `tensor` is a DTensor. Does not import them, which costs a rank without any the better part of a second."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of one tensor: its coordinates along each axis, ascending.

    Of ranks that hold the same elements one `speaks` for them; all of them write.
    """

    shape: tuple[int, ...]
    coordinates: tuple[Numbers, ...]
    speaks: bool

    @property
    def elements(self) -> int:
        """The number of elements that this rank holds."""
        return int(np.prod([each.size for each in self.coordinates]))

    def overlap(self, start: int, stop: int) -> tuple[Selection, Selection]:
        """Return where the held ones among elements `start` to `stop` - 1 stand: in the flat local tensor, and after `start`."""
        rows, inner = self.coordinates[0], self._inner()
        row_elements = int(np.prod(self.shape[1:]))
        first, last = np.searchsorted(rows, [start // row_elements, (stop - 1) // row_elements + 1])
        if first == last or not inner.size:
            return slice(0, 0), slice(0, 0)
        if inner.size == row_elements and rows[-1] - rows[0] + 1 == rows.size:
            # Whole rows side by side, as FSDP2 shards: no need to number every element.
            base = int(rows[0]) * row_elements
            low, high = max(start, int(rows[first]) * row_elements), min(stop, (int(rows[last - 1]) + 1) * row_elements)
            return slice(low - base, high - base), slice(low - start, high - start)
        numbers = (rows[first:last, None] * row_elements + inner[None, :]).reshape(-1)
        inside = np.flatnonzero((numbers >= start) & (numbers < stop))
        return inside + int(first) * inner.size, numbers[inside] - start

    def _inner(self) -> Numbers:
        """Return the place within a whole row of each held element of one."""
        inner = np.zeros(1, dtype=np.int64)
        for length, held in zip(self.shape[1:], self.coordinates[1:], strict=True):
            inner = (inner[:, None] * length + held[None, :]).reshape(-1)
        return inner


class Shards:
    """The shards of a model's tensors at this rank."""

    def __init__(self, ranks: Ranks) -> None:
        """Agree with the other `ranks` of the site on who speaks for what."""
        self._ranks = ranks
        self._known: dict[Any, Shard] = {}

    def of(self, name: str, tensor: DTensor) -> Shard:
        """Return this rank's shard of `tensor`. A collective when a tensor of its kind comes first, alike on every rank.

        Raises ModelError where the ranks of the site do not hold each element of it, or hold partial sums.
        """
        kind = (tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape))
        if kind not in self._known:
            self._known[kind] = self._agreed(name, tensor)
        return self._known[kind]

    def _agreed(self, name: str, tensor: DTensor) -> Shard:
        mesh, shape = tensor.device_mesh, tuple(tensor.shape) or (1,)
        if any(each.is_partial() for each in tensor.placements):
            message = (
                f"{name} is a partial sum on each rank ({tensor.placements}); redistribute it before training.join"
            )
            raise ModelError(message)
        # With tensor parallelism and FSDP2, a layer norm is sharded over each column of the mesh for itself: the
        # column of the lowest rank speaks. Along a replicated mesh axis the first does.
        leaders = self._ranks.gather(np.array([int(mesh.mesh.min())], dtype=np.int64))
        place = mesh.get_coordinate()
        assert place is not None, "a rank has a DTensor on a mesh that it is not in"
        is_first = all(not each.is_replicate() or at == 0 for each, at in zip(tensor.placements, place, strict=True))
        speaks = is_first and int(mesh.mesh.min()) == min(int(each[0]) for each in leaders)
        shard = Shard(shape, _coordinates(tensor), speaks)
        local = tensor.to_local().numel()
        spoken = sum(int(each[0]) for each in self._ranks.gather(np.array([shard.elements * speaks], dtype=np.int64)))
        if local != shard.elements or spoken != tensor.numel():
            message = (
                f"the ranks of this site hold {spoken} of the {tensor.numel()} elements of {name}, this one {local} and not "
                f"{shard.elements}; its mesh must span the site's ranks"
            )
            raise ModelError(message)
        return shard


def _coordinates(tensor: DTensor) -> tuple[Numbers, ...]:
    from torch.distributed.tensor import Replicate, distribute_tensor  # noqa: PLC0415 - see is_sharded

    found = []
    for axis, length in enumerate(tensor.shape):
        along = [_on_first_axis(each) if _shards(each, axis) else Replicate() for each in tensor.placements]
        numbers = distribute_tensor(torch.arange(length), tensor.device_mesh, along, src_data_rank=None).to_local()
        held: Numbers = numbers.to("cpu").numpy()
        assert bool((np.diff(held) > 0).all()), f"{tensor.placements} does not keep the order along axis {axis}"
        found.append(held)
    return tuple(found) or (np.zeros(1, dtype=np.int64),)


def _shards(placement: Placement, axis: int) -> bool:
    return not placement.is_replicate() and getattr(placement, "dim", None) == axis


def _on_first_axis(placement: Placement) -> Placement:
    """Return the same way of sharding for a tensor of one axis; FSDP2 over tensor parallelism shards in strides."""
    kind: Any = type(placement)
    factor = getattr(placement, "split_factor", None)
    placed: Placement = kind(0) if factor is None else kind(0, split_factor=factor)
    return placed


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor; writing to it writes to the tensor."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor.detach()


def like(parameter: DTensor, shard: Shard, whole: torch.Tensor) -> DTensor:
    """Return `whole` sharded as `parameter` is, without communication."""
    flat, local = whole.reshape(-1), local_of(parameter)
    mine = torch.empty(local.numel(), dtype=whole.dtype, device=local.device)
    if mine.numel():
        held, places = shard.overlap(0, flat.numel())
        mine[index(held)] = flat[index(places)].to(local.device)
    return type(parameter).from_local(
        mine.view(local.shape),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def index(selection: Selection) -> slice | torch.Tensor:
    """Return a selection as torch takes it."""
    return selection if isinstance(selection, slice) else torch.from_numpy(selection)
