"""What the peers' scripts share with `train.py`: the same model, text, pace and inner optimizer, and what a round is told as."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path

import text_model
import torch

# All that a library starts beside this process dies with it when the site is killed.
os.setsid()

text = text_model.example()
torch.manual_seed(1234)
model = text.ByteModel()
optimizer = text_model.optimizer_of(model, text)
site, sites = int(text_model.number("SITE", 0)), int(text_model.number("SITES", 1))
period_steps = int(text_model.number("PERIOD_STEPS", 5))
address = os.environ["ADDRESS"]
OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}

_train, _ = map(text.Bytes, text.corpus())
_order = torch.randperm(len(_train), generator=torch.Generator().manual_seed(1))
_folder = Path(os.environ["RENDEZVOUS"])
_pace = text_model.Pace()
_batch = int(text_model.number("BATCH", 1))
_steps = itertools.count()


def compute() -> None:
    """Take one inner step's forward and backward pass, at the common pace; the optimizer's step is the caller's."""
    step = next(_steps)
    places = [(step * sites + site) * _batch + each for each in range(_batch)]
    windows = [_train[int(_order[place % len(_order)])] for place in places]
    inputs, targets = (torch.stack(part) for part in zip(*windows, strict=True))
    _pace.begin()
    optimizer.zero_grad()
    loss = model(inputs, targets)
    loss.backward()
    _pace.end()


def told(*, stall_s: float, members: int) -> None:
    """Add a round to what this site's file says."""
    row = {"time_ms": time.time_ns() // 1_000_000, "stall_s": stall_s, "members": members}
    with (_folder / f"rounds-{site}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def say(name: str, value: str) -> None:
    """Leave a word for the other sites' start."""
    part = _folder / f"{name}.{site}.part"
    part.write_text(value)
    part.replace(_folder / name)


def heard(name: str, limit_s: float = 900.0) -> str:
    """Return a word of another site's start once it is there."""
    pause, deadline_s = threading.Event(), time.monotonic() + limit_s
    while not (_folder / name).exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"nobody said {name} within {limit_s:g} s")
        pause.wait(0.02)
    return (_folder / name).read_text()


def start_together() -> None:
    """Return when every site has come here."""
    say(f"here-{site}", "")
    for other in range(sites):
        heard(f"here-{other}")
