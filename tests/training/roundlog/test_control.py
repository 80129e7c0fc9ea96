"""An agent and a gateway may be of different versions for as long as an attempt lasts."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from training.roundlog.control import GatewayControl, GatewayControlError


def test_answer_of_another_version_is_an_error_of_the_gateway_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                body = b'{"view_number": 1, "an_older_field": 2}'
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(GatewayControlError) as refused:
            GatewayControl(str(path)).status()
        thread.join()
    assert refused.value.reason == "gateway.version"
