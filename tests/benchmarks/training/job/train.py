"""The measured job: what a tenant would write, plus a pace and what a rank knows of its own time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import text_model
import torch

import training

text = text_model.example()
torch.manual_seed(1234)
model = text.ByteModel()
optimizer = text_model.optimizer_of(model, text)
train, held_out = map(text.Bytes, text.corpus())
pace = text_model.Pace()
evaluate_rounds = int(text_model.number("EVALUATE_ROUNDS", 0))
loss = torch.zeros(())
computed_s = 0.0

with training.join(model, optimizer, data=train) as session:
    evaluated = session.rounds
    entered_s = time.monotonic()
    for inputs, targets in session.batches():
        if evaluate_rounds and session.rounds >= evaluated + evaluate_rounds:
            evaluated = session.rounds
            session.report(held_out_loss=text.held_out_loss(model, held_out))
        pace.begin()
        began_s = time.monotonic()
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pace.end()
        computed_s += time.monotonic() - began_s
        session.report(step_number=session.step, loss=loss.item())
    looped_s = time.monotonic() - entered_s
    last = text.held_out_loss(model, held_out)
    session.report(held_out_loss=last)

if output := os.environ.get("FIGURES"):
    figures = {"looped_s": looped_s, "computed_s": computed_s, "late_steps": pace.late, "held_out_loss": last}
    figures["steps"] = session.step
    Path(output.format(site=session.metrics.site_id)).write_text(json.dumps(figures))
