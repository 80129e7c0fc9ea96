"""A probe of one link: a short process at each of two sites, one listening on a port of its hub, one dialling.

    python -P -m sites.links.probe probe.json

Both show a certificate that the broker's authority made for this probe alone (`training.roundlog.credentials`: mutual TLS
1.3, the peer pinned by name and key). The listener serves each stream of the probe once and then is gone, so nothing can be
used a second time. What each end saw goes to `result_path`; the agent reports it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, Field

from sites.identity import write_private
from sites.links.messages import PROBE_BYTES_MAX, PROBE_STREAMS_MAX, ProbeId, ProbeReport
from sites.links.stream import Allowance, Hello, Passed, Stream, Word, flow_of
from training.roundlog.credentials import client_context, is_peer, peer_uri, server_context
from training.roundlog.errors import Reason, Refusal
from training.roundlog.view import Hash
from training.spec import SiteId

# Stands where an attempt's certificate has its epoch: a probe has one, its name.
PROBE_EPOCH: Final = 1
HANDSHAKE_WAIT_S: Final = 5.0
# Between two lines, or two chunks: a link that is silent for longer has failed.
SILENCE_S: Final = 10.0
# Strangers may knock; so many at once are heard, each for the time of a handshake.
CALLERS_MAX: Final = 2 * PROBE_STREAMS_MAX
_DIAL_AGAIN_S: Final = 0.2
_ACCEPT_WAIT_S: Final = 0.1

log: Final = structlog.get_logger(__name__)


class ProbeConfig(BaseModel):
    """What one end of a probe needs to know. `address` is where to listen or dial; `deadline_s` is monotonic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe_id: ProbeId
    listens: bool
    site_id: SiteId
    peer: SiteId
    peer_key: Hash
    address: str
    streams: int = Field(ge=1, le=PROBE_STREAMS_MAX)
    bytes_max: int = Field(ge=1, le=PROBE_BYTES_MAX)
    seconds_max: float = Field(gt=0)
    deadline_s: float
    certificate_path: str
    key_path: str
    ca_path: str
    result_path: str

    @property
    def peer_uri(self) -> str:
        """The name in the other end's certificate."""
        return peer_uri(self.probe_id, PROBE_EPOCH, self.peer)


class Ends:
    """One end of a probe: both directions over all streams, and what came of them."""

    def __init__(self, config: ProbeConfig) -> None:
        """Prepare; nothing is opened."""
        self.config = config
        self.outward, self.inward = Allowance(config.bytes_max), Allowance(config.bytes_max)
        self._sent: list[Passed] = []
        self._received: list[Passed] = []
        self._round_trips_s: list[float] = []
        self._lock = threading.Lock()

    def add(self, *, sent: Passed | None = None, received: Passed | None = None) -> None:
        """Keep what passed over one stream."""
        with self._lock:
            self._sent += [] if sent is None else [sent]
            self._received += [] if received is None else [received]

    def add_round_trip(self, seconds: float | None) -> None:
        """Keep one reading of the round trip."""
        with self._lock:
            self._round_trips_s += [] if seconds is None else [seconds]

    def report(self) -> ProbeReport:
        """Return what was seen."""
        return ProbeReport(
            probe_id=self.config.probe_id,
            sent=flow_of(self._sent),
            received=flow_of(self._received),
            round_trip_s=min(self._round_trips_s, default=None),
        )


def dial(config: ProbeConfig) -> ProbeReport:
    """Open the streams, send over all of them at once, then receive. Raises Refusal, OSError."""
    ends = Ends(config)
    context = client_context(config.certificate_path, config.key_path, config.ca_path)
    with contextlib.ExitStack() as stack:
        streams = []
        for number in range(config.streams):
            connection = stack.enter_context(_dialled(config, context))
            streams.append(Stream(connection))
            streams[-1].say(Hello(probe_id=config.probe_id, stream=number, bytes_max=config.bytes_max))
            streams[-1].expect_word()
        ends.add_round_trip(streams[0].ping())
        with ThreadPoolExecutor(config.streams, thread_name_prefix="stream") as threads:
            for sent in threads.map(lambda stream: stream.send(ends.outward, config.seconds_max), streams):
                ends.add(sent=sent)
            for stream in streams:
                stream.say(Word())
            for received in threads.map(lambda stream: stream.receive(ends.inward), streams):
                ends.add(received=received)
        ends.add_round_trip(streams[0].round_trip_s())
    return ends.report()


