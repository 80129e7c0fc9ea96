# ruff: noqa: INP001, T201, D102, D105, D107 - a tenant's script, not a module of ours
"""A small byte-level language model whose tensors are sharded over the GPUs of a site: FSDP2, tensor parallelism, or both.

    python train.py                                                         # alone, on one GPU or CPU
    torchrun --nproc-per-node 4 -m training.launch train.py --tensor 2      # alone, on a mesh of two times two
    hansa lab compare job.yaml --strategies diloco --sites 2 --ranks 4      # two sites of four ranks on this machine
    hansa submit job.yaml                                                   # on the market

The lines of Hansa are `import training`, `with training.join(...)` and `session.batches()`; all else is an ordinary PyTorch loop.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

import training

# The knobs. Heads, and so the most tensor-parallel ranks, are WIDTH / HEAD_WIDTH.
WIDTH = 64  # of the residual stream
HEAD_WIDTH = 16
LAYERS = 2  # transformer blocks
CONTEXT = 64  # bytes that one sample has
LEARNING_RATE = 3e-3  # AdamW's
SAMPLES_ALONE = 1600  # samples to train on when no attempt says how many
CORPUS_BYTES = 1_000_000  # of the standard library's 13 MB
HELD_OUT_BATCH = 64  # samples in one evaluation


class Block(nn.Module):
    """Attention and a feed-forward layer, each on a normalised residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm_feed = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        normed = self.norm_attention(x)
        # As many heads as this rank has: all of them, or its share under tensor parallelism.
        q, k, v = (
            each(normed).view(batch, length, -1, HEAD_WIDTH).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(batch, length, -1))
        fed: torch.Tensor = self.narrow(functional.gelu(self.widen(self.norm_feed(x))))
        return x + fed


class ByteModel(nn.Module):
    """A GPT over bytes; called with inputs and targets it returns the mean loss in nats per byte."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, WIDTH)
        self.place = nn.Parameter(torch.randn(CONTEXT, WIDTH) / 50)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.byte(x) + self.place
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).view(-1, 256), y.reshape(-1))


def shard(model: ByteModel, tensor: int, device: str) -> None:
    """Shard the model over this site's ranks: each block's layers over `tensor` ranks, the rest of the mesh by FSDP2."""
    mesh = init_device_mesh(device, (dist.get_world_size() // tensor, tensor), mesh_dim_names=("dp", "tp"))
    split = {name: ColwiseParallel() for name in ("query", "key", "value", "widen")}
    for block in model.blocks:
        if tensor > 1:
            parallelize_module(block, mesh["tp"], {**split, "mix": RowwiseParallel(), "narrow": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


class Bytes(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of CONTEXT bytes and their successors, side by side in one text."""

    def __init__(self, text: bytes) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.text[index * CONTEXT : (index + 1) * CONTEXT + 1].long()
        return window[:-1], window[1:]


def corpus() -> tuple[Bytes, Bytes]:
    """Return the text to train on and the held-out text, every tenth file; the same at all sites."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.glob("*.py"))
    parts = [b"".join(path.read_bytes() for path in chosen) for chosen in (_but_each_tenth(files), files[::10])]
    return Bytes(parts[0][:CORPUS_BYTES]), Bytes(parts[1])


def _but_each_tenth(files: list[Path]) -> list[Path]:
    return [path for number, path in enumerate(files) if number % 10]


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Bytes, device: str) -> float:
    """Return the mean loss on the same held-out samples each time. All ranks of a site call it together."""
    stride = len(held_out) // HELD_OUT_BATCH
    windows = [held_out[index] for index in range(0, stride * HELD_OUT_BATCH, stride)]
    inputs, targets = (torch.stack(part).to(device) for part in zip(*windows, strict=True))
    return float(model(inputs, targets))


def main() -> None:
    """Train until all samples of the job are done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks; FSDP2 takes what is left")
    tensor = parser.parse_args().tensor
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1234)  # the same first parameters at every site
    model = ByteModel().to(device)
    if dist.is_initialized():
        # A site with fewer ranks than the job would like shards over those it has.
        shard(model, tensor if dist.get_world_size() % tensor == 0 else 1, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    train, held_out = corpus()

    with training.join(model, optimizer, data=train, samples=SAMPLES_ALONE) as session:
        session.report(held_out_loss=held_out_loss(model, held_out, device))
        for inputs, targets in session.batches():
            loss = model(inputs.to(device), targets.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if session.step % 10 == 0:
                session.report(loss=loss.item())
        last = held_out_loss(model, held_out, device)
        session.report(held_out_loss=last)
        if session.rank == 0:
            held = sum(
                each.to_local().numel() if hasattr(each, "to_local") else each.numel() for each in model.parameters()
            )
            print(
                f"{session.step} steps on {os.environ.get('WORLD_SIZE', '1')} ranks, {held} elements here, held-out {last:.3f}"
            )


if __name__ == "__main__":
    main()
