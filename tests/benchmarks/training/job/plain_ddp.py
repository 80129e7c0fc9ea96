"""Plain data parallelism over the same links: torch's DDP on Gloo, gradients as fp32 in every step."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import text_model
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
text = text_model.example()
torch.manual_seed(1234)
module = text.ByteModel()
model = DistributedDataParallel(module)
optimizer = text_model.optimizer_of(model, text)
train, held_out = map(text.Bytes, text.corpus())
pace = text_model.Pace()
steps, batch = int(text_model.number("STEPS", 3)), int(text_model.number("BATCH", 1))
evaluate = bool(text_model.number("EVALUATE", 0))
rank, world = dist.get_rank(), dist.get_world_size()
order = torch.randperm(len(train), generator=torch.Generator().manual_seed(int(text_model.number("SEED", 1))))

stepped_s = []
computed_s = 0.0
dist.barrier()
Path(os.environ["STARTED"]).touch()
pause = threading.Event()
while not Path(os.environ["GO"]).exists():
    pause.wait(0.01)
for step in range(steps):
    started_s = time.monotonic()
    places = [(step * world + rank) * batch + each for each in range(batch)]
    windows = [train[int(order[place % len(order)])] for place in places]
    inputs, targets = (torch.stack(part) for part in zip(*windows, strict=True))
    pace.begin()
    loss = model(inputs, targets)
    loss.backward()  # the gradients' all-reduce ends with it
    synced_s = time.monotonic()
    optimizer.step()
    optimizer.zero_grad()
    pace.end()
    stepped_s.append(time.monotonic() - started_s)
figures = {"step_s": stepped_s, "steps": steps, "parameters": sum(each.numel() for each in module.parameters())}
if evaluate and rank == 0:
    figures["held_out_loss"] = text.held_out_loss(module, held_out)
Path(os.environ["FIGURES"].format(rank=rank)).write_text(json.dumps(figures))
dist.barrier()
