"""A job that spans a site whose GPUs a Slurm cluster gives and a site of plain processes, through the real broker."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from sites.drivers.slurm_queue import run_slurm
from tests.journey.market import Chain, RunningMarket, samples_in
from tests.sites.slurm_cluster import Cluster, cluster
from tests.sites.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

__all__ = ["cluster"]

SECONDS = 5.0
SLURM = {
    "gpus_per_node": 1,  # its two slots are on two nodes
    "gres": "gpu:h100",
    "fabric": "trusted",
    "gateway_host": "127.0.0.1",
    "extra_args": ["--mem=2000M"],
}


def test_job_spans_a_gang_of_two_slurm_nodes_and_a_site_of_processes(market: RunningMarket, cluster: Cluster) -> None:
    if not shutil.which("bwrap"):
        pytest.skip("no bubblewrap; on Debian: sudo apt-get install bubblewrap")
    chain = Chain()
    with market.settings_changed("danzig", {"driver": "slurm", "slurm": SLURM}, {"SLURM_CONF": str(cluster.conf)}):
        submitted_s = time.monotonic()
        # Three slots on two sites: one of them is the one with two.
        job_id = market.submit(slots=3, seconds=SECONDS, sites=2)
        active_s = (
            market.await_true(job_id, lambda: any(each.active_ms for each in market.leases(job_id)))
            and time.monotonic()
        )
        runs = market.places.home / "sites/danzig/attempts"
        wardens = market.await_true(
            job_id, lambda: len(found := list(runs.glob("*/runs/ranks/node-*/warden.json"))) == 2 and found
        )
        market.tell("both wardens of the gang placed", since_s=active_s)
        jobs = run_slurm(["squeue", "--noheader", "--format=%j|%T|%D|%b"]).splitlines()
        assert [line.split("|")[1:] for line in jobs] == [["RUNNING", "2", "gres:gpu:h100:1"]]
        ranks = wardens[0].parents[1]
        market.await_rounds(job_id, 1, chain)
        market.tell("first round sealed since placement", since_s=active_s)
        run = json.loads((ranks / "node-1" / "run.json").read_text())
        assert run["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
        assert run["argv"][run["argv"].index("--node-rank") + 1] == "1"
        market.await_finished(job_id, chain)
        market.tell("submitted and finished", since_s=submitted_s)
    market.assert_trained_once(job_id, chain, samples_in(SECONDS, 3))
    market.assert_sound(job_id)
    assert {lease.site_id for lease in market.leases(job_id)} >= {"danzig"}
    assert len({lease.site_id for lease in market.leases(job_id)}) == 2
    wait_until(lambda: not run_slurm(["squeue", "--noheader"]).strip())
