"""Sites whose ranks are real processes, with the model replicated or sharded: `python -m tests.training.sharded_sites PLAN.json`.

All ranks of all sites are forked from one process that has imported torch once. Their round log is a torch FileStore: one
for all sites, or each its own where the sites name their `log`. Run through `run_sites`, which returns what each rank found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what each rank would otherwise import for itself after the fork
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.training.small_job import Points, context, model
from training.exchange import Entry, MemberSeat, Position, SampleRange, SealedRound
from training.ranks import Ranks
from training.roundlog.view import GENESIS_HASH
from training.session import Session

LIMIT_S = 240
STEP_SAMPLES = 12


def run_sites(folder: Path, sites: list[dict[str, Any]], **plan: Any) -> dict[str, list[dict[str, Any]]]:
    """Run sites to their end; return each rank's findings by site.

    A site has a name, a mode (see `spread`) and a world, and may have a log, a batch for each rank and settings of its own;
    with `joins_after` it comes when that round is sealed, by a peer's snapshot.
    """
    folder.mkdir(parents=True)
    path = folder / "plan.json"
    path.write_text(json.dumps({"sites": sites, "plan": plan}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.sharded_sites", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return {
        site["name"]: [
            json.loads((folder / f"{site['name']}-{rank}.json").read_text()) for rank in range(site["world"])
        ]
        for site in sites
    }


@dataclass
class StoreExchange:
    """The round log of sites that never fail, in a store that their processes share. `joins` says after which round each came."""

    store: dist.Store
    site_id: str
    members: tuple[MemberSeat, ...]
    joins: dict[str, int]
    base: Position

    def members_of(self, round_number: int) -> tuple[MemberSeat, ...]:
        return tuple(each for each in self.members if self.joins.get(each.site_id, 0) < round_number)

    def position(self) -> Position:
        if (after := self.joins.get(self.site_id)) is None:
            return replace(self.base, members=self.members_of(self.base.base_round + 1))
        sealed = self.await_sealed(after)
        done = tuple(
            each for number in range(1, after + 1) for entry in self._entries(number) for each in entry.samples
        )
        return Position(after, sealed.manifest_hash, sealed.members, done, needs_snapshot=True)

    def post_fragment(self, round_number: int, fragment: int, payload: bytes) -> None:
        self.store.set(f"{round_number}/{self.site_id}/{fragment}", payload.hex())

    def commit(self, round_number: int, *, weight: int, samples: Any, fragments: int, outer_hash: str) -> None:
        said = [weight, [[each.start, each.stop] for each in samples], fragments, outer_hash]
        self.store.set(f"{round_number}/{self.site_id}", json.dumps(said))

    def await_sealed(self, round_number: int) -> SealedRound:
        entries = self._entries(round_number)
        return SealedRound(round_number, 1, f"{round_number:064x}", entries, self.members_of(round_number + 1))

    def _entries(self, round_number: int) -> tuple[Entry, ...]:
        entries = []
        for member in self.members_of(round_number):
            weight, samples, fragments, _ = json.loads(self.store.get(f"{round_number}/{member.site_id}"))
            ranges = tuple(SampleRange(*each) for each in samples)
            entries.append(Entry(member.site_id, weight, ranges, tuple(range(fragments))))
        return tuple(entries)

    def sealed_already(self, round_number: int) -> SealedRound | None:
        members = self.members_of(round_number)
        posted = all(self.store.check([f"{round_number}/{member.site_id}"]) for member in members)
        return self.await_sealed(round_number) if posted else None

    def fetch_fragment(self, round_number: int, site_id: str, fragment: int) -> bytes:
        return bytes.fromhex(self.store.get(f"{round_number}/{site_id}/{fragment}").decode())

    def applied(self, round_number: int, outer_hash: str) -> None:
        self.store.set(f"applied/{round_number}/{self.site_id}", outer_hash)

    def offer_snapshot(self, round_number: int, path: str) -> None:
        self.store.set(f"snapshot/{round_number}/{self.site_id}", path)

    def fetch_snapshot(self, path: str) -> int:
        # Nobody seals the next round without this site, so the file is still of the round after which it joins.
        after = self.joins[self.site_id]
        offered = self.store.get(f"snapshot/{after}/{self.members_of(after)[0].site_id}").decode()
        shutil.copyfile(offered, path)
        return after

    def report(self, measurements: dict[str, float]) -> None:
        self.store.set(f"report/{self.site_id}", json.dumps(measurements))


def spread(module: nn.Module, mode: str, world: int) -> nn.Module:
    """Return the model as a site has it in mode plain, ddp, fsdp, hsdp, tp or tp+fsdp."""
    if mode == "plain":
        return module
    if mode == "ddp":
        return DistributedDataParallel(module)
    mesh = None
    if mode in {"tp", "tp+fsdp"}:
        # In the mesh of two axes, ranks 2k and 2k + 1 share their batches.
        shape, names = ((world // 2, 2), ("dp", "tp")) if mode == "tp+fsdp" else ((world,), ("tp",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        parallelize_module(module, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if mode != "tp":
        options = {"mesh": mesh["dp"]} if mesh is not None else {}
        if mode == "hsdp":
            options = {"mesh": init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))}
        # The last layer is the root's own: what FSDP2 gathers of the root stays gathered after a forward pass.
        for each in (module[0], module):  # type: ignore[index]
            fully_shard(each, **options)
    return module


def train(folder: Path, store: dist.Store, site: dict[str, Any], rank: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Train one rank of one site to the end of its job."""
    name, world = site["name"], site["world"]
    plan = dict(plan)
    members = tuple(MemberSeat(each, 1, gpus) for each, gpus in plan.pop("members"))
    base_round, done = plan.pop("base_round", 0), tuple(SampleRange(*each) for each in plan.pop("done", ()))
    plan_joins = plan.pop("joins")
    attempt = context(folder, name, **plan)
    # One for all sites of a federation, as in a job; a site alone has the same step whatever its ranks.
    batch = site.get("batch", STEP_SAMPLES // world)
    attempt = attempt.model_copy(update={"workload": attempt.workload.model_copy(update={"batch_per_gpu": batch})})
    module = spread(model(), site["mode"], world)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    base_hash = GENESIS_HASH if not base_round else f"{base_round:064x}"
    base = Position(base_round, base_hash, members, done, needs_snapshot=False)
    exchange = StoreExchange(store, name, members, plan_joins, base)
    ranks = Ranks.of_process(60.0)
    hashes: dict[int, str] = {}
    losses, seen = [], []
    with Session(
        module, optimizer, Points(), ranks=ranks, context=attempt, exchange=exchange, fragment_elements=32
    ) as session:
        for inputs, targets in session.batches():
            hashes[session.rounds] = session.outer_hash
            loss = torch.nn.functional.mse_loss(module(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # An evaluation here leaves FSDP2's root gathered: what a round writes must reach the next forward pass.
            with torch.no_grad():
                module(inputs)
            losses.append(loss.item())
            seen.append(inputs.sum().item())
    hashes[session.rounds] = session.outer_hash
    return {
        "hashes": hashes,
        "losses": losses,
        "seen": seen,
        "steps": session.step,
        "layout": session._synchronizer.share.layout,
    }


def main() -> int:
    path = Path(sys.argv[1])
    document = json.loads(path.read_text())
    sites, folder = document["sites"], path.parent
    children = []
    for site in sites:
        together = [each for each in sites if each.get("log") == site.get("log")]
        members = [(each["name"], each["world"]) for each in together]
        joins = {each["name"]: each["joins_after"] for each in together if "joins_after" in each}
        for rank in range(site["world"]):
            if (child := os.fork()) == 0:
                _rank(
                    folder, site, rank, {**document["plan"], **site.get("plan", {}), "members": members, "joins": joins}
                )
            children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _rank(folder: Path, site: dict[str, Any], rank: int, plan: dict[str, Any]) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / f"{site.get('log', 'common')}.log"), -1)
        if site["world"] > 1:
            group = dist.FileStore(str(folder / f"{site['name']}.group"), site["world"])
            dist.init_process_group("gloo", store=group, rank=rank, world_size=site["world"])
        found = train(folder, store, site, rank, plan)
        (folder / f"{site['name']}-{rank}.json").write_text(json.dumps(found))
        code = 0
    except BaseException:  # noqa: BLE001 - a forked rank ends here, whatever happened
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
