"""The relay: what a rank says on its node arrives at the gateway's socket, for those alone who know the run's secret."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sites.drivers import relay
from sites.drivers.relay import NONCE_BYTES
from tests.sites.waiting import wait_until


@contextmanager
def side(name: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-I", "-S", relay.__file__, name, str(folder)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a relay whose gateway says everything twice."""
    (tmp_path / "relay.json").write_text(
        json.dumps(
            {
                "host": "127.0.0.1",
                "secret": "ab" * 32,
                "gateway_socket": str(tmp_path / "gateway.sock"),
                "node_socket": str(tmp_path / "node" / "ranks.sock"),
            }
        )
    )
    return tmp_path


@pytest.fixture
def heard(folder: Path) -> Iterator[list[bytes]]:
    heard: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "gateway.sock"))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with connection:
                said = b""
                while chunk := connection.recv(1_000_000):
                    said += chunk
                heard.append(said)
                connection.sendall(said + said)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield heard
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def ask(path: Path, words: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as rank:
        rank.settimeout(10)
        rank.connect(str(path))
        rank.sendall(words)
        rank.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := rank.recv(1_000_000):
            answer += chunk
    return answer


def test_words_arrive_and_the_answer_too_though_the_host_s_side_was_started_anew(
    folder: Path, heard: list[bytes]
) -> None:
    words = os.urandom(3_000_000)
    path = folder / "node" / "ranks.sock"
    with side("node", folder):
        for _ in range(2):
            with side("host", folder):
                wait_until(lambda: path.exists() and (folder / "port.json").exists())
                assert ask(path, words) == words + words
            (folder / "port.json").unlink()
    assert heard == [words, words]


def test_stranger_without_the_secret_reaches_nothing(folder: Path, heard: list[bytes]) -> None:
    with side("host", folder):
        port = json.loads(wait_until(lambda: (p := folder / "port.json").exists() and p.read_text()))["port"]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            assert len(stranger.recv(NONCE_BYTES)) == NONCE_BYTES
            stranger.sendall(os.urandom(NONCE_BYTES + 32) + b"GET /position HTTP/1.1\r\n\r\n")
            answer = b""
            with suppress(ConnectionResetError):  # it was hung up on with words unread
                answer = stranger.recv(100)
            assert answer == b""
    assert heard == []


def test_node_s_side_leaves_with_its_last_connection(folder: Path, heard: list[bytes]) -> None:
    path = folder / "node" / "ranks.sock"
    with side("host", folder), side("node", folder) as node, socket.socket(socket.AF_UNIX) as rank:
        wait_until(lambda: path.exists() and (folder / "port.json").exists())
        rank.connect(str(path))
        rank.sendall(b"half ")
        wait_until(lambda: len(list(Path(f"/proc/{node.pid}/fd").iterdir())) >= 8)  # both ends are open
        node.send_signal(signal.SIGTERM)
        rank.sendall(b"a sentence")
        rank.shutdown(socket.SHUT_WR)
        rank.settimeout(10)
        assert rank.recv(100) == b"half a sentencehalf a sentence"
        rank.close()
        assert node.wait(10) == 0
