# ruff: noqa: INP001, T201, D102, D105, D107 - a tenant's script, not a module of ours
"""A small byte-level language model, trained on the sources of Python's own standard library.

    python train.py                     # alone, on this machine
    hansa submit job.yaml               # on the market, on one site or across several

The two lines of Hansa are `with training.join(...)` and `session.batches()`; all else is an
ordinary PyTorch loop. Ranks of a site all-reduce through DDP as usual.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import training

# The knobs. At these values a step of 16 samples takes some 10 ms on one core.
WIDTH = 64  # of the residual stream
LAYERS = 2  # transformer blocks
HEADS = 4  # attention heads
CONTEXT = 64  # bytes that one sample has
LEARNING_RATE = 3e-3  # AdamW's; high, for a model so small
WEIGHT_DECAY = 0.01
SAMPLES_ALONE = 4800  # samples to train on when no attempt says how many
BATCH_ALONE = 16
CORPUS_BYTES = 4_000_000  # of the standard library's 13 MB
HELD_OUT_EVERY = 10  # each tenth file is held out
HELD_OUT_BATCH = 128  # samples in one evaluation
EVALUATE_ROUNDS = 5  # sync rounds between evaluations


class Block(nn.Module):
    """Attention and a feed-forward layer, each on a normalised residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm_feed = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm_attention(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        fed: torch.Tensor = self.feed(self.norm_feed(x))
        return x + fed


class ByteModel(nn.Module):
    """A GPT over bytes; called with inputs and targets it returns the mean loss in nats per byte."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.byte(x) + self.place.weight
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.view(-1, 256), y.reshape(-1))


class Bytes(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of CONTEXT bytes and their successors, side by side in one text."""

    def __init__(self, text: bytes) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.text[index * CONTEXT : (index + 1) * CONTEXT + 1].long()
        return window[:-1], window[1:]


def corpus() -> tuple[bytes, bytes]:
    """Return the text to train on and the held-out text: whole files, in an order that all sites share."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    files = sorted(path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))
    train, held_out = bytearray(), bytearray()
    for number, path in enumerate(files):
        if len(train) >= CORPUS_BYTES:
            break
        (held_out if number % HELD_OUT_EVERY == 0 else train).extend(path.read_bytes())
    return bytes(train), bytes(held_out)


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Bytes) -> float:
    """Return the mean loss on the same evenly spread held-out samples each time."""
    stride = max(1, len(held_out) // HELD_OUT_BATCH)
    windows = [held_out[index] for index in range(0, stride * HELD_OUT_BATCH, stride)]
    inputs, targets = (torch.stack(part) for part in zip(*windows, strict=True))
    device = next(model.parameters()).device
    return float(model(inputs.to(device), targets.to(device)))


def main() -> None:
    """Train until all samples of the job are done."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1234)  # the same first parameters at every site
    module = ByteModel().to(device)
    model = DistributedDataParallel(module) if dist.is_initialized() else module
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    train, held_out = map(Bytes, corpus())

    with training.join(model, optimizer, data=train, samples=SAMPLES_ALONE, batch=BATCH_ALONE) as session:
        losses = [held_out_loss(module, held_out)]
        session.report(held_out_loss=losses[0])
        evaluated = session.rounds
        for inputs, targets in session.batches():
            if session.rounds >= evaluated + EVALUATE_ROUNDS:
                evaluated = session.rounds
                session.report(held_out_loss=held_out_loss(module, held_out))
            loss = model(inputs.to(device), targets.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if session.step % 20 == 0:
                session.report(loss=loss.item())
        losses.append(held_out_loss(module, held_out))
        session.report(held_out_loss=losses[1])
        if session.rank == 0:
            parameters = sum(each.numel() for each in module.parameters())
            print(
                f"{parameters} parameters, {session.step} steps, held-out loss {losses[0]:.3f} -> {losses[1]:.3f} nats per byte"
            )


if __name__ == "__main__":
    main()
