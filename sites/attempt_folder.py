"""The folder of one attempt: its layout, the two files that tell ranks and gateway what they are part of.

`training.attempt` documents the layout; this module writes it. Everything that a rank may write
is opened here again with care: a link that it left in place of a file is not followed.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from sites.errors import ArtifactError
from sites.identity import private_key_pem, write_private
from sites.journal import AttemptKey, AttemptRecord
from training.attempt import AttemptContext, GatewayConfig, NewestCheckpoint
from training.roundlog.credentials import certificate_request, load_attempt_key, new_attempt_key

# sockaddr_un has room for 108 bytes with the closing zero.
_SOCKET_PATH_BYTES_MAX: Final = 107
# A contribution is at most the parameters in fp32 with their headers; the rest is room for small models.
_BYTES_PER_PARAMETER: Final = 8
_CONTRIBUTION_ROOM_BYTES: Final = 16 * 1024 * 1024
_NEWEST_BYTES_MAX: Final = 10_000
AGENT_SOCKET: Final = "agent.sock"
# In a folder of its own, which a sandbox shows to ranks: they find the socket again when a new gateway made it anew.
RANKS_SOCKET: Final = "gate/ranks.sock"


@dataclass(frozen=True, slots=True)
class AttemptFolder:
    """Where the parts of one attempt lie."""

    root: Path

    @classmethod
    def of(cls, site_folder: Path, key: AttemptKey) -> AttemptFolder:
        """Return the folder of an attempt; lease ids are plain names."""
        return cls(site_folder / "attempts" / f"{key[0]}-{key[1]}")

    @property
    def workdir(self) -> Path:
        """The tenant's bundle, unpacked."""
        return self.root / "workdir"

    @property
    def gateway(self) -> Path:
        """What only the gateway reads."""
        return self.root / "gateway"

    @property
    def context(self) -> Path:
        """The file that HANSA_ATTEMPT names."""
        return self.root / "attempt.json"

    @property
    def resume(self) -> Path:
        """The checkpoint that the attempt starts from, if it does."""
        return self.root / "resume.safetensors"

    @property
    def data(self) -> Path:
        """The folder that HANSA_DATA names: a place for each dataset."""
        return self.root / "data"

    @property
    def rank_log(self) -> Path:
        """What setup and ranks printed."""
        return self.root / "rank.log"

    def run(self, name: str) -> Path:
        """Return the folder of one run of the attempt, such as `ranks`."""
        return self.root / "runs" / name

    def socket(self, name: str) -> Path:
        """Return the path of a socket: in the folder, or in a short private one where that is too long."""
        path = self.root / name
        if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES_MAX:
            return path
        short = Path(tempfile.gettempdir()) / f"hansa-{hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]}"
        short.mkdir(mode=0o700, exist_ok=True)
        owner = short.lstat()
        # The name can be guessed, so a stranger may have been first.
        if not stat.S_ISDIR(owner.st_mode) or owner.st_uid != os.getuid():
            raise ArtifactError(f"{short} belongs to someone else; choose a shorter site folder")
        short.chmod(0o700)
        return short / name


def make_credentials(folder: AttemptFolder, job_id: str, epoch: int, site_id: str) -> tuple[Ed25519PrivateKey, str]:
    """Make the attempt's key, or find it, and return it with a request for its certificate."""
    for private in (folder.root, folder.gateway):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder.gateway / "key.pem"
    if not path.exists():
        write_private(path, private_key_pem(new_attempt_key()))
    key = load_attempt_key(path.read_bytes())
    return key, certificate_request(key, job_id, epoch, site_id).decode()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an attempt needs to know of its site."""

    site_id: str
    authority_key: str
    ca_pem: str


def write_attempt(
    folder: AttemptFolder,
    record: AttemptRecord,
    surroundings: Surroundings,
    *,
    listen: str | None,
    resume_from: Path | None,
    ranks_socket: Path | None = None,
) -> None:
    """Write attempt.json, gateway.json and the gateway's certificates, and make the folders they name.

    `ranks_socket` is where ranks find the gateway, where that is not its own socket.
    """
    assert record.order is not None, "an attempt that runs has an order"
    spec, sync = record.order.spec, record.order.sync
    for name in ("checkpoint", "output", "home", "tmp", "gateway/state"):
        (folder.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.socket(RANKS_SOCKET).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    context = AttemptContext(
        job_id=record.job_id,
        site_id=surroundings.site_id,
        epoch=record.epoch,
        gpus=len(record.gpu_ids),
        seed=record.order.seed,
        workload=spec.market.workload,
        sync=sync,
        ranks_socket=str(ranks_socket or folder.socket(RANKS_SOCKET)),
        checkpoint_dir=str(folder.root / "checkpoint"),
        output_dir=str(folder.root / "output"),
        resume_from=str(resume_from) if resume_from else None,
        heir_of=record.order.checkpoint.heir_of if record.order.checkpoint else None,
    )
    gateway = GatewayConfig(
        job_id=record.job_id,
        site_id=surroundings.site_id,
        epoch=record.epoch,
        authority_key=surroundings.authority_key,
        key_path=str(folder.gateway / "key.pem"),
        certificate_path=str(folder.gateway / "certificate.pem"),
        ca_path=str(folder.gateway / "ca.pem"),
        listen=listen,
        ranks_socket=str(folder.socket(RANKS_SOCKET)),
        agent_socket=str(folder.socket(AGENT_SOCKET)),
        state_dir=str(folder.gateway / "state"),
        metrics_path=str(folder.root / "metrics.jsonl"),
        contribution_bytes_max=spec.market.workload.parameters * _BYTES_PER_PARAMETER + _CONTRIBUTION_ROOM_BYTES,
        patience_s=sync.patience_s,
    )
    write_private(folder.context, context.model_dump_json().encode())
    write_private(folder.gateway / "gateway.json", gateway.model_dump_json().encode())
    write_private(folder.gateway / "ca.pem", surroundings.ca_pem.encode())
    write_private(folder.gateway / "certificate.pem", record.order.certificate_pem.encode())


def resume_where_left(folder: AttemptFolder) -> None:
    """Let the next ranks start from the newest checkpoint that the former ones left here, if there is one."""
    try:
        with open_left_by_ranks(folder.root, "checkpoint", "newest.json") as stream:
            newest = NewestCheckpoint.model_validate_json(stream.read(_NEWEST_BYTES_MAX))
        with open_left_by_ranks(folder.root, "checkpoint", newest.file) as stream:
            if os.fstat(stream.fileno()).st_size != newest.size_bytes:
                return
    except (FileNotFoundError, ValidationError):
        return  # they start from where the attempt did
    context = AttemptContext.model_validate_json(folder.context.read_bytes())
    resume_from = str(folder.root / "checkpoint" / newest.file)
    write_private(folder.context, context.model_copy(update={"resume_from": resume_from}).model_dump_json().encode())


@contextmanager
def open_left_by_ranks(root: Path, *parts: str) -> Iterator[BufferedReader]:
    """Open a file that ranks may have written, below `root`; no part of the path may be a link.

    Raises FileNotFoundError where there is no such plain file.
    """
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Not blocking: a named pipe in place of the file must not hold the agent.
        descriptor = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError, OSError) as error:
        raise FileNotFoundError(f"{'/'.join(parts)} is not a plain file of the attempt: {error}") from None
    finally:
        os.close(folder)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(f"{'/'.join(parts)} is not a plain file of the attempt")
        yield stream
