"""Which ranks of a site take batches of their own: all, but for tensor parallelism, whose ranks share each batch.

Found out from the model (`find`), or from a mesh that the script names. `training.session` deals samples by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from training.errors import ModelError
from training.ranks import Ranks
from training.shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True, slots=True)
class DataSeat:
    """Number `rank` of the `world` seats of a site that take batches; `ranks_per_seat` ranks share each."""

    rank: int
    world: int
    ranks_per_seat: int = 1


def find(model: nn.Module, ranks: Ranks, data_mesh: DeviceMesh | None = None) -> DataSeat:
    """Return this rank's seat. A collective where the model is sharded, or a mesh is given.

    FSDP2 says which mesh it shards batches over. Without it, ranks that hold one parameter's shards together share batches.
    Raises ModelError where that is not the same number of ranks for every seat.
    """
    for module in fsdp_modules(model):
        module.reshard()
    meshes = list(_meshes(model))
    if data_mesh is None and not meshes:
        return DataSeat(ranks.rank, ranks.world)
    fully_sharded = [_mesh_of(module) for module in fsdp_modules(model)]
    batches = data_mesh or max(filter(None, fully_sharded), key=lambda mesh: mesh.size(), default=None)
    if batches is None:
        leaders = [int(each[0]) for each in ranks.gather(np.array([min(int(m.mesh.min()) for m in meshes)]))]
        seats = sorted(set(leaders))
        rank, world = seats.index(leaders[ranks.rank]), len(seats)
    else:
        place = batches.get_coordinate()
        assert place is not None, "a rank outside its own mesh"
        rank, world = int(np.ravel_multi_index(tuple(place), tuple(batches.shape))), batches.size()
    told = [tuple(map(int, each)) for each in ranks.gather(np.array([rank, world], dtype=np.int64))]
    if ranks.world % world or sorted(told) != sorted((seat % world, world) for seat in range(ranks.world)):
        message = (
            f"cannot tell which of this site's {ranks.world} ranks take batches of their own (found {told}); "
            "say so with training.join(…, data_mesh=mesh['dp'])"
        )
        raise ModelError(message)
    return DataSeat(rank, world, ranks.world // world)


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """Yield the modules that `fully_shard` was applied to."""
    for module in model.modules():
        # By name, since importing FSDP2 costs a rank that does not use it the better part of a second.
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            yield module  # type: ignore[misc]  # see above


def _meshes(model: nn.Module) -> Iterator[DeviceMesh]:
    for parameter in model.parameters():
        if is_sharded(parameter):
            yield parameter.device_mesh


def _mesh_of(module: FSDPModule) -> DeviceMesh | None:
    """Return the mesh over which FSDP2 averages a module's gradients; None where the module has no parameters of its own."""
    state = module._get_fsdp_state()  # noqa: SLF001 - torch has no public way to ask for it
    groups = getattr(state, "_fsdp_param_groups", None)
    group = groups[0] if groups else None if groups == [] else state._fsdp_param_group  # noqa: SLF001 - up to torch 2.12
    return None if group is None else group.mesh_info.mesh
