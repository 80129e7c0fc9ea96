"""The ranks of one site: the few collectives that the runtime needs, on host tensors.

A site with one rank has no process group, and every collective is the identity. Otherwise a Gloo
group of the session's own is used, also where the model's gradients go over NCCL. Only tensors
travel: documents go as JSON bytes, never as pickled objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Values = npt.NDArray[np.float32]
# What JSON knows; the runtime checks the shapes of its own documents where it reads them.
Json = dict[str, Any]


def group_timeout(patience_s: float) -> timedelta:
    """Return how long a collective may wait: longer than rank 0 may wait for the round log."""
    return timedelta(seconds=2 * patience_s + 30)


class Ranks:
    """This process's seat among the ranks of its site."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Use `group`, a Gloo group of all ranks of the site; None where there is one rank."""
        self._group = group
        self.rank = group.rank() if group else 0
        self.world = group.size() if group else 1

    @classmethod
    def of_process(cls, patience_s: float) -> Ranks:
        """Return the ranks of the default process group, over a Gloo group of their own."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        group = dist.new_group(backend="gloo", timeout=group_timeout(patience_s))
        return cls(cast("dist.ProcessGroup", group))

    def broadcast(self, values: npt.NDArray[Any], source: int) -> npt.NDArray[Any]:
        """Fill `values` with those of rank `source`, and return it. It must be writable and contiguous."""
        if self._group is not None:
            self._group.broadcast(torch.from_numpy(values), source).wait()
        return values

    def broadcast_json(self, document: Json | None) -> Json:
        """Return rank 0's document on every rank; the others pass None."""
        if self._group is None:
            assert document is not None
            return document
        encoded = np.frombuffer(json.dumps(document).encode(), dtype=np.uint8).copy() if self.rank == 0 else None
        length = np.array([0 if encoded is None else encoded.size], dtype=np.int64)
        self.broadcast(length, 0)
        received = np.zeros(int(length[0]), dtype=np.uint8) if encoded is None else encoded
        self.broadcast(received, 0)
        loaded = json.loads(received.tobytes())
        assert isinstance(loaded, dict)
        return loaded

    def gather(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Return every rank's `values`, in rank order, on every rank. All have the same shape."""
        if self._group is None:
            return [values]
        received = [torch.empty_like(torch.from_numpy(values)) for _ in range(self.world)]
        self._group.allgather([received], [torch.from_numpy(values)]).wait()
        return [tensor.numpy() for tensor in received]

    def combine(self, values: Values, at: int) -> Values:
        """Return on rank `at` the values of which each rank has a part, and zeros elsewhere; nothing on other ranks.

        Bit for bit, since whole numbers are added. `values` must be writable and is used up.
        """
        if self._group is None:
            return values
        self._group.reduce(torch.from_numpy(values).view(torch.int32), at).wait()
        return values if self.rank == at else values[:0]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return, for each flag, whether it is set on any rank."""
        gathered = self.gather(np.array(flags, dtype=np.uint8))
        return [bool(any(part[position] for part in gathered)) for position in range(len(flags))]

    def barrier(self) -> None:
        """Return when every rank has called this."""
        self.gather(np.zeros(1, dtype=np.uint8))
