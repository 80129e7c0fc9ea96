"""One stream of a probe: lines of JSON to agree, pings, and bytes for a while in chunks that state their length.

    dialler   hello            -> listener   ok, or why not
    dialler   ping …          <-> listener                       (the first stream alone)
    dialler   chunks, 0        -> listener   receipt
    dialler   go               -> listener   chunks, 0
    dialler   receipt          -> listener

Both ends note how many bytes had passed when: the receiver what it read, the sender what its kernel saw acknowledged.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sites.links.messages import Flow, ProbeId
from sites.links.tcp_info import TcpInfo, read_tcp_info
from training.roundlog.errors import Reason, Refusal

CHUNK_BYTES: Final = 64 * 1024
LINE_BYTES_MAX: Final = 2000
PINGS: Final = 10
_PING: Final = b"ping"
_LENGTH_BYTES: Final = 4
# TLS makes of it what no machine on the way can compress.
_PADDING: Final = bytes(CHUNK_BYTES)
# The share of the time in which streams are still opening their windows.
_RAMP_SHARE: Final = 1 / 3
_SHORTEST_S: Final = 1e-6

Line = TypeVar("Line", bound=BaseModel)


class Hello(BaseModel):
    """What a dialler says first on each stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe_id: ProbeId
    stream: int = Field(ge=0)
    bytes_max: int = Field(ge=1)


class Word(BaseModel):
    """Any other line: `refused` with a reason and its sentence, or that it goes on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    refused: Reason | None = None
    detail: str = Field(default="", max_length=1000)


class Allowance:
    """The bytes that all streams of one direction may take together."""

    def __init__(self, bytes_max: int) -> None:
        """Allow `bytes_max` bytes."""
        self._left = bytes_max
        self._lock = threading.Lock()

    def take(self, wanted: int) -> int:
        """Return how many of the wanted bytes are still allowed, and count them."""
        with self._lock:
            taken = min(wanted, self._left)
            self._left -= taken
            return taken


@dataclass(slots=True)
class Passed:
    """How many bytes of one stream had passed when (monotonic seconds), and what the kernel knew at the end."""

    points: list[tuple[float, int]] = field(default_factory=list)
    segments_sent: int | None = None
    segments_again: int | None = None


class Stream:
    """A TLS connection of a probe, blocking; the socket's timeout bounds every wait."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        """Speak over `connection`, whose peer has been checked."""
        self._connection = connection

    def say(self, line: BaseModel) -> None:
        """Send one line."""
        self._connection.sendall(line.model_dump_json(exclude_defaults=True).encode() + b"\n")

    def hear(self, kind: type[Line]) -> Line:
        """Return the next line. Raises Refusal for one that is too long or of another form."""
        text = bytearray()
        while not text.endswith(b"\n"):
            if len(text) >= LINE_BYTES_MAX:
                raise Refusal(Reason.TOO_LARGE, "a line of a probe is longer than it may be")
            text += self._some(1)
        try:
            return kind.model_validate_json(bytes(text))
        except ValidationError:
            raise Refusal(Reason.MALFORMED, "a line of a probe is not of the agreed form") from None

    def expect_word(self) -> None:
        """Wait for the other end to go on. Raises Refusal with its reason where it does not."""
        word = self.hear(Word)
        if word.refused is not None:
            raise Refusal(word.refused, word.detail)

    def ping(self) -> float:
        """Return the shortest round trip of some, in seconds."""
        return min(self._round_trip() for _ in range(PINGS))

    def answer_pings(self) -> None:
        """Send back what `ping` sends."""
        for _ in range(PINGS):
            self._connection.sendall(self._exactly(len(_PING)))

    def send(self, allowance: Allowance, seconds_max: float) -> Passed:
        """Send until the allowance or the time is spent, and wait for the receipt."""
        before, passed, sent = read_tcp_info(self._connection), Passed(), 0
        began_s = time.monotonic()
        passed.points.append((began_s, 0))
        while time.monotonic() - began_s < seconds_max and (length := allowance.take(CHUNK_BYTES)):
            self._connection.sendall(length.to_bytes(_LENGTH_BYTES) + _PADDING[:length])
            sent += length
            passed.points.append((time.monotonic(), _acked(before, read_tcp_info(self._connection), sent)))
        self._connection.sendall(bytes(_LENGTH_BYTES))
        self.expect_word()
        passed.points.append((time.monotonic(), sent))
        after = read_tcp_info(self._connection)
        if before is not None and after is not None:
            passed.segments_sent = after.segments_out - before.segments_out
            passed.segments_again = after.segments_again - before.segments_again
        return passed

    def receive(self, allowance: Allowance) -> Passed:
        """Receive until the other end says that it was all, and give the receipt. Raises Refusal for too much."""
        passed, received = Passed(), 0
        while length := int.from_bytes(self._exactly(_LENGTH_BYTES)):
            if not passed.points:
                passed.points.append((time.monotonic(), 0))
            if length > CHUNK_BYTES or allowance.take(length) < length:
                raise Refusal(Reason.TOO_LARGE, "the other end sends more than this probe may")
            self._exactly(length)
            received += length
            passed.points.append((time.monotonic(), received))
        self.say(Word())
        return passed

    def round_trip_s(self) -> float | None:
        """Return the least round trip that the kernel saw, None where it does not tell."""
        info = read_tcp_info(self._connection)
        return None if info is None else info.round_trip_s

    def _round_trip(self) -> float:
        began_s = time.monotonic()
        self._connection.sendall(_PING)
        self._exactly(len(_PING))
        return time.monotonic() - began_s

    def _exactly(self, length: int) -> bytes:
        held = bytearray()
        while len(held) < length:
            held += self._some(length - len(held))
        return bytes(held)

    def _some(self, most: int) -> bytes:
        read = self._connection.recv(most)
        if not read:
            raise ConnectionResetError("the other end closed the connection")
        return read


def flow_of(streams: Sequence[Passed]) -> Flow | None:
    """Return what passed in one direction over all streams, None where nothing did.

    The rate is of what passed after the first third of the time, in which windows still open.
    """
    steps = sorted(
        (at_s, later - earlier)
        for passed in streams
        for (_, earlier), (at_s, later) in zip([(0.0, 0), *passed.points], passed.points, strict=False)
    )
    total = sum(size for _, size in steps)
    if not total:
        return None
    began_s, ended_s = steps[0][0], steps[-1][0]
    cut_s = began_s + (ended_s - began_s) * _RAMP_SHARE
    ramp = [step for step in steps if step[0] <= cut_s]
    from_s = ramp[-1][0]
    steady = (total - sum(size for _, size in ramp)) * 8 / max(ended_s - from_s, _SHORTEST_S)
    segments = [(passed.segments_sent, passed.segments_again) for passed in streams]
    told = [(sent, again) for sent, again in segments if sent is not None and again is not None]
    return Flow(
        size_bytes=total,
        seconds=max(ended_s - began_s, _SHORTEST_S),
        bits_per_s=max(steady, 1.0),
        segments_sent=sum(sent for sent, _ in told) if len(told) == len(streams) else None,
        segments_again=sum(again for _, again in told) if len(told) == len(streams) else None,
    )


def _acked(before: TcpInfo | None, now: TcpInfo | None, sent: int) -> int:
    """Return how much of what was sent has arrived; TLS adds a little to it on the way."""
    if before is None or now is None:
        return sent
    return min(sent, max(0, now.bytes_acked - before.bytes_acked))
