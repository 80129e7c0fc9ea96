"""The model and the text of `examples/stdlib_lm` in other sizes, for what `train.py` and `plain_ddp.py` measure.

The knobs come from the environment, as a job file's `envs` sets them. A step can be paced: it then takes STEP_S seconds
however fast the processor computes it, and leaves the processor free for the rest, as a GPU would.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from pathlib import Path
from types import ModuleType

import torch

_SCRIPT = Path(__file__).parents[4] / "training/examples/stdlib_lm/train.py"
_WARM_UP_STEPS = 2


def number(name: str, default: float) -> float:
    """Return a knob."""
    return float(os.environ.get(name, default))


def example() -> ModuleType:
    """Return the example's script as a module, with this process's sizes in place of its own."""
    specification = importlib.util.spec_from_file_location("stdlib_lm", _SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for knob in ("WIDTH", "LAYERS", "HEADS", "CONTEXT", "CORPUS_BYTES", "HELD_OUT_BATCH", "LEARNING_RATE"):
        default = getattr(module, knob)
        setattr(module, knob, type(default)(number(knob, default)))
    return module


def optimizer_of(model: torch.nn.Module, text: ModuleType) -> torch.optim.Optimizer:
    """Return the optimizer of every run here: the example's, or plain SGD where only the pace matters."""
    if number("PLAIN_SGD", 0):
        return torch.optim.SGD(model.parameters(), lr=0.01, foreach=True)
    return torch.optim.AdamW(model.parameters(), lr=text.LEARNING_RATE, weight_decay=text.WEIGHT_DECAY, foreach=True)


class Pace:
    """Lets every step take the same time; steps that take longer by themselves are counted."""

    def __init__(self) -> None:
        self.step_s = number("STEP_S", 0.0)
        self.late = 0
        self._pause = threading.Event()
        self._started_s = time.monotonic()

    def begin(self) -> None:
        """A step begins now: waiting for others lies outside."""
        self._started_s = time.monotonic()

    def end(self) -> None:
        """Wait for the step's end."""
        left_s = self._started_s + self.step_s - time.monotonic()
        if left_s > 0:
            self._pause.wait(left_s)
        elif self.step_s:
            self.late += 1
