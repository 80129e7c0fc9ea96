"""A tenant's script: a small model, trained at a steady pace so that a kill can hit it in the middle."""

from __future__ import annotations

import os
import threading

import torch
from torch import nn
from torch.nn import functional

import training

STEP_S = float(os.environ["STEP_S"])


class Points(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Values of a fixed linear map, the same at every site."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(512, 6, generator=generator)
        self.targets = self.inputs @ torch.randn(6, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]


def main() -> None:
    """Train until all samples of the job are done."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pace = threading.Event()
    with training.join(model, optimizer, data=Points()) as session:
        for inputs, targets in session.batches():
            pace.wait(STEP_S)
            loss = functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.report(loss=loss.item())


if __name__ == "__main__":
    main()
