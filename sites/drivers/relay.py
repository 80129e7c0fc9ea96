"""Carry ranks' connections from a cluster's node to the gateway on the agent's host. Standard library only.

    python -I -S relay.py host FOLDER     on the agent's host: from TCP to the gateway's Unix socket
    python -I -S relay.py node FOLDER     on a node: from a Unix socket of its own to TCP

FOLDER/relay.json names both sockets, the host's address and a secret of this one run; the host's side writes its
port into FOLDER/port.json, and each new connection reads it again, so either side may be started anew.
Both sides prove that they know the secret. What is carried is not encrypted: the cluster's network is the operator's.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import secrets
import signal
import stat
import sys
from pathlib import Path
from typing import Any, TypeAlias

NONCE_BYTES = 32
HANDSHAKE_TIMEOUT_S = 5.0
CONNECTIONS_MAX = 64
CHUNK = 256 * 1024

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter


class Relay:
    """One side's connections."""

    def __init__(self, folder: Path) -> None:
        """Read what both sides know."""
        self.folder = folder
        self.known: dict[str, Any] = json.loads((folder / "relay.json").read_text())
        self.secret = bytes.fromhex(self.known["secret"])
        self.open = 0
        self.over = asyncio.Event()
        self.is_leaving = False

    async def host(self) -> None:
        """Take the nodes' connections to the gateway until SIGTERM."""
        server = await asyncio.start_server(self._from_node, self.known["host"], 0)
        partial = self.folder / "port.json.partial"
        partial.write_text(json.dumps({"port": server.sockets[0].getsockname()[1]}))
        partial.replace(self.folder / "port.json")
        await self._until_left(server)

    async def node(self) -> None:
        """Take the ranks' connections to the agent's host until SIGTERM, and those that are open to their end."""
        path = Path(self.known["node_socket"])
        _clear(path)
        await self._until_left(await asyncio.start_unix_server(self._from_rank, str(path)))

    async def _until_left(self, server: asyncio.Server) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._leave)
        await self.over.wait()
        server.close()

    def _leave(self) -> None:
        self.is_leaving = True
        if not self.open:
            self.over.set()

    async def _from_node(self, reader: Reader, writer: Writer) -> None:
        async with Counted(self, writer):
            own = secrets.token_bytes(NONCE_BYTES)
            writer.write(own)
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                told = await reader.readexactly(NONCE_BYTES + hashlib.sha256().digest_size)
            theirs = told[:NONCE_BYTES]
            if not hmac.compare_digest(told[NONCE_BYTES:], self._proof(b"node", own, theirs)):
                return
            writer.write(self._proof(b"host", own, theirs))
            await carry(reader, writer, *await asyncio.open_unix_connection(self.known["gateway_socket"]))

    async def _from_rank(self, reader: Reader, writer: Writer) -> None:
        async with Counted(self, writer):
            port = json.loads((self.folder / "port.json").read_text())["port"]
            outer_reader, outer_writer = await asyncio.open_connection(self.known["host"], port)
            async with Counted(self, outer_writer):
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    theirs = await outer_reader.readexactly(NONCE_BYTES)
                    own = secrets.token_bytes(NONCE_BYTES)
                    outer_writer.write(own + self._proof(b"node", theirs, own))
                    proof = await outer_reader.readexactly(hashlib.sha256().digest_size)
                if hmac.compare_digest(proof, self._proof(b"host", theirs, own)):
                    await carry(reader, writer, outer_reader, outer_writer)

    def _proof(self, side: bytes, of_host: bytes, of_node: bytes) -> bytes:
        return hmac.new(self.secret, side + of_host + of_node, hashlib.sha256).digest()


def _clear(path: Path) -> None:
    """Make the socket's folder this user's alone, and remove a former run's socket; of two nodes on one host either's will do."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    owner = path.parent.lstat()
    # The name can be guessed, so a stranger may have been first.
    if not stat.S_ISDIR(owner.st_mode) or owner.st_uid != os.getuid():
        raise SystemExit(f"{path.parent} belongs to someone else; remove it on this node")
    path.unlink(missing_ok=True)


class Counted:
    """A connection that is closed at the end, whatever its sides did; beyond the limit it is closed at once."""

    def __init__(self, relay: Relay, writer: Writer) -> None:
        """Belong to `relay`."""
        self.relay = relay
        self.writer = writer

    async def __aenter__(self) -> None:
        """Count it."""
        self.relay.open += 1
        if self.relay.open > CONNECTIONS_MAX:
            self.relay.open -= 1
            self.writer.close()
            raise ConnectionAbortedError("too many connections")

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        """Close it; a side that broke off is no error of ours."""
        self.writer.close()
        self.relay.open -= 1
        if self.relay.is_leaving and not self.relay.open:
            self.relay.over.set()
        return kind is not None and issubclass(kind, OSError | EOFError | ValueError)


async def carry(reader: Reader, writer: Writer, other_reader: Reader, other_writer: Writer) -> None:
    """Copy both ways until both sides have ended."""
    try:
        await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer))
    finally:
        other_writer.close()


async def _copy(source: Reader, target: Writer) -> None:
    while chunk := await source.read(CHUNK):
        target.write(chunk)
        await target.drain()
    target.write_eof()


async def main(side: str, folder: Path) -> None:
    """Be one side."""
    relay = Relay(folder)
    await (relay.host() if side == "host" else relay.node())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
