"""Scripts as real processes: exit codes, and torchrun with two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from training import launch as launcher
from training.attempt import AttemptContext
from training.spec import SyncPlan, Workload

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "training.launch", str(script), *arguments],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def attempt(folder: Path, socket_path: str, *, patience_s: float = 1.0) -> str:
    for name in ("checkpoint", "output"):
        (folder / name).mkdir()
    context = AttemptContext(
        job_id="job",
        site_id="ams",
        epoch=1,
        gpus=1,
        seed=11,
        workload=Workload(samples=64, batch_per_gpu=4, parameters=10, flops_per_sample=1),
        sync=SyncPlan(strategy="diloco", codec="fp32", patience_s=patience_s),
        ranks_socket=socket_path,
        checkpoint_dir=str(folder / "checkpoint"),
        output_dir=str(folder / "output"),
    )
    path = folder / "attempt.json"
    path.write_text(context.model_dump_json())
    return str(path)


SCRIPT = """
import sys, json, torch, training, sibling
what = sys.argv[1]
if what == "raise":
    raise ValueError("the tenant's own fault")
if what == "look":
    print(json.dumps({"argv": sys.argv[1:], "name": __name__, "sibling": sibling.VALUE, "training": training.__file__,
                      "seeded": torch.initial_seed()}))
if what == "join":
    model = torch.nn.Linear(2, 1)
    with training.join(model, torch.optim.SGD(model.parameters(), lr=0.1)) as session:
        pass
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    (workdir / "sibling.py").write_text("VALUE = 42\n")
    (workdir / "training.py").write_text("raise SystemExit('a shadow of the runtime was imported')\n")
    (workdir / "script.py").write_text(SCRIPT)
    return workdir / "script.py"


def test_a_script_runs_as_main_beside_its_own_modules_and_cannot_shadow_the_runtime(
    script: Path, tmp_path: Path
) -> None:
    done = launch(script, "look", "--width", "64", HANSA_ATTEMPT=attempt(tmp_path, "none.sock"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "argv": ["look", "--width", "64"],
        "name": "__main__",
        "sibling": 42,
        "training": str(ROOT / "training/__init__.py"),
        "seeded": 11,
    }


def test_each_end_has_its_exit_code(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = launch(script, "raise")
    assert raised.returncode == 1
    assert "ValueError: the tenant's own fault" in raised.stderr
    assert "script.py" in raised.stderr
    lost = launch(script, "join", HANSA_ATTEMPT=attempt(tmp_path, str(tmp_path / "none.sock")))
    assert lost.returncode == 75, lost.stderr
    assert "exchange.failed" in lost.stderr
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert launcher.main([]) == 2
    assert launcher.main([str(script.parent / "absent.py")]) == 2
    (script.parent / "leave.py").write_text("raise SystemExit(7)")
    assert launcher.main([str(script.parent / "leave.py")]) == 7
    monkeypatch.setenv("HANSA_ATTEMPT", str(script))
    assert launcher.main([str(script)]) == 2, "an attempt that cannot be read"


def test_the_specification_never_drags_in_torch() -> None:
    check = "import sys, training.spec, training.jobfile, training.attempt, training; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], env=ENVIRONMENT, check=False, timeout=60).returncode == 0


RANKED = """
import torch, torch.distributed as dist, training
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = [torch.full((4,), float(index)) / 50 for index in range(50)]
seen = []
with training.join(model, optimizer, data=data, batch=4) as session:
    for batch in session.batches():
        seen += (batch[:, 0] * 50).round().int().tolist()
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
gathered = [torch.zeros(50, dtype=torch.int32) for _ in range(2)]
mine = torch.zeros(50, dtype=torch.int32)
for index in seen:
    mine[index] = 1
dist.all_gather(gathered, mine)
weights = [torch.zeros(1, 4) for _ in range(2)]
dist.all_gather(weights, model.module.weight.detach())
if session.rank == 0:
    print("each item once:", int(sum(gathered).min()), int(sum(gathered).max()), "same model:", torch.equal(*weights))
"""


def test_two_ranks_under_torchrun_share_the_data_and_the_model(tmp_path: Path) -> None:
    (tmp_path / "ranked.py").write_text(RANKED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", "training.launch"]
    done = subprocess.run(
        [sys.executable, "-P", *command, str(tmp_path / "ranked.py")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "each item once: 1 1 same model: True"
