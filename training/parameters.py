"""A model's parameters as fragments: reading them into host memory and writing them back.

The only file where names of parameters meet torch tensors. With `training.fragments` (what lies
where), `training.shards` (which of it this rank holds) and `training.outer_share` (what is done with it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.codecs import Values
from training.data_seat import fsdp_modules
from training.errors import ModelError
from training.fragments import Fragment, partition
from training.ranks import Ranks
from training.shards import Shard, Shards, index, is_sharded, like, local_of

# Of a tensor that is made whole, what travels at once: 16 MiB of float32, as a fragment.
_WHOLE_AT_ONCE: Final = 1 << 22
_NOTHING: Final = np.empty(0, dtype=np.float32)


class Parameters:
    """The trainable parameters of a model, addressed by fragment.

    Where they are sharded over the ranks of the site (FSDP2, tensor parallelism), reading is a collective: all ranks read the
    same fragments in the same order, and one gets the values.
    """

    def __init__(self, model: nn.Module, fragment_elements: int | None = None, ranks: Ranks | None = None) -> None:
        """Cut the model into fragments. Raises ModelError where it has parameters that cannot be merged."""
        self.module: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._ranks = ranks or Ranks()
        self._fsdp_modules = list(fsdp_modules(self.module))
        self._reshard()
        self._tensors = {name: each for name, each in self.module.named_parameters() if each.requires_grad}
        if not self._tensors:
            message = "the model has no parameter that requires a gradient; there is nothing to train"
            raise ModelError(message)
        self._shards = Shards(self._ranks)
        for name, tensor in self._tensors.items():
            _check(name, tensor)
            self._shard(name, tensor)
        sizes = [(name, tensor.numel()) for name, tensor in self._tensors.items() if tensor.numel()]
        embeddings = {
            f"{name}.weight".removeprefix(".")
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        self.fragments: tuple[Fragment, ...] = partition(sizes, fragment_elements, embeddings)

    @property
    def elements(self) -> int:
        """The number of trainable elements."""
        return sum(fragment.elements for fragment in self.fragments)

    def read(self, fragment: Fragment, at: int = 0) -> Values:
        """Return a copy of the fragment's values as flat float32 in host memory on rank `at`, nothing on others.

        A collective where the fragment has sharded parameters; without any, each rank has the values at hand.
        """
        return self._read(fragment, at, self._tensors)

    def read_gradients(self, fragment: Fragment, at: int = 0) -> Values:
        """Return a copy of the fragment's gradients, as `read` does; zeros where a parameter has none."""
        return self._read(fragment, at, {name: self._gradient(each) for name, each in self._tensors.items()})

    def _read(self, fragment: Fragment, at: int, tensors: Mapping[str, torch.Tensor | None]) -> Values:
        self._reshard()
        sharded = any(is_sharded(self._tensors[piece.name]) for piece in fragment.pieces)
        if not sharded and self._ranks.rank != at:
            return _NOTHING
        values = np.zeros(fragment.elements, dtype=np.float32)
        offset = 0
        for piece in fragment.pieces:
            length = piece.stop - piece.start
            tensor = tensors[piece.name]
            if tensor is not None:
                self._put(values[offset : offset + length], piece.name, tensor, piece.start, at)
            offset += length
        return self._ranks.combine(values, at) if sharded else values

    def _put(self, values: Values, name: str, tensor: torch.Tensor, start: int, at: int) -> None:
        """Write those elements from `start` on for which this rank speaks to their places in `values`."""
        flat = local_of(tensor).reshape(-1)
        shard = self._shard(name, tensor)
        if shard is None:
            if self._ranks.rank == at:
                values[:] = flat[start : start + values.size].to("cpu", torch.float32).numpy()
        elif shard.speaks:
            held, places = shard.overlap(start, start + values.size)
            values[places] = flat[index(held)].to("cpu", torch.float32).numpy()

    def _shard(self, name: str, tensor: torch.Tensor) -> Shard | None:
        return self._shards.of(name, tensor) if is_sharded(tensor) else None

    def _gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return a parameter's gradient, sharded as the parameter is."""
        gradient = parameter.grad
        if gradient is None or not is_sharded(parameter) or not is_sharded(gradient):
            return gradient
        if gradient.placements == parameter.placements:
            return gradient
        return gradient.redistribute(placements=parameter.placements)

    def _reshard(self) -> None:
        """Make FSDP2 forget what it gathered in a forward pass without a backward one: it would not see what is written."""
        for module in self._fsdp_modules:
            module.reshard()

    def shapes(self, fragment: Fragment) -> tuple[tuple[int, int], ...]:
        """Return rows and columns of each piece: of a whole parameter its own, with all but the last axis as rows."""
        found = []
        for piece in fragment.pieces:
            tensor, length = self._tensors[piece.name], piece.stop - piece.start
            columns = tensor.shape[-1] if tensor.dim() > 1 else length
            whole = length % columns == 0 and piece.start % columns == 0
            found.append((length // columns, columns) if whole else (1, length))
        return tuple(found)

    def write_gradients(self, fragment: Fragment, values: Values) -> None:
        """Set the fragment's gradients, also of parameters that had none."""
        for piece in fragment.pieces:
            tensor = self._tensors[piece.name]
            gradient = self._gradient(tensor)
            tensor.grad = torch.zeros_like(tensor) if gradient is None else gradient
        self._write(fragment, values, {name: each.grad for name, each in self._tensors.items()})

    def drop_gradients(self) -> None:
        """Leave the optimizer nothing to step on."""
        for tensor in self._tensors.values():
            tensor.grad = None

    def write(self, fragment: Fragment, values: Values) -> None:
        """Set what this rank holds of the fragment's parameters to `values`, cast to each parameter's own type."""
        self._write(fragment, values, self._tensors)

    def _write(self, fragment: Fragment, values: Values, tensors: Mapping[str, torch.Tensor | None]) -> None:
        assert values.size == fragment.elements
        self._reshard()
        offset = 0
        with torch.no_grad():
            for piece in fragment.pieces:
                length = piece.stop - piece.start
                tensor = tensors[piece.name]
                assert tensor is not None, "write_gradients has made it"
                part = values[offset : offset + length]
                shard = self._shard(piece.name, tensor)
                if shard is None:
                    _overwrite(tensor, slice(piece.start, piece.stop), part)
                else:
                    held, places = shard.overlap(piece.start, piece.stop)
                    _overwrite(local_of(tensor), index(held), np.ascontiguousarray(part[places]))
                offset += length

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a whole copy of `tensor` in host memory on rank 0, None on others. A collective where it is sharded.

        Sharded values of other types than float32 go through float32, as parameters do.
        """
        if not is_sharded(tensor):
            return tensor.detach().to("cpu").clone() if self._ranks.rank == 0 else None
        elements = tensor.numel()
        found = torch.empty(elements, dtype=tensor.dtype) if self._ranks.rank == 0 else None
        for start in range(0, elements, _WHOLE_AT_ONCE):
            part = np.zeros(min(_WHOLE_AT_ONCE, elements - start), dtype=np.float32)
            self._put(part, name, tensor, start, 0)
            part = self._ranks.combine(part, 0)
            if found is not None:
                found[start : start + part.size] = torch.from_numpy(part).to(found.dtype)
        return None if found is None else found.view(tensor.shape)

    def sharded_like(self, parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Return a `whole` tensor of a parameter's shape sharded as the parameter is; any other as it stands."""
        if not is_sharded(parameter) or whole.shape != parameter.shape:
            return whole
        return like(parameter, self._shards.of("the optimizer's state", parameter), whole)

    def state(self, outer: Iterable[tuple[int, Values]]) -> dict[str, torch.Tensor]:
        """Return the module's state_dict with `outer`, by fragment number, in place of its parameters, on rank 0.

        Tied parameters stand under each of their names, as `load_state_dict` wants them. Empty on other ranks.
        A collective.
        """
        self._reshard()
        inner = {name: local_of(each).to("cpu", copy=True) for name, each in self._tensors.items()}
        try:
            for number, values in outer:
                self.write(self.fragments[number], values)
            found = {name: self.whole(name, each) for name, each in self.module.state_dict().items()}
        finally:
            self._reshard()
            with torch.no_grad():
                for name, each in inner.items():
                    local_of(self._tensors[name]).copy_(each)
        return {name: each for name, each in found.items() if each is not None}


def _overwrite(tensor: torch.Tensor, selection: slice | torch.Tensor, values: Values) -> None:
    part = torch.from_numpy(values).to(tensor.device, tensor.dtype)
    if tensor.is_contiguous():
        tensor.view(-1)[selection] = part
    else:
        flat = tensor.reshape(-1)
        flat[selection] = part
        tensor.copy_(flat.view(tensor.shape))


def _check(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        message = f"parameter {name} is {tensor.dtype}; only real floating point can be averaged between sites"
        raise ModelError(message)
