"""T5: how much of a long fat link one contribution's transfer fills, beside one TCP stream.

1 Gbit/s and 100 ms there and back. Both contestants have the same raised windows (`training.lab.wan.WINDOW_BYTES`) and the same
congestion control. Ours is a contribution between two gateways, over mutual TLS, from its commit at the member until
the hub has verified its digests. The other is one plain TCP connection that is already open, until the last byte is read.
The emulated link itself takes processor time (every packet is queued twice): `processors` says whether a core was free.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

from tests.benchmarks.market.figures import Figure, verdict
from tests.benchmarks.training.jobs import WORKDIR, Size, job, use_congestion_control
from training.lab.federation import Federation, site_names
from training.lab.link import LinkSpec
from training.lab.wan import Wan
from training.roundlog.client import GatewayClient

LINK: Final = LinkSpec.parse("1gbit,50ms")
SHARE_TARGET: Final = 0.9
_SIZE: Final = Size(width=2048, layers=6)
_ASK_S: Final = 0.01
_SERVER: Final = """
import socket, sys
server = socket.create_server((sys.argv[1], 7000))
print("ready", flush=True)
connection, _ = server.accept()
size, expected = 0, int(sys.argv[2])
while size < expected:
    size += len(connection.recv(1 << 20))
connection.sendall(b"all")
"""
_CLIENT: Final = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7000))
block, left = bytes(1 << 20), int(sys.argv[2])
started = time.monotonic()
while left > 0:
    left -= connection.send(block[:left])
assert connection.recv(3) == b"all"
print(time.monotonic() - started)
"""


def one_stream_s(wan: Wan, size_bytes: int) -> float:
    """Return how long one TCP connection takes for so many bytes."""
    sender, receiver = site_names(2)[::-1]
    address = wan.address(receiver)
    command = wan.argv(receiver, (sys.executable, "-I", "-c", _SERVER, address, str(size_bytes)))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        client = wan.argv(sender, (sys.executable, "-I", "-c", _CLIENT, address, str(size_bytes)))
        told = subprocess.run(client, capture_output=True, text=True, check=True, timeout=300)
    return float(told.stdout)


def contribution_s(wan: Wan, size_bytes: int, connections: int) -> float:
    """Return how long a contribution of so many bytes takes from the member's commit to the hub's verified blob."""
    plan = {"strategy": "diloco", "codec": "fp32", "period_steps": 1, "patience_s": 300}
    spec = job(_SIZE, plan, samples=2, sites=2)
    pause = threading.Event()
    running = Federation.of(spec, spec.market.sync, WORKDIR, sites=2, seed=1, wan=wan, connections=connections)
    try:
        running.start_gateways()
        hub, member = running.sites
        client = GatewayClient(str(member.folder / "ranks.sock"), 300)
        client.position()
        client.post_fragment(1, 0, os.urandom(size_bytes))
        started_s = time.monotonic()
        client.commit(1, weight=1, samples=(), fragments=1, outer_hash="0" * 64)
        while hub.control.status().waiting_for != (hub.site_id,):
            pause.wait(_ASK_S)
        return time.monotonic() - started_s
    finally:
        running.close()


def measured(*, size_bytes: int, controls: tuple[str, ...], connections: tuple[int, ...]) -> Iterator[Figure]:
    """Measure T5 under each congestion control that the kernel has."""
    full_s = size_bytes * 8 / LINK.bandwidth_bits_per_s
    for control in controls:
        for count in connections:
            with Wan(site_names(2), LINK, seed=1) as wan:
                used = use_congestion_control(wan, control)
                ours_s = contribution_s(wan, size_bytes, count)
            with Wan(site_names(2), LINK, seed=1) as wan:
                use_congestion_control(wan, control)
                one_s = one_stream_s(wan, size_bytes)
            share, reference = full_s / ours_s, full_s / one_s
            yield Figure(
                "T5",
                f"{size_bytes / 1e6:.0f} MB over {LINK}, {used}, {count} connections "
                f"(load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores)",
                f">= {SHARE_TARGET:.0%} of the link",
                f"{ours_s:.1f} s, {share:.0%}",
                f"{one_s:.1f} s, {reference:.0%} by one TCP stream",
                f"{share / reference:.2f} x",
                verdict(reached=share >= SHARE_TARGET, loses=share < reference),
                {"seconds": ours_s, "one_stream_s": one_s, "at_link_rate_s": full_s},
            )
