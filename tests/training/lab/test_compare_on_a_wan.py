"""Strategies compared over an emulated network: its bandwidth bounds the bytes, its counter sees them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.training.lab.test_compare import JOB, SCRIPT
from training.jobfile import read_job_file
from training.lab.compare import compare, job_of
from training.lab.link import LinkSpec

WIDE = 40_000


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_slow_link_costs_the_strategy_that_sends_more_its_time(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("iptables", "ip", "tc", "nsenter")):
        pytest.skip("needs root with iproute2 and iptables; on Debian: sudo apt-get install iproute2 iptables")
    (tmp_path / "train.py").write_text(SCRIPT.replace("nn.Linear(4, 1)", f"nn.Linear(4, {WIDE})"))
    job = job_of(read_job_file(JOB.replace("parameters: 5,", f"parameters: {5 * WIDE},")), None)
    link = LinkSpec.parse("20mbit,10ms")
    every_step, diloco = compare(
        job, tmp_path, ["every_step", "diloco"], sites=2, seed=3, progress=lambda *_: None, link=link
    )
    for outcome in (every_step, diloco):
        assert outcome.network is not None
        assert outcome.network.link == "20mbit,10ms,0%"
        # What site-1 posted as hub's member is on its cable, with TLS and headers and acknowledgements.
        assert outcome.network.wire_bytes > outcome.payload_bytes / 4
        assert outcome.seconds >= outcome.network.wire_bytes * 8 / link.bandwidth_bits_per_s * 0.8
    assert every_step.network is not None
    assert diloco.network is not None
    assert every_step.network.wire_bytes > 3 * diloco.network.wire_bytes
