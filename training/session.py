"""The session: what a training script sees of all this, and what `training.join` returns.

Alone (no attempt around the process) it iterates over the data once. Under an attempt it deals this
site's samples, counts the steps, and between two blocks lets `training.synchronizer` run a round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, default_collate

from training import data_seat, dealing
from training.attempt import AttemptContext, current_attempt
from training.checkpoint import write_text
from training.clock import Clock, SystemClock
from training.errors import ModelError
from training.exchange import Exchange, SampleRange
from training.flight import RoundFigures
from training.metrics import Metrics
from training.outer_share import OuterShare
from training.parameters import Parameters
from training.ranks import Ranks
from training.roundlog.client import GatewayClient
from training.strategies import strategy_of
from training.synchronizer import Synchronizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BATCH_ALONE: Final = 16
_DDP_DIRECTIONS: Final = 2
_FP32_BYTES: Final = 4


class Dataset(Protocol):
    """Anything with a length and items by index, such as a map-style torch dataset or a list."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def __getitem__(self, index: int, /) -> object:
        """Return one item."""
        ...


Collate = Callable[[list[Any]], Any]


@dataclass(slots=True)
class _Totals:
    """What the summary at the end is made of."""

    rounds: int = 0
    rounds_missed: int = 0
    bytes_posted: int = 0
    bytes_fetched: int = 0
    train_s: float = 0.0
    sync_s: float = 0.0
    first_held_out_loss: float | None = None
    last_held_out_loss: float | None = None


def join(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    data: Dataset | DataLoader[Any] | None = None,
    samples: int | None = None,
    batch: int | None = None,
    collate: Collate | None = None,
    data_mesh: DeviceMesh | None = None,
) -> Session:
    """Join the job that this process is a rank of; alone, train on `data` as it is.

    `model` may be wrapped in DDP, sharded by FSDP2 (`fully_shard`), by tensor parallelism (`parallelize_module`) or by both.
    `data_mesh` names the ranks that take batches of their own, where the model does not show them. `data` is a map-style dataset, or a DataLoader whose dataset and
    collate function are taken; without it, batches are lists of sample numbers. `samples` and
    `batch` count only alone: one pass over the data, 16 a step. Under an attempt the job's workload
    states both.

    Raises ModelError where the model cannot be synchronised, ExchangeError after the job's patience.
    """
    dataset = cast("Dataset | None", data.dataset if isinstance(data, DataLoader) else data)
    if isinstance(data, DataLoader):
        collate = collate or data.collate_fn
    context = current_attempt()
    if context is None:
        plan = _AlonePlan(samples=samples, batch=batch or BATCH_ALONE)
        return Session(model, optimizer, dataset, collate, ranks=_ranks_alone(), alone=plan, data_mesh=data_mesh)
    ranks = Ranks.of_process(context.sync.patience_s)
    exchange = GatewayClient(context.ranks_socket, context.sync.patience_s)
    return Session(
        model, optimizer, dataset, collate, ranks=ranks, context=context, exchange=exchange, data_mesh=data_mesh
    )


@dataclass(frozen=True, slots=True)
class _AlonePlan:
    samples: int | None
    batch: int


def _ranks_alone() -> Ranks:
    # The patience matters to collectives only, of which a session alone makes none.
    return Ranks.of_process(60.0) if dist.is_available() else Ranks()


