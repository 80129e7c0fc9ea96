"""How fast one contribution reaches the hub: gateways over mutual TLS against a raw TLS stream.

    python -m tests.benchmarks.bench_roundlog

Prints MB/s of a 64 MB contribution on loopback through 1 and 4 connections, each gateway a
process of its own, until the hub has verified its digests; and the ratio to one raw TLS 1.3
stream between two threads, measured in the same run. The median of five.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

from tests.training.roundlog.conftest import Federation, Site
from training.roundlog.credentials import client_context, server_context

SIZE_BYTES = 64_000_000
REPEATS = 5


def gateway_mb_per_s(hub: Site, member: Site, round_number: int) -> float:
    """Return the rate from the commit at the member to the complete contribution at the hub."""
    pause = threading.Event()
    member.client.post_fragment(round_number, 0, os.urandom(SIZE_BYTES))
    member.client.commit(round_number, weight=1, samples=(), fragments=1, outer_hash="0" * 64)
    started = time.perf_counter()
    # Asked every 10 ms: asking without a pause would take the hub's own core.
    while hub.control.status().waiting_for != (hub.site_id,):
        pause.wait(0.01)
    arrived = time.perf_counter()
    hub.contribute(round_number, outer_hash="0" * 64)
    for site in (hub, member):
        site.client.await_sealed(round_number)
        site.client.applied(round_number, "0" * 64)
    return SIZE_BYTES / (arrived - started) / 1e6


def raw_mb_per_s(site: Site) -> float:
    """Return the rate of one TLS 1.3 stream with both sides' certificates, in pieces of 1 MiB."""
    paths = (site.config.certificate_path, site.config.key_path, site.config.ca_path)
    listening = socket.create_server(("127.0.0.1", 0))
    received = threading.Event()

    def receive() -> None:
        plain, _ = listening.accept()
        with server_context(*paths).wrap_socket(plain, server_side=True) as stream:
            buffer, total = bytearray(1 << 20), 0
            while total < SIZE_BYTES:
                total += stream.recv_into(buffer)
            received.set()

    thread = threading.Thread(target=receive)
    thread.start()
    payload = memoryview(os.urandom(SIZE_BYTES))
    with (
        socket.create_connection(listening.getsockname()) as plain,
        client_context(*paths).wrap_socket(plain) as stream,
    ):
        started = time.perf_counter()
        for offset in range(0, SIZE_BYTES, 1 << 20):
            stream.sendall(payload[offset : offset + (1 << 20)])
        received.wait()
        elapsed = time.perf_counter() - started
    thread.join()
    return SIZE_BYTES / elapsed / 1e6


def main() -> None:
    """Measure and print."""
    print("connections  MB/s  of one raw TLS stream")
    for connections in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            federation = Federation(Path(folder))
            hub, member = federation.add("aachen"), federation.add("bergen")
            for site in (hub, member):
                config = site.config.model_copy(update={"connections": connections})
                (site.folder / "gateway.json").write_text(config.model_dump_json())
                site.start(process=True)
            federation.open(hub, member, hub=hub)
            rates = [gateway_mb_per_s(hub, member, number) for number in range(1, REPEATS + 1)]
            reference = statistics.median(raw_mb_per_s(member) for _ in range(REPEATS))
            rate = statistics.median(rates)
            print(f"{connections:11d}  {rate:4.0f}  {rate / reference:.0%} of {reference:.0f} MB/s")
            federation.stop()


if __name__ == "__main__":
    main()
