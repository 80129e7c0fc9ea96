"""HTTP over a Unix socket with the standard library alone, for ranks and the thin agent."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Final

_HOST: Final = "gateway"

# Reads a successful body in its own way, into a file say, and returns what the caller wants of it.
Receive = Callable[[http.client.HTTPResponse], bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and body of one HTTP exchange."""

    status: int
    body: bytes


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection whose other end is a Unix socket."""

    def __init__(self, socket_path: str, timeout_s: float) -> None:
        """Prepare a connection; it is made by the first request."""
        super().__init__(_HOST, timeout=timeout_s)
        self._socket_path = socket_path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(self._socket_path)


def exchange(
    socket_path: str,
    method: str,
    path: str,
    *,
    body: bytes | IO[bytes] | None = None,
    length: int | None = None,
    timeout_s: float,
    body_bytes_max: int,
    receive: Receive | None = None,
) -> Answer:
    """Make one request on a connection of its own and return the answer.

    Raises OSError or
    http.client.HTTPException where the other end is away or breaks off.
    """
    connection = UnixConnection(socket_path, timeout_s)
    try:
        headers = {} if length is None else {"Content-Length": str(length)}
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        if receive is not None and response.status == http.client.OK:
            return Answer(response.status, receive(response))
        received = response.read(body_bytes_max + 1)
        if len(received) > body_bytes_max:
            message = f"{method} {path} answered more than {body_bytes_max} bytes"
            raise http.client.HTTPException(message)
        if response.length:
            raise http.client.IncompleteRead(received, response.length)
        return Answer(response.status, received)
    finally:
        connection.close()