class Session:
    """One script's part in a job. Use it as a context manager, and train on `batches()`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Dataset | None,
        collate: Collate | None = None,
        *,
        ranks: Ranks,
        context: AttemptContext | None = None,
        exchange: Exchange | None = None,
        alone: _AlonePlan | None = None,
        clock: Clock | None = None,
        fragment_elements: int | None = None,
        data_mesh: DeviceMesh | None = None,
    ) -> None:
        """Prefer `training.join`, which finds out the rest from the process's environment."""
        self._data = data
        self._collate: Collate = collate or (default_collate if data is not None else list)
        self._ranks = ranks
        self._seat = data_seat.find(model, ranks, data_mesh)
        self._context = context
        self._exchange = exchange
        self._alone = alone or _AlonePlan(samples=None, batch=BATCH_ALONE)
        self._clock = clock or SystemClock()
        self._totals = _Totals()
        self._samples_alone = 0
        self._steps_alone = 0
        self._last: dict[str, float] = {}
        self.metrics = Metrics(context.site_id if context is not None else "")
        self._synchronizer: Synchronizer | None = None
        if context is not None:
            assert exchange is not None, "an attempt has a round log"
            self._parameters = Parameters(model, fragment_elements, ranks)
            share = OuterShare(
                self._parameters,
                ranks,
                strategy_of(context.sync, context.site_id, context.links),
                total_samples=context.workload.samples,
                merges=context.sync.strategy != "local",
                key=f"{context.seed} {context.site_id}",
            )
            self._synchronizer = Synchronizer(context, share, ranks, exchange, optimizer, clock=self._clock)

    # What a script may ask.

    @property
    def rank(self) -> int:
        """This process's rank in its site."""
        return self._ranks.rank

    @property
    def step(self) -> int:
        """The inner steps that this site has taken, over all attempts that it resumed."""
        return self._steps_alone if self._synchronizer is None else self._synchronizer.inner_steps

    @property
    def rounds(self) -> int:
        """The number of the last applied sync round; 0 at the start and alone."""
        return 0 if self._synchronizer is None else self._synchronizer.share.round_number

    @property
    def samples_done(self) -> int:
        """The samples of the job that are in its chain, of all sites; alone, those yielded."""
        if self._synchronizer is None:
            return self._samples_alone
        return dealing.count(self._synchronizer.share.done)

    @property
    def outer_hash(self) -> str:
        """The hash of the outer state after the last applied round; empty alone."""
        return "" if self._synchronizer is None else self._synchronizer.outer_hash

    # The loop.

    def __enter__(self) -> Self:
        """Take the site's place in the job: from its start, a checkpoint or a peer's snapshot."""
        if self._synchronizer is not None:
            self._synchronizer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After a clean end write the model, the summary and a last checkpoint. A collective."""
        if kind is None and self._synchronizer is not None:
            self._finish(self._synchronizer)

    def batches(self) -> Iterator[Any]:
        """Yield this rank's batches until every sample of the job is done, taking one step for each.

        The loop's body makes the optimizer's step. Between two blocks of `period_steps` steps the
        sites' work is merged, which changes the model's parameters in place.
        """
        if self._synchronizer is None:
            yield from self._batches_alone()
            return
        assert self._context is not None
        synchronizer = self._synchronizer
        while (block := synchronizer.block()) is not None:
            started_s, before, behind = self._clock.monotonic_s(), synchronizer.inner_steps, synchronizer.block_steps
            for numbers in islice(self._steps(block, self._context.workload.batch_per_gpu), behind, None):
                synchronizer.before_batch()
                yield self._batch(numbers, self._context.seed)
                synchronizer.stepped()
            synchronizer.finish(block)
            elapsed_s = self._clock.monotonic_s() - started_s
            self._account(block, synchronizer.drain(), synchronizer.inner_steps - before, elapsed_s)
        self._account((), synchronizer.drain(), 0, 0.0)

    def _batches_alone(self) -> Iterator[Any]:
        total = self._alone.samples
        if total is None:
            if self._data is None:
                message = "alone and without data, say how much there is to do: training.join(…, samples=1000)"
                raise ModelError(message)
            total = len(self._data)
        block = (SampleRange(0, total),) if total > 0 else ()
        for numbers in self._steps(block, self._alone.batch):
            yield self._batch(numbers, 0)
            self._steps_alone += 1
            self._samples_alone = min(total, self._samples_alone + self._alone.batch * self._ranks.world)

    def _steps(self, block: Sequence[SampleRange], batch: int) -> Iterator[list[int]]:
        # Ranks that share a batch take one as large as all of theirs, so that a step has the same samples on any mesh.
        seat = self._seat
        return dealing.steps(tuple(block), batch_per_gpu=batch * seat.ranks_per_seat, rank=seat.rank, world=seat.world)

    def _batch(self, numbers: list[int], seed: int) -> object:
        if self._data is None:
            return self._collate(numbers)
        data = self._data
        return self._collate([data[index] for index in dealing.items(numbers, length=len(data), seed=seed)])

    # What is measured.

    def report(self, **measurements: float) -> None:
        """Add `loss=…`, `held_out_loss=…` or figures of your own to the job's metrics.

        Every rank may call it; rank 0's counts. Step, samples and rates are added.
        """
        held_out = measurements.get("held_out_loss")
        if held_out is not None:
            if self._totals.first_held_out_loss is None:
                self._totals.first_held_out_loss = float(held_out)
            self._totals.last_held_out_loss = float(held_out)
        if self._exchange is not None and self._ranks.rank == 0:
            own = {name: float(value) for name, value in measurements.items()}
            progress = {"step": self.step, "round": self.rounds, "samples_done": self.samples_done}
            self._exchange.report({**progress, **self._last, **own})

    def _account(
        self, block: Sequence[SampleRange], rounds: Sequence[RoundFigures], steps: int, elapsed_s: float
    ) -> None:
        assert self._context is not None
        totals = self._totals
        stall_s = sum(figures.stall_s for figures in rounds)
        trained_s = max(0.0, elapsed_s - stall_s)
        totals.train_s += trained_s
        totals.sync_s += stall_s
        for figures in rounds:
            totals.rounds += 1
            totals.rounds_missed += not figures.counted
            totals.bytes_posted += figures.bytes_posted
            totals.bytes_fetched += figures.bytes_fetched
            self.metrics.add(figures)
        self._last = {
            "step_s": trained_s / steps if steps else 0.0,
            "sync_s": stall_s,
            "samples_per_s": dealing.count(block) / elapsed_s if elapsed_s > 0 else 0.0,
        }
        for figures in rounds:
            self.report(
                bytes_posted=figures.bytes_posted,
                bytes_fetched=figures.bytes_fetched,
                sites_merged=figures.sites_merged,
                missed=float(not figures.counted),
                **self.metrics.row(),
            )

    # The end.

    def _finish(self, synchronizer: Synchronizer) -> None:
        assert self._context is not None
        synchronizer.save()
        residual = synchronizer.share.carry_norm()
        state = self._parameters.state(synchronizer.share.final())
        if self._ranks.rank == 0:
            folder = Path(self._context.output_dir)
            part = folder / ".model.safetensors.part"
            save_file(state, part)
            part.replace(folder / "model.safetensors")
            write_text(folder / "summary.json", json.dumps(self._summary(synchronizer, residual), indent=2) + "\n")
        self._ranks.barrier()

    def _summary(self, synchronizer: Synchronizer, residual: float) -> dict[str, Any]:
        assert self._context is not None
        steps, elements, totals = synchronizer.inner_steps, self._parameters.elements, self._totals
        return {
            "site": self._context.site_id,
            "complete": self.samples_done >= self._context.workload.samples,
            "samples": self.samples_done,
            "rounds": self.rounds,
            "rounds_missed": totals.rounds_missed,
            "inner_steps": steps,
            "parameters": elements,
            "first_held_out_loss": totals.first_held_out_loss,
            "last_held_out_loss": totals.last_held_out_loss,
            "outer_hash": self.outer_hash,
            "codec": self._context.sync.codec,
            "strategy": self._context.sync.strategy,
            "bytes_posted": totals.bytes_posted,
            "bytes_fetched": totals.bytes_fetched,
            "fp32_bytes_if_ddp": steps * elements * _FP32_BYTES * _DDP_DIRECTIONS,
            "fp32_bytes_if_ddp_formula": "inner_steps x parameters x 4 bytes x 2 directions",
            "residual_norm_lost": residual,
            "train_s": round(totals.train_s, 3),
            "sync_s": round(totals.sync_s, 3),
            "metrics": self.metrics.summary(),
        }
