"""A round log kept whole for replay: the views, seals and contributions that a gateway else drops once all have applied them.

    RECORD/
      contributions/<digest>        of all sites that write here: the same bytes have the same name
      SITE/views/0000000001.json
      SITE/manifests/0000000001.json
      SITE/applied.jsonl            the outer state's hash after each round, as the site's ranks reported it
      SITE/full.json                the round from which on contributions are no longer kept, where the limit was reached

A gateway writes it where its configuration says so; `training.lab.replay` reads it. Contributions are hard links to the
gateway's own blobs where the record lies on the same disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.roundlog.blobs import BlobStore
from training.roundlog.errors import Reason, Refusal
from training.roundlog.manifest import SealedManifest
from training.roundlog.signing import DOCUMENT_BYTES_MAX, SignedDocument
from training.roundlog.view import Hash, View

CONTRIBUTIONS: Final = "contributions"
# A document is base64 in JSON with a signature beside it.
_FILE_BYTES_MAX: Final = DOCUMENT_BYTES_MAX + 4096
_APPLIED_BYTES_MAX: Final = 1 << 28


class AppliedRound(BaseModel):
    """What a site's ranks reported after a round."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    round_number: int = Field(ge=0)
    outer_hash: Hash | None


class KeptUntil(BaseModel):
    """Where a record's room came to an end: the contributions of `round_number` and later ones are not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    round_number: int = Field(ge=1)
    bytes_max: int = Field(ge=0)


class Recorder:
    """Writes one gateway's log to a record. Contributions are kept in the chain's order until `bytes_max` is reached."""

    def __init__(self, folder: Path, site_id: str, blobs: BlobStore, *, bytes_max: int) -> None:
        """Open the record, made if need be; a gateway that starts again goes on where it was."""
        self._site = SiteRecord(folder, site_id)
        self._blobs = blobs
        self._bytes_max = bytes_max
        for path in (self._site.contributions, self._site.views, self._site.manifests):
            path.mkdir(parents=True, exist_ok=True)
        self._kept = {path.name for path in self._site.contributions.iterdir()}
        self._kept_bytes = sum(path.stat().st_size for path in self._site.contributions.iterdir())
        self._is_full = self._site.kept_until() is not None

    def view(self, view: View, document: SignedDocument) -> None:
        """Keep a view that was installed."""
        _write(self._site.views / _numbered(view.number), document.model_dump_json())

    def sealed(self, sealed: SealedManifest) -> None:
        """Keep a seal, and those of its contributions that are here."""
        _write(self._site.manifests / _numbered(sealed.round_number), sealed.document.model_dump_json())
        for entry in sealed.contributions:
            self._keep(sealed.round_number, entry.header.digest)

    def rewrite(self, seals: tuple[SealedManifest, ...]) -> None:
        """Make the seals equal to a chain that a new view cut or replaced."""
        kept = {_numbered(sealed.round_number) for sealed in seals}
        for path in sorted(self._site.manifests.iterdir(), reverse=True):
            if path.name not in kept:
                path.unlink()
        for sealed in seals:
            self.sealed(sealed)

    def applied(self, round_number: int, outer_hash: str | None) -> None:
        """Keep the hash that the ranks reported."""
        with self._site.applied_path.open("a", encoding="utf-8") as file:
            file.write(AppliedRound(round_number=round_number, outer_hash=outer_hash).model_dump_json() + "\n")

    def _keep(self, round_number: int, digest: str) -> None:
        if self._is_full or digest in self._kept or not self._blobs.held(digest):
            return
        size = self._blobs.size_bytes(digest)
        if self._kept_bytes + size > self._bytes_max:
            self._is_full = True
            until = KeptUntil(round_number=round_number, bytes_max=self._bytes_max)
            _write(self._site.full_path, until.model_dump_json())
            return
        _link(self._blobs.path(digest), self._site.contributions / digest)
        self._kept.add(digest)
        self._kept_bytes += size


class SiteRecord:
    """What one site wrote to a record, for reading. What was altered or cut is for the reader to find out."""

    def __init__(self, folder: Path, site_id: str) -> None:
        """Name the files; none is opened."""
        self.site_id = site_id
        self.contributions = folder / CONTRIBUTIONS
        self.views = folder / site_id / "views"
        self.manifests = folder / site_id / "manifests"
        self.applied_path = folder / site_id / "applied.jsonl"
        self.full_path = folder / site_id / "full.json"

    def view_documents(self) -> Iterator[SignedDocument]:
        """Yield the views in the order of their numbers. Raises Refusal where one cannot be read."""
        for path in sorted(self.views.glob("*.json")):
            yield read_document(path)

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds whose seals are here."""
        return sorted(int(path.stem) for path in self.manifests.glob("[0-9]*.json"))

    def manifest_document(self, round_number: int) -> SignedDocument:
        """Return the seal of a round. Raises Refusal where it is not here or cannot be read."""
        return read_document(self.manifests / _numbered(round_number))

    def applied(self) -> dict[int, str | None]:
        """Return the hash after each round that was applied, the last one reported. Raises Refusal."""
        if not self.applied_path.exists():
            return {}
        if self.applied_path.stat().st_size > _APPLIED_BYTES_MAX:
            raise Refusal(Reason.TOO_LARGE, f"{self.applied_path.name} exceeds {_APPLIED_BYTES_MAX} bytes")
        try:
            lines = self.applied_path.read_text(encoding="utf-8").splitlines()
            rows = [AppliedRound.model_validate_json(line) for line in lines]
        except ValueError as error:
            message = f"{self.site_id}/{self.applied_path.name} cannot be read: {_first_line(error)}"
            raise Refusal(Reason.MALFORMED, message) from None
        return {row.round_number: row.outer_hash for row in rows}

    def kept_until(self) -> KeptUntil | None:
        """Return where the record's room came to an end, None where it did not."""
        if not self.full_path.exists():
            return None
        return KeptUntil.model_validate_json(self.full_path.read_bytes())


def read_document(path: Path) -> SignedDocument:
    """Return the signed document in a file of a record. Raises Refusal where it is not there or is none."""
    try:
        with path.open("rb") as file:
            return SignedDocument.model_validate_json(file.read(_FILE_BYTES_MAX))
    except FileNotFoundError:
        raise Refusal(Reason.NOT_FOUND, f"{path.parent.name}/{path.name} is not in the record") from None
    except ValidationError as error:
        message = f"{path.parent.name}/{path.name} is no signed document: {_first_line(error)}"
        raise Refusal(Reason.MALFORMED, message) from None


def _first_line(error: ValueError) -> str:
    return error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)


def _numbered(number: int) -> str:
    return f"{number:010d}.json"


def _link(source: Path, target: Path) -> None:
    """Give the blob a second name in the record. A blob never changes, so the two may share their bytes."""
    try:
        os.link(source, target)
    except FileExistsError:
        return  # another site's gateway was faster
    except OSError:  # another disk, or one without links
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        shutil.copyfile(source, part)
        part.replace(target)


def _write(path: Path, content: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)
