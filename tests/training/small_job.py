"""A tiny job for sites that run as threads: a linear model, a plan, and a way to run it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.training.memory_log import MemoryExchange, MemoryLog
from training.attempt import AttemptContext
from training.exchange import MemberSeat
from training.ranks import Ranks
from training.session import Session
from training.spec import SyncPlan, Workload

SAMPLES = 96


class Points:
    """Noisy values of a fixed linear map, the same at every site."""

    def __init__(self, length: int = 512) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(length, 6, generator=generator)
        self.targets = self.inputs @ torch.randn(6, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]


def model() -> nn.Module:
    """Two layers from fixed first values, without the process's shared generator."""
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in module.parameters():
            each.copy_(torch.randn(each.shape, generator=generator) / 4)
    return module


def seats(*names: str, gpus: int = 1) -> list[MemberSeat]:
    return [MemberSeat(name, 1, gpus) for name in names]


def context(folder: Path, site_id: str, **plan: Any) -> AttemptContext:
    samples = plan.pop("samples", SAMPLES)
    resume_from, heir_of = plan.pop("resume_from", None), plan.pop("heir_of", None)
    record_dir = plan.pop("record_dir", None)
    for name in ("checkpoint", "output"):
        (folder / site_id / name).mkdir(parents=True, exist_ok=True)
    settings = {"strategy": "diloco", "codec": "fp32", "period_steps": 2, "checkpoint_rounds": 2, **plan}
    return AttemptContext(
        job_id="job",
        site_id=site_id,
        epoch=1,
        gpus=1,
        seed=5,
        workload=Workload(samples=samples, batch_per_gpu=4, parameters=83, flops_per_sample=1e3),
        sync=SyncPlan(**settings),
        ranks_socket="unused",
        checkpoint_dir=str(folder / site_id / "checkpoint"),
        output_dir=str(folder / site_id / "output"),
        resume_from=resume_from,
        heir_of=heir_of,
        record_dir=record_dir,
    )


def _nothing(session: Session) -> None:
    return None


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.02)


@dataclass
class Site:
    """One rank of one site, and what came out of it."""

    attempt: AttemptContext
    exchange: MemoryExchange
    ranks: Ranks
    module: nn.Module
    session: Session | None = None
    losses: list[float] | None = None
    error: BaseException | None = None
    step_hook: Callable[[Session], None] = _nothing
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = _adamw
    fragment_elements: int = 32

    def run(self) -> None:
        try:
            self._train()
        except BaseException as error:  # noqa: BLE001 - the thread that joins raises it
            self.error = error

    def _train(self) -> None:
        optimizer = self.optimizer(self.module)
        self.session = Session(
            self.module,
            optimizer,
            Points(),
            ranks=self.ranks,
            context=self.attempt,
            exchange=self.exchange,
            fragment_elements=self.fragment_elements,
        )
        self.losses = []
        with self.session as session:
            for inputs, targets in session.batches():
                self.step_hook(session)
                loss = torch.nn.functional.mse_loss(self.module(inputs), targets)
                loss.backward()
                if self.ranks.world > 1:
                    for each in self.module.parameters():
                        each.grad = torch.from_numpy(
                            np.mean(self.ranks.gather(each.grad.numpy().copy()), axis=0, dtype=np.float32)
                        )
                optimizer.step()
                optimizer.zero_grad()
                self.losses.append(loss.item())


def site(log: MemoryLog, folder: Path, name: str, ranks: Ranks | None = None, **plan: Any) -> Site:
    return Site(context(folder, name, **plan), log.exchange(name), ranks or Ranks(), model())


def run(*sites: Site) -> None:
    """Run every site as a thread to its end, and raise the first error."""
    threads = [threading.Thread(target=each.run, daemon=True) for each in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a site never came to its end"
    for each in sites:
        if each.error is not None:
            raise each.error
