"""What a gateway must not forget when it is killed, as files in its state folder.

    STATE/
      record.json              GatewayRecord: view, promise, position, the site's own contribution
      manifests/0000000001.json
      blobs/<digest>           training.roundlog.blobs
      posted/<round>/<fragment>
      incoming/                emptied at every start

Each file is written beside its place and renamed over it. There is no fsync: these files outlive
the process, not the host. A lost host's rounds live on in its peers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from training.exchange import Leaving, SampleRange
from training.roundlog.contribution import FragmentPart
from training.roundlog.control import Equivocation, LinkBytes
from training.roundlog.hub_wire import SnapshotNote
from training.roundlog.log import RoundLog
from training.roundlog.manifest import SealedManifest
from training.roundlog.signing import SignedDocument
from training.roundlog.view import GENESIS_HASH, Hash


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OwnContribution(_Document):
    """What the site's ranks committed to a round; the header is signed anew for each view."""

    round_number: int
    weight: int
    samples: tuple[SampleRange, ...]
    outer_hash: Hash
    digest: Hash
    size_bytes: int
    fragments: tuple[FragmentPart, ...]
    leaving: Leaving | None = None


class GatewayRecord(_Document):
    """A gateway's state beside its chain and blobs."""

    promised: int = 0
    view: SignedDocument | None = None
    base_round: int = 0
    base_hash: Hash = GENESIS_HASH
    applied_round: int = 0
    outer_hash: Hash | None = None
    needs_snapshot: bool = False
    equivocations: tuple[Equivocation, ...] = ()
    own: OwnContribution | None = None
    snapshot: SnapshotNote | None = None
    links: dict[str, LinkBytes] = Field(default_factory=dict)


class LogStore:
    """The state folder of one gateway."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, made if need be."""
        self._folder = folder
        self._manifests = folder / "manifests"
        self._posted = folder / "posted"
        self._incoming = folder / "incoming"
        shutil.rmtree(self._incoming, ignore_errors=True)
        for path in (self._manifests, self._posted, self._incoming):
            path.mkdir(parents=True, exist_ok=True)

    @property
    def blobs(self) -> Path:
        """Return the folder of the blobs."""
        return self._folder / "blobs"

    def load_record(self) -> GatewayRecord:
        """Return the record, an empty one at first."""
        path = self._folder / "record.json"
        return GatewayRecord.model_validate_json(path.read_bytes()) if path.exists() else GatewayRecord()

    def save_record(self, record: GatewayRecord) -> None:
        """Replace the record."""
        _write(self._folder / "record.json", record.model_dump_json().encode())

    def load_manifests(self, after_round: int) -> Iterator[SignedDocument]:
        """Yield the manifests after `after_round` in order, up to the first gap."""
        number = after_round + 1
        while (path := self._manifest(number)).exists():
            yield SignedDocument.model_validate_json(path.read_bytes())
            number += 1

    def save_manifest(self, sealed: SealedManifest) -> None:
        """Keep the seal of one round."""
        _write(self._manifest(sealed.round_number), sealed.document.model_dump_json().encode())

    def rewrite_chain(self, log: RoundLog) -> None:
        """Make the files equal the chain of `log`, removing from the end first.

        A kill in between leaves a shorter chain, which the base reporter fills again.
        """
        kept = {self._manifest(sealed.round_number).name for sealed in log.manifests_after(log.base_round)}
        for path in sorted(self._manifests.iterdir(), reverse=True):
            if path.name not in kept:
                path.unlink()
        for sealed in log.manifests_after(log.base_round):
            self.save_manifest(sealed)

    def posted_path(self, round_number: int, fragment: int) -> Path:
        """Return where a posted fragment lies, its folder made."""
        folder = self._posted / str(round_number)
        folder.mkdir(exist_ok=True)
        return folder / str(fragment)

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """Open a fresh file on its way into the blobs; what is not moved there by the end is removed."""
        descriptor, name = tempfile.mkstemp(dir=self._incoming)
        os.close(descriptor)
        path = Path(name)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def drop_posted(self, through_round: int) -> None:
        """Remove the posted fragments of rounds up to `through_round`."""
        for folder in self._posted.iterdir():
            if int(folder.name) <= through_round:
                shutil.rmtree(folder, ignore_errors=True)

    def _manifest(self, round_number: int) -> Path:
        return self._manifests / f"{round_number:010d}.json"


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
