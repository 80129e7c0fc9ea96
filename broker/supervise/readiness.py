"""Probes that tell when a process serves: each answers yes or no at once, and no for anything unexpected.

They are handed to `broker.supervise.processes`, which asks until yes or until its patience ends.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Final

Probe = Callable[[], bool]

PROBE_TIMEOUT_S: Final = 1.0  # one question; the supervisor asks again
HTTP_OK: Final = range(200, 300)


def http_answers(host: str, port: int, path: str = "/", *, ca: Path | None = None) -> Probe:
    """Return a probe that is satisfied once GET `path` answers with a status of 200 to 299.

    Over plain HTTP, or over TLS with a certificate of the authority in the file `ca`.
    """

    def probe() -> bool:
        connection = _connection(host, port, ca)
        try:
            connection.request("GET", path)
            return connection.getresponse().status in HTTP_OK
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    return probe


def valkey_answers(socket_path: Path) -> Probe:
    """Return a probe that is satisfied once the server at `socket_path` answers PING with PONG."""

    def probe() -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(PROBE_TIMEOUT_S)
                connection.connect(str(socket_path))
                connection.sendall(b"PING\r\n")
                return connection.recv(7).startswith(b"+PONG")
        except OSError:
            return False

    return probe


def _connection(host: str, port: int, ca: Path | None) -> HTTPConnection:
    if ca is None:
        return HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
    return HTTPSConnection(host, port, timeout=PROBE_TIMEOUT_S, context=ssl.create_default_context(cafile=str(ca)))
