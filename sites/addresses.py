"""Where this site's processes listen for other sites: a free port of the range that the operator opened."""

from __future__ import annotations

import socket
from collections.abc import Collection

from sites.settings import ListenSettings


def free_address(listen: ListenSettings, taken: Collection[str | None]) -> str | None:
    """Return the address of a free port as other sites reach it, None where every port is in use or `taken`."""
    bind = (listen.bind or listen.host).strip("[]")
    first, last = listen.ports or (0, 0)
    for port in range(first, last + 1):
        address = f"{listen.host}:{port}"
        if address in taken:
            continue
        with socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((bind, port))
            except OSError:
                continue
            return f"{listen.host}:{probe.getsockname()[1]}"
    return None


def bound_address(listen: ListenSettings, address: str) -> str:
    """Return where to bind what other sites reach at `address`; the two differ behind a NAT."""
    return f"{listen.bind or listen.host}:{address.rpartition(':')[2]}"