class ProbeListener:
    """The listening end: serves each of the probe's streams once, refuses everyone and everything else."""

    def __init__(self, config: ProbeConfig) -> None:
        """Bind the port. Raises OSError where that cannot be."""
        self._config = config
        self._ends = Ends(config)
        self._context = server_context(config.certificate_path, config.key_path, config.ca_path)
        host, _, port = config.address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, int(port)), family=family, backlog=CALLERS_MAX)
        self._claimed: set[int] = set()
        self._served = 0
        self._failed: list[str] = []
        self._lock = threading.Lock()
        self.address = f"{host}:{self._server.getsockname()[1]}"

    def serve(self) -> ProbeReport:
        """Serve until every stream is done, one has failed, or the probe expires."""
        config, callers = self._config, list[threading.Thread]()
        with self._server:
            self._server.settimeout(_ACCEPT_WAIT_S)
            while not self._is_over() and time.monotonic() < config.deadline_s:
                with contextlib.suppress(TimeoutError):
                    raw, _ = self._server.accept()
                    callers = [caller for caller in callers if caller.is_alive()]
                    if len(callers) >= CALLERS_MAX:
                        raw.close()
                        continue
                    callers.append(threading.Thread(target=self._hear, args=(raw,), daemon=True))
                    callers[-1].start()
        with self._lock:
            failed, served, dialled = self._failed, self._served, bool(self._claimed)
        if failed:
            return ProbeReport(probe_id=config.probe_id, failed=failed[0][:1000])
        if served < config.streams:
            late = "was not done" if dialled else "was not begun by its peer"
            return ProbeReport(
                probe_id=config.probe_id, failed=f"the probe with {config.peer} {late} before it expired"
            )
        return self._ends.report()

    def _is_over(self) -> bool:
        with self._lock:
            return self._served == self._config.streams or bool(self._failed)

    def _hear(self, raw: socket.socket) -> None:
        """Serve one caller, whoever it is."""
        with contextlib.suppress(OSError), raw:
            raw.settimeout(HANDSHAKE_WAIT_S)
            with self._context.wrap_socket(raw, server_side=True) as connection:
                stream = Stream(connection)
                try:
                    number = self._admit(connection, stream)
                except Refusal as refusal:
                    log.warning(
                        "probe.refused", probe=self._config.probe_id, reason=refusal.reason, detail=str(refusal)
                    )
                    stream.say(Word(refused=refusal.reason, detail=str(refusal)[:1000]))
                    return
                connection.settimeout(SILENCE_S)
                try:
                    self._serve(stream, first=number == 0)
                except (Refusal, OSError) as error:
                    with self._lock:
                        self._failed.append(f"stream {number} broke off: {error}")
                    if isinstance(error, Refusal):
                        stream.say(Word(refused=error.reason, detail=str(error)[:1000]))

    def _admit(self, connection: ssl.SSLSocket, stream: Stream) -> int:
        """Return the number of the stream that a caller may use. Raises Refusal for a stranger or a second use."""
        config = self._config
        if not is_peer(connection.getpeercert(binary_form=True), config.peer_uri, config.peer_key):
            raise Refusal(Reason.PEER, f"this probe is with {config.peer} under the key that the broker named")
        hello = stream.hear(Hello)
        if hello.probe_id != config.probe_id:
            raise Refusal(Reason.NOT_FOUND, "no such probe is awaited here; ask the broker for another")
        if time.monotonic() >= config.deadline_s:
            raise Refusal(Reason.CERTIFICATE, "this probe has expired; ask the broker for another")
        if hello.bytes_max > config.bytes_max or hello.stream >= config.streams:
            raise Refusal(
                Reason.TOO_LARGE, f"this probe is of {config.streams} streams, {config.bytes_max} bytes a way"
            )
        with self._lock:
            if hello.stream in self._claimed:
                raise Refusal(Reason.NOT_FOUND, f"stream {hello.stream} of this probe was used; each serves once")
            self._claimed.add(hello.stream)
        return hello.stream

    def _serve(self, stream: Stream, *, first: bool) -> None:
        stream.say(Word())
        if first:
            stream.answer_pings()
        self._ends.add(received=stream.receive(self._ends.inward))
        stream.expect_word()
        self._ends.add(sent=stream.send(self._ends.outward, self._config.seconds_max))
        if first:
            self._ends.add_round_trip(stream.round_trip_s())
        with self._lock:
            self._served += 1


def run_probe(config: ProbeConfig) -> ProbeReport:
    """Run one end of a probe and return what it saw, or why it failed."""
    work: Callable[[], ProbeReport] = (
        (lambda: ProbeListener(config).serve()) if config.listens else (lambda: dial(config))
    )
    try:
        return work()
    except (Refusal, OSError) as error:
        reason = f" [{error.reason.value}]" if isinstance(error, Refusal) else ""
        failed = f"the probe with {config.peer} at {config.address} failed: {error}{reason}"
        return ProbeReport(probe_id=config.probe_id, failed=failed[:1000])


def _dialled(config: ProbeConfig, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return a connection to the peer itself; the other end may need a moment until it listens. Raises OSError."""
    host, _, port = config.address.rpartition(":")
    while True:
        try:
            raw = socket.create_connection((host.strip("[]"), int(port)), timeout=HANDSHAKE_WAIT_S)
            break
        except OSError:
            if time.monotonic() + _DIAL_AGAIN_S >= config.deadline_s:
                raise
            threading.Event().wait(_DIAL_AGAIN_S)
    try:
        connection = context.wrap_socket(raw)
    except OSError:
        raw.close()
        raise
    # Nothing is sent to a peer that is someone else.
    if not is_peer(connection.getpeercert(binary_form=True), config.peer_uri, config.peer_key):
        connection.close()
        raise Refusal(Reason.PEER, f"{config.address} is not {config.peer} with the key that the broker named")
    connection.settimeout(SILENCE_S)
    return connection


def main(arguments: list[str]) -> int:
    """Run the end of a probe that the file in `arguments` describes."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m sites.links.probe probe.json\n")
        return 2
    config = ProbeConfig.model_validate_json(Path(arguments[0]).read_bytes())
    report = run_probe(config)
    write_private(Path(config.result_path), report.model_dump_json().encode())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
