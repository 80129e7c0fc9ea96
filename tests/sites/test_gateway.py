from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sites.attempt_folder import AttemptFolder, Surroundings, make_credentials, write_attempt
from sites.drivers.process import ProcessDriver
from sites.environment import own_environment
from sites.gateway import Gateway
from sites.journal import AttemptRecord
from sites.protocol import AttemptOrder
from tests.sites.conftest import job
from tests.sites.market import Market
from tests.sites.waiting import wait_until
from training.clock import SystemClock
from training.roundlog.signing import public_hex

CLOCK = SystemClock()


def test_gateway_that_dies_is_started_again(market: Market, tmp_path: Path) -> None:
    spec = job(market, tmp_path / "work", "pass")
    folder = AttemptFolder(tmp_path / "attempt")
    _, csr_pem = make_credentials(folder, "job_a", 1, "hamburg")
    certificate = market._sign(x509.load_pem_x509_csr(csr_pem.encode())).public_bytes(Encoding.PEM).decode()
    order = AttemptOrder(spec=spec, sync=spec.market.sync, seed=1, weight_max=1, certificate_pem=certificate)
    record = AttemptRecord(
        lease_id="lease_a", epoch=1, job_id="job_a", tenant_id="t", gpu_type="cpu-slot", gpu_ids=("0",), order=order
    )
    ca_pem = market.ca.public_bytes(Encoding.PEM).decode()
    surroundings = Surroundings("hamburg", public_hex(market.authority), ca_pem)
    write_attempt(folder, record, surroundings, listen=None, resume_from=None)
    gateway = Gateway(
        folder,
        ProcessDriver(sys.executable, CLOCK),
        CLOCK,
        python=sys.executable,
        environment=own_environment(sys.executable),
    )
    deadline_s = CLOCK.monotonic_s() + 60
    number = gateway.keep_running(1, deadline_s)
    try:
        assert number == 1
        wait_until(gateway.status)
        assert gateway.keep_running(1, deadline_s) == 1
        warden = json.loads((folder.run("gateway-1") / "warden.json").read_text())["pid"]
        (child,) = map(int, Path(f"/proc/{warden}/task/{warden}/children").read_text().split())
        os.kill(child, signal.SIGKILL)
        number = wait_until(lambda: (found := gateway.keep_running(1, deadline_s)) == 2 and found)
        assert wait_until(gateway.status) is not None
    finally:
        gateway.stop(number)
        wait_until(lambda: gateway.is_over(number))
