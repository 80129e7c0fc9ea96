"""Two processes probe a link over loopback with mutual TLS; strangers, late comers and greedy ones are refused."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.identity.authority import Authority
from sites.environment import own_environment
from sites.identity import certificate_request_pem, private_key_pem, write_private
from sites.links.messages import ProbeReport
from sites.links.probe import PROBE_EPOCH, ProbeConfig, ProbeListener, run_probe
from sites.links.stream import Allowance, Hello, Passed, Stream, Word, flow_of
from training.clock import ManualClock, SystemClock
from training.roundlog.credentials import client_context, new_attempt_key, peer_uri
from training.roundlog.errors import Reason, Refusal
from training.roundlog.signing import public_hex

PROBE = "probe_a"
MEGABYTE = 1_000_000


@dataclass
class Ends:
    """Two sites with certificates for one probe."""

    folder: Path
    authority: Authority

    def config(self, site_id: str, peer: str, address: str, **changes: Any) -> ProbeConfig:
        """Return one end's configuration; its key and certificate are made at the first use."""
        folder = self.folder / site_id
        self.key(site_id)
        return ProbeConfig(
            probe_id=PROBE,
            listens=site_id == "bremen",
            site_id=site_id,
            peer=peer,
            peer_key=self.key(peer),
            address=address,
            certificate_path=str(folder / "certificate.pem"),
            key_path=str(folder / "key.pem"),
            ca_path=str(folder / "ca.pem"),
            result_path=str(folder / "result.json"),
            **{
                "streams": 3,
                "bytes_max": 6 * MEGABYTE,
                "seconds_max": 2.0,
                "deadline_s": time.monotonic() + 90,
                **changes,
            },
        )

    def key(self, site_id: str, *, probe_id: str = PROBE) -> str:
        """Make a site's credentials, or find them, and return its public key."""
        folder = self.folder / site_id
        public = folder / "public.hex"
        if not public.exists():
            folder.mkdir()
            key = new_attempt_key()
            csr_pem = certificate_request_pem(key, peer_uri(probe_id, PROBE_EPOCH, site_id))
            issued = self.authority.issue_attempt_certificate(
                csr_pem, job_id=probe_id, epoch=PROBE_EPOCH, site_id=site_id, life_s=60, attempt_key=public_hex(key)
            )
            write_private(folder / "key.pem", private_key_pem(key))
            write_private(folder / "certificate.pem", issued.pem.encode())
            write_private(folder / "ca.pem", self.authority.ca_pem.encode())
            public.write_text(public_hex(key))
        return public.read_text()


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    return Ends(tmp_path, Authority(tmp_path / "market", SystemClock()))


@dataclass
class Listening:
    """A listener at work in a thread."""

    address: str
    report: list[ProbeReport]
    thread: threading.Thread

    def end(self) -> ProbeReport:
        self.thread.join(90)
        return self.report[0]


def listen(ends: Ends, **changes: Any) -> Listening:
    listener = ProbeListener(ends.config("bremen", "hamburg", "127.0.0.1:0", **changes))
    report: list[ProbeReport] = []
    thread = threading.Thread(target=lambda: report.append(listener.serve()))
    thread.start()
    return Listening(listener.address, report, thread)


@pytest.fixture
def stream(ends: Ends) -> Iterator[Any]:
    """Open streams to a listener by hand, as a dialler that does what it likes."""
    opened: list[ssl.SSLSocket] = []

    def open_stream(address: str, site_id: str = "hamburg") -> Stream:
        opened.append(_dialled(ends.folder / site_id, address))
        return Stream(opened[-1])

    yield open_stream
    for connection in opened:
        connection.close()


def _dialled(folder: Path, address: str) -> ssl.SSLSocket:
    context = client_context(*(str(folder / name) for name in ("certificate.pem", "key.pem", "ca.pem")))
    host, _, port = address.rpartition(":")
    return context.wrap_socket(socket.create_connection((host, int(port)), timeout=5))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_two_processes_measure_the_link_and_agree(ends: Ends) -> None:
    address = f"127.0.0.1:{free_port()}"
    configs = [ends.config("bremen", "hamburg", address), ends.config("hamburg", "bremen", address)]
    processes = []
    for config in configs:
        path = ends.folder / config.site_id / "probe.json"
        path.write_text(config.model_dump_json())
        argv = [sys.executable, "-P", "-m", "sites.links.probe", str(path)]
        processes.append(subprocess.Popen(argv, env=own_environment(sys.executable), stdout=subprocess.DEVNULL))
    assert [process.wait(90) for process in processes] == [0, 0]
    listened, dialled = (ProbeReport.model_validate_json(Path(config.result_path).read_bytes()) for config in configs)
    for sender, receiver in ((dialled.sent, listened.received), (listened.sent, dialled.received)):
        assert sender is not None
        assert receiver is not None
        assert sender.size_bytes == receiver.size_bytes == 6 * MEGABYTE
        # Milliseconds on a busy host: how near the rates are says nothing, that each is of its own time does.
        for flow in (sender, receiver):
            assert 0 < flow.bits_per_s <= 1.51 * flow.size_bytes * 8 / flow.seconds
        assert sender.segments_sent is not None
        assert sender.segments_sent > 0
        assert receiver.segments_sent is None
    for report in (listened, dialled):
        assert report.round_trip_s is not None
        assert 0 < report.round_trip_s < 1


