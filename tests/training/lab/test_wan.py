"""The emulated network keeps what it says: delay, bandwidth, loss, a cut, and nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.lab.link import LinkSpec, LinkSpecError
from training.lab.wan import Wan, WanError

SERVER = """
import socket, sys
server = socket.create_server((sys.argv[1], 7000))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    size = 0
    while block := connection.recv(1 << 20):
        size += len(block)
    connection.sendall(str(size).encode())
    connection.close()
"""
# Prints how long a connection takes, then how long so many bytes take to arrive there.
CLIENT = """
import socket, sys, time
start = time.monotonic()
connection = socket.create_connection((sys.argv[1], 7000), timeout=5)
connected = time.monotonic()
connection.settimeout(60)
connection.sendall(bytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR)
assert int(connection.recv(100)) == int(sys.argv[2])
print(connected - start, time.monotonic() - connected)
"""


def needs_root() -> None:
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("iptables", "ip", "tc", "nsenter")):
        pytest.skip("needs root with iproute2 and iptables; on Debian: sudo apt-get install iproute2 iptables")


@pytest.fixture
def link(request: pytest.FixtureRequest) -> LinkSpec:
    return LinkSpec.parse(getattr(request, "param", "20mbit,25ms"))


@pytest.fixture
def wan(link: LinkSpec) -> Iterator[Wan]:
    needs_root()
    with contextlib.ExitStack() as stack:
        wan = stack.enter_context(Wan(("athens", "bergen", "cadiz"), link, seed=3))
        command = wan.argv("bergen", (sys.executable, "-I", "-c", SERVER, wan.address("bergen")))
        server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield wan
        server.kill()


def dial(wan: Wan, size_bytes: int = 1) -> tuple[float, float]:
    """Return how long a connection from athens to bergen took, and how long its bytes took."""
    command = wan.argv("athens", (sys.executable, "-I", "-c", CLIENT, wan.address("bergen"), str(size_bytes)))
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout.split()
    return float(told[0]), float(told[1])


def test_a_connection_takes_a_round_trip(wan: Wan) -> None:
    fastest_s = min(dial(wan)[0] for _ in range(3))
    assert 0.050 <= fastest_s <= 0.050 + 0.050  # two ways of 25 ms, and a busy machine's delay


def test_bytes_take_as_long_as_the_bandwidth_says(wan: Wan) -> None:
    size_bytes = 5_000_000
    before = wan.sent_bytes("athens")
    _, took_s = dial(wan, size_bytes)
    assert took_s >= size_bytes * 8 / 20e6 * 0.9  # the bucket's burst and what the windows hold come for free
    sent = wan.sent_bytes("athens") - before
    assert size_bytes * 1.02 <= sent <= size_bytes * 1.2  # headers at least


def test_a_cut_link_carries_nothing_until_it_is_mended(wan: Wan) -> None:
    wan.part("athens", "bergen")
    with pytest.raises(subprocess.CalledProcessError):
        dial(wan)
    wan.join("athens", "bergen")
    assert dial(wan)[0] < 5


@pytest.mark.parametrize("link", ["50mbit,5ms,5%"], indirect=True)
def test_lost_packets_are_sent_again(wan: Wan) -> None:
    size_bytes = 2_000_000
    before = wan.sent_bytes("athens")
    dial(wan, size_bytes)
    repeated = (wan.sent_bytes("athens") - before) / size_bytes
    assert 1.06 <= repeated <= 1.4  # headers are some four hundredths, what was lost five


def test_nothing_stays_when_it_ends(link: LinkSpec) -> None:
    needs_root()
    namespaces = Path("/run/netns")
    before = set(namespaces.glob("*"))
    with Wan(("a", "b"), link) as wan:
        made = set(namespaces.glob("*")) - before
        assert len(made) == 3
        sleeper = wan.start("a", ("sleep", "600"), output=None)
    assert set(namespaces.glob("*")) & made == set()
    sleeper.kill()
    sleeper.wait()


def test_the_congestion_control_is_named(wan: Wan) -> None:
    wan.use_congestion_control("reno")
    assert wan.congestion_control() == "reno"
    with pytest.raises(WanError, match="no-such-control"):
        wan.use_congestion_control("no-such-control")


def test_a_network_is_made_in_a_moment(link: LinkSpec) -> None:
    needs_root()
    started_s = time.monotonic()
    with Wan(tuple("abcd"), link):
        pass
    assert time.monotonic() - started_s < 30


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("100mbit,50ms,0.1%", LinkSpec(100e6, 0.05, 0.001)),
        ("1.5 Gbit/s, 0.2s", LinkSpec(1.5e9, 0.2)),
        ("64kbit", LinkSpec(64e3)),
    ],
)
def test_a_link_is_read_as_people_write_it(text: str, link: LinkSpec) -> None:
    assert LinkSpec.parse(text) == link
    assert LinkSpec.parse(str(link)) == link


@pytest.mark.parametrize(
    "text", ["", "fast", "100mbit,50", "100mbit,50ms,0.1", "1mbit,1ms,1%,1", "1bit", "1gbit,9s", "1gbit,1ms,60%"]
)
def test_a_link_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(LinkSpecError):
        LinkSpec.parse(text)


@pytest.mark.parametrize("sites", [(), ("a", "a"), tuple(map(str, range(17)))])
def test_a_laboratory_has_some_sites_each_with_its_name(sites: tuple[str, ...]) -> None:
    with pytest.raises(WanError, match="1 to 16"):
        Wan(sites, LinkSpec(1e6))
