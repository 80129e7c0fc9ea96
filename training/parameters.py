"""A model's parameters as fragments: reading them into host memory and writing them back.

The only file where names of parameters meet torch tensors. With `training.fragments` (what lies
where) and `training.outer_share` (what is done with it).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.codecs import Values
from training.errors import ModelError
from training.fragments import Fragment, partition


class Parameters:
    """The trainable parameters of a model, addressed by fragment."""

    def __init__(self, model: nn.Module, fragment_elements: int | None = None) -> None:
        """Cut the model into fragments. Raises ModelError where it has parameters that cannot be merged."""
        self.module: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._tensors = {name: each for name, each in self.module.named_parameters() if each.requires_grad}
        if not self._tensors:
            message = "the model has no parameter that requires a gradient; there is nothing to train"
            raise ModelError(message)
        for name, tensor in self._tensors.items():
            _check(name, tensor)
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

    def read(self, fragment: Fragment) -> Values:
        """Return a copy of the fragment's values as flat float32 in host memory."""
        return self._read(fragment, self._tensors)

    def read_gradients(self, fragment: Fragment) -> Values:
        """Return a copy of the fragment's gradients; zeros where a parameter has none."""
        return self._read(fragment, {name: each.grad for name, each in self._tensors.items()})

    def _read(self, fragment: Fragment, tensors: Mapping[str, torch.Tensor | None]) -> Values:
        values = np.zeros(fragment.elements, dtype=np.float32)
        offset = 0
        with torch.no_grad():
            for piece in fragment.pieces:
                length = piece.stop - piece.start
                tensor = tensors[piece.name]
                if tensor is not None:
                    part = tensor.detach().reshape(-1)[piece.start : piece.stop]
                    values[offset : offset + length] = part.to("cpu", torch.float32).numpy()
                offset += length
        return values

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
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        self._write(fragment, values, {name: each.grad for name, each in self._tensors.items()})

    def drop_gradients(self) -> None:
        """Leave the optimizer nothing to step on."""
        for tensor in self._tensors.values():
            tensor.grad = None

    def write(self, fragment: Fragment, values: Values) -> None:
        """Set the fragment's parameters to `values`, cast to each parameter's own type."""
        self._write(fragment, values, self._tensors)

    def _write(self, fragment: Fragment, values: Values, tensors: Mapping[str, torch.Tensor | None]) -> None:
        assert values.size == fragment.elements
        offset = 0
        with torch.no_grad():
            for piece in fragment.pieces:
                length = piece.stop - piece.start
                tensor = tensors[piece.name]
                assert tensor is not None, "write_gradients has made it"
                part = torch.from_numpy(values[offset : offset + length]).to(tensor.device, tensor.dtype)
                if tensor.is_contiguous():
                    tensor.view(-1)[piece.start : piece.stop].copy_(part)
                else:
                    flat = tensor.reshape(-1)
                    flat[piece.start : piece.stop] = part
                    tensor.copy_(flat.view(tensor.shape))
                offset += length

    def state(self, outer: dict[int, Values]) -> dict[str, torch.Tensor]:
        """Return the module's state_dict with `outer`, by fragment number, in place of its parameters.

        Tied parameters stand under each of their names, as `load_state_dict` wants them.
        """
        inner = {fragment.number: self.read(fragment) for fragment in self.fragments}
        try:
            for fragment in self.fragments:
                self.write(fragment, outer[fragment.number])
            state = {name: each.detach().to("cpu").clone() for name, each in self.module.state_dict().items()}
        finally:
            for fragment in self.fragments:
                self.write(fragment, inner[fragment.number])
        return state


def _check(name: str, tensor: torch.Tensor) -> None:
    if type(tensor).__name__ == "DTensor" or hasattr(tensor, "placements"):
        message = (
            f"parameter {name} is sharded (DTensor); the runtime merges whole parameters, so use DDP inside a site"
        )
        raise ModelError(message)
    if not tensor.is_floating_point():
        message = f"parameter {name} is {tensor.dtype}; only real floating point can be averaged between sites"
        raise ModelError(message)