def test_a_dialler_waits_for_the_listener_to_come(ends: Ends) -> None:
    address = f"127.0.0.1:{free_port()}"
    dials, listens = ends.config("hamburg", "bremen", address), ends.config("bremen", "hamburg", address)
    dialled: list[ProbeReport] = []
    dialler = threading.Thread(target=lambda: dialled.append(run_probe(dials)))
    dialler.start()
    assert run_probe(listens).failed == ""
    dialler.join(90)
    assert dialled[0].failed == ""


def test_a_third_site_is_refused_and_the_probe_goes_on(ends: Ends, stream: Any) -> None:
    ends.key("lubeck")
    listening = listen(ends)
    stranger = stream(listening.address, "lubeck")
    with pytest.raises(Refusal) as refused:
        stranger.expect_word()
    assert refused.value.reason is Reason.PEER
    assert run_probe(ends.config("hamburg", "bremen", listening.address)).failed == ""
    assert listening.end().failed == ""


def test_a_dialler_tells_the_listener_nothing_unless_it_is_the_peer(ends: Ends) -> None:
    listening = listen(ends, deadline_s=time.monotonic() + 0.5)
    report = run_probe(ends.config("hamburg", "lubeck", listening.address))
    assert "[peer.refused]" in report.failed
    assert "was not begun by its peer" in listening.end().failed


def test_a_caller_without_a_certificate_is_refused_in_the_handshake(ends: Ends) -> None:
    listening = listen(ends, deadline_s=time.monotonic() + 0.5)
    context = ssl.create_default_context(cafile=str(ends.folder / "bremen" / "ca.pem"))
    context.check_hostname = False
    host, _, port = listening.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as raw,
        context.wrap_socket(raw) as connection,
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
    ):
        connection.recv(1)
    listening.end()


def test_an_ended_certificate_is_refused(ends: Ends, tmp_path: Path) -> None:
    past = ManualClock()
    past.step_utc_s(time.time() - 3600 - past.now_ms() / 1000)
    late = Ends(tmp_path / "late", Authority(tmp_path / "market", past))  # the same authority, an hour ago
    late.folder.mkdir()
    late.key("hamburg")
    listening = listen(ends, deadline_s=time.monotonic() + 0.5)
    # It only listens: who writes to a connection that was refused may lose the reason.
    with _dialled(late.folder / "hamburg", listening.address) as connection, pytest.raises(ssl.SSLError) as refused:
        connection.recv(1)
    assert refused.value.reason == "SSLV3_ALERT_CERTIFICATE_EXPIRED"
    assert "was not begun" in listening.end().failed


def test_a_hello_beyond_the_order_is_refused(ends: Ends, stream: Any) -> None:
    listening = listen(ends, deadline_s=time.monotonic() + 1)
    for hello, reason in (
        (Hello(probe_id="probe_b", stream=0, bytes_max=1), Reason.NOT_FOUND),
        (Hello(probe_id=PROBE, stream=3, bytes_max=1), Reason.TOO_LARGE),
        (Hello(probe_id=PROBE, stream=0, bytes_max=7 * MEGABYTE), Reason.TOO_LARGE),
        (Word(detail="x" * 900), Reason.MALFORMED),
    ):
        dialler = stream(listening.address)
        dialler.say(hello)
        with pytest.raises(Refusal) as refused:
            dialler.expect_word()
        assert refused.value.reason is reason
    assert "was not begun" in listening.end().failed


def test_a_probe_that_expired_is_refused(ends: Ends, stream: Any) -> None:
    listening = listen(ends, deadline_s=time.monotonic() + 0.2)
    listening.end()
    with pytest.raises((Refusal, OSError)):
        _greet(stream(listening.address))


def _greet(dialler: Stream) -> None:
    dialler.say(Hello(probe_id=PROBE, stream=0, bytes_max=1))
    dialler.expect_word()


def test_each_stream_serves_once(ends: Ends, stream: Any) -> None:
    listening = listen(ends, deadline_s=time.monotonic() + 1)
    hello = Hello(probe_id=PROBE, stream=1, bytes_max=MEGABYTE)
    for _ in range(2):
        dialler = stream(listening.address)
        dialler.say(hello)
    with pytest.raises(Refusal, match="serves once"):
        dialler.expect_word()
    listening.end()


def test_a_dialler_that_sends_more_than_its_bytes_ends_the_probe(ends: Ends, stream: Any) -> None:
    listening = listen(ends, bytes_max=MEGABYTE)
    dialler = stream(listening.address)
    dialler.say(Hello(probe_id=PROBE, stream=1, bytes_max=MEGABYTE))
    dialler.expect_word()
    with pytest.raises((Refusal, OSError)):
        dialler.send(Allowance(2 * MEGABYTE), 5.0)
    assert "more than this probe may" in listening.end().failed


def test_the_rate_leaves_out_the_slow_start() -> None:
    # A second of nothing much, then two at 8 Mbit/s, over two streams.
    slow = Passed([(0.0, 0), (1.0, 1000), (2.0, 501_000), (3.0, 1_001_000)], segments_sent=100, segments_again=2)
    flow = flow_of([slow, slow])
    assert flow is not None
    assert (flow.size_bytes, flow.seconds) == (2_002_000, 3.0)
    assert flow.bits_per_s == pytest.approx(8e6)
    assert (flow.segments_sent, flow.segments_again) == (200, 4)


def test_nothing_sent_is_no_figure() -> None:
    assert flow_of([Passed()]) is None
