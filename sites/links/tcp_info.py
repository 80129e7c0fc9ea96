"""What Linux knows of a TCP connection (`struct tcp_info`, linux/tcp.h): acknowledged bytes, retransmits, round trip."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final

# u64 bytes_acked at 120; u32 total_retrans at 100, min_rtt at 148, data_segs_out at 156. Fields are only ever appended.
_TOTAL_RETRANS: Final = 100
_BYTES_ACKED: Final = 120
_MIN_RTT: Final = 148
_DATA_SEGMENTS_OUT: Final = 156
_SIZE: Final = 160
_MICROSECONDS_PER_S: Final = 1_000_000
# What the kernel says before the first round trip was measured.
_RTT_UNKNOWN: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """One reading. `segments_out` counts those with data, sent again or not; `round_trip_s` is the least one seen."""

    bytes_acked: int
    segments_out: int
    segments_again: int
    round_trip_s: float | None


def read_tcp_info(connection: socket.socket) -> TcpInfo | None:
    """Return what the kernel knows of a connection, None where it does not tell."""
    try:
        raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
    except (OSError, AttributeError):
        return None  # another system, or a connection that is gone
    if len(raw) < _SIZE:
        return None
    (bytes_acked,) = struct.unpack_from("=Q", raw, _BYTES_ACKED)
    (again,) = struct.unpack_from("=I", raw, _TOTAL_RETRANS)
    (min_rtt,) = struct.unpack_from("=I", raw, _MIN_RTT)
    (segments,) = struct.unpack_from("=I", raw, _DATA_SEGMENTS_OUT)
    round_trip_s = None if min_rtt in (0, _RTT_UNKNOWN) else min_rtt / _MICROSECONDS_PER_S
    return TcpInfo(bytes_acked, segments, again, round_trip_s)
