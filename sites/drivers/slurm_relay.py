"""The agent's end of the relays: one process for each run whose nodes are other hosts, under the process driver."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from pathlib import Path
from typing import Final

from sites.drivers import relay
from sites.drivers.interface import Limits, Run
from sites.drivers.process import ProcessDriver, write_document

STARTS_MAX: Final = 20


class Relays:
    """The relays of a site's runs; each lies in a folder of its run's."""

    def __init__(self, local: ProcessDriver, python: str, gateway_host: str | None) -> None:
        """Start relays on `local`, listening at `gateway_host`; None where nodes need none."""
        self._local = local
        self._python = python
        self._gateway_host = gateway_host

    def ranks_socket(self, gateway_socket: Path) -> Path:
        """Return where ranks find their gateway: a relay's socket on their own node, or the gateway's own."""
        if self._gateway_host is None:
            return gateway_socket
        name = hashlib.sha256(os.fsencode(gateway_socket)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"hansa-node-{name}" / "ranks.sock"

    def start(self, run: Run) -> Path | None:
        """Start the relay of `run` and return its folder, which holds the secret that both ends share; None without."""
        if run.socket is None or self._gateway_host is None:
            return None
        folder = run.folder / "relay"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        document = {
            "host": self._gateway_host,
            "secret": secrets.token_hex(32),
            "gateway_socket": str(run.socket),
            "node_socket": str(self.ranks_socket(run.socket)),
        }
        if not (folder / "relay.json").exists():
            write_document(folder / "relay.json", document)
        self._start(folder, 1, run.deadline_s)
        return folder

    def keep(self, run_folder: Path, deadline_s: float) -> None:
        """Start the relay again where it died; the nodes read its new port."""
        number = self._number(run_folder)
        if 0 < number < STARTS_MAX and self._local.poll(self._newest(run_folder)).is_over:
            self._start(run_folder / "relay", number + 1, deadline_s)

    def renew(self, run_folder: Path, deadline_s: float) -> None:
        """Let the relay live until `deadline_s`."""
        if self._number(run_folder):
            self._local.renew(self._newest(run_folder), deadline_s)

    def stop(self, run_folder: Path) -> None:
        """End the relay."""
        if self._number(run_folder):
            self._local.stop(self._newest(run_folder))

    def _start(self, folder: Path, number: int, deadline_s: float) -> None:
        self._local.start(
            Run(
                folder=folder / str(number),
                argv=(self._python, "-I", "-S", relay.__file__, "host", str(folder)),
                cwd=folder,
                environment={"PATH": os.defpath},
                log_path=folder / "relay.log",
                deadline_s=deadline_s,
                limits=Limits(open_files=1024),
            )
        )

    @staticmethod
    def _number(run_folder: Path) -> int:
        return max((int(path.name) for path in (run_folder / "relay").glob("[0-9]*")), default=0)

    def _newest(self, run_folder: Path) -> Path:
        return run_folder / "relay" / str(self._number(run_folder))
