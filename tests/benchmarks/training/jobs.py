"""Measured jobs: a model's size, a plan, and how a run of it is told to the laboratory and to plain DDP."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from training.jobfile import read_job_file
from training.lab.compare import job_of
from training.lab.errors import LabError
from training.lab.federation import Federation, read_rows, site_names
from training.lab.link import LinkSpec
from training.lab.wan import Wan, WanError
from training.spec import JobSpec

WORKDIR: Final = Path(__file__).parent / "job"
_ASK_S: Final = 0.05
# Generous: on a busy machine eight processes take minutes to import torch.
_START_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Size:
    """A byte-level GPT: its parameters follow from these."""

    width: int
    layers: int
    context: int = 32
    heads: int = 4
    batch: int = 1

    @property
    def parameters(self) -> int:
        """The number of parameters of `examples/stdlib_lm` in this size."""
        block = 12 * self.width**2 + 13 * self.width
        return self.layers * block + 2 * 256 * self.width + self.context * self.width + 2 * self.width

    def environment(self, **more: float) -> dict[str, str]:
        """Return the knobs of `job/text_model.py`."""
        knobs = {"WIDTH": self.width, "LAYERS": self.layers, "CONTEXT": self.context, "HEADS": self.heads, **more}
        return {name: f"{value:g}" for name, value in knobs.items()}


def job(size: Size, plan: dict[str, Any], *, samples: int, sites: int, **knobs: float | str) -> JobSpec:
    """Return the job: `samples` in all, under a plan."""
    text = {name: value for name, value in knobs.items() if isinstance(value, str)}
    numbers = {name: value for name, value in knobs.items() if not isinstance(value, str)}
    document = {
        "name": "measured",
        "workdir": ".",
        "run": "python train.py",
        "resources": {"accelerators": f"cpu-slot:{sites}"},
        "envs": {**size.environment(**numbers), **text},
        "market": {
            "budget": 1,
            "workload": {
                "samples": samples,
                "batch_per_gpu": size.batch,
                "parameters": size.parameters,
                "flops_per_sample": 6.0 * size.parameters * size.context,
            },
            "sync": plan,
        },
    }
    return job_of(read_job_file(json.dumps(document)), None)


def use_congestion_control(wan: Wan, name: str) -> str:
    """Let TCP use `name`, or reno where the kernel reserves cubic for its first namespace; return which it is."""
    try:
        wan.use_congestion_control(name)
    except WanError:
        if name != "cubic":
            raise
        wan.use_congestion_control("reno")
    return wan.congestion_control()


def await_end(running: Federation) -> None:
    """Wait for all ranks. Raises LabError where one fails."""
    while running.running():
        running.wait(_ASK_S)


def summary(running: Federation, site: int = 0) -> dict[str, Any]:
    """Return what a site's session wrote at its end."""
    content: dict[str, Any] = json.loads((running.sites[site].folder / "output/summary.json").read_text())
    return content


def rounds(running: Federation, site: int = 0) -> list[dict[str, Any]]:
    """Return the metrics rows of a site that tell of a settled round."""
    return [row for row in read_rows(running.sites[site].metrics) if row.get("round_s") is not None and "missed" in row]


@dataclass(frozen=True, slots=True)
class PlainRun:
    """What plain DDP did: seconds of each step, and the bytes on one site's cable, both ways."""

    step_s: list[float]
    wire_bytes: int
    parameters: int
    held_out_loss: float | None = None


def plain_ddp(
    size: Size, link: LinkSpec, *, sites: int, steps: int, congestion_control: str | None = None, **knobs: float
) -> PlainRun:
    """Run torch's DDP on Gloo over an emulated network of its own. Raises LabError where it fails."""
    pause = threading.Event()
    names = site_names(sites)
    with tempfile.TemporaryDirectory() as folder, Wan(names, link, seed=1) as wan, contextlib.ExitStack() as stack:
        if congestion_control:
            use_congestion_control(wan, congestion_control)
        home = Path(folder)
        processes = []
        for rank, name in enumerate(names):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **size.environment(STEPS=steps, BATCH=size.batch, **knobs),
                "RANK": str(rank),
                "WORLD_SIZE": str(sites),
                "MASTER_ADDR": wan.address(names[0]),
                "MASTER_PORT": "29511",
                "GLOO_SOCKET_IFNAME": wan.cable(name),
                "STARTED": str(home / f"started-{rank}"),
                "GO": str(home / "go"),
                "FIGURES": str(home / "figures-{rank}.json"),
            }
            log = stack.enter_context((home / f"log-{rank}").open("wb"))
            command = (sys.executable, str(WORKDIR / "plain_ddp.py"))
            processes.append(wan.start(name, command, environment=environment, output=log))
        try:
            deadline_s = time.monotonic() + _START_S
            while not all((home / f"started-{rank}").exists() for rank in range(sites)):
                if time.monotonic() > deadline_s or any(each.poll() is not None for each in processes):
                    raise LabError(f"plain DDP did not start: {(home / 'log-0').read_text()[-2000:]}")
                pause.wait(_ASK_S)
            before = wan.sent_bytes(names[0]) + wan.received_bytes(names[0])
            (home / "go").touch()
            for each in processes:
                each.wait()
            if any(each.returncode for each in processes):
                raise LabError(f"plain DDP failed: {(home / 'log-0').read_text()[-2000:]}")
            wire = wan.sent_bytes(names[0]) + wan.received_bytes(names[0]) - before
            told = json.loads((home / "figures-0.json").read_text())
        finally:
            for each in processes:
                if each.poll() is None:
                    each.kill()
                    each.wait()
    return PlainRun(told["step_s"], wire, told["parameters"], told.get("held_out_loss"))
