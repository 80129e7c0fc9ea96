"""What a dataset is: a folder with a manifest.json that names every file of it by path, size and SHA-256.

The SHA-256 of the manifest's bytes names the dataset, so a job file that gives it gives every byte. A manifest comes from
strangers: paths that lead out of the folder, doubled ones and more than the limits are refused with a code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sites.errors import DataDigestError, DataManifestError, DataPathError, DataTooLargeError
from training.spec import Digest

MANIFEST_FILE: Final = "manifest.json"
MANIFEST_BYTES_MAX: Final = 64 * 1024 * 1024
FILES_MAX: Final = 200_000
PATH_LENGTH_MAX: Final = 500
FILE_BYTES_MAX: Final = 2**44


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataFile(_Strict):
    """One file of a dataset; `path` is below its folder."""

    path: Annotated[str, StringConstraints(min_length=1, max_length=PATH_LENGTH_MAX)]
    size_bytes: int = Field(ge=0, le=FILE_BYTES_MAX)
    sha256: Digest


class Manifest(_Strict):
    """All files of a dataset."""

    files: tuple[DataFile, ...] = Field(min_length=1, max_length=FILES_MAX)

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size_bytes for file in self.files)


def read_manifest(content: bytes, digest: str, size_bytes_max: int | None = None) -> Manifest:
    """Return the manifest in `content`, all of its rules checked.

    Raises DataDigestError unless its bytes have `digest`, DataPathError, DataManifestError, and DataTooLargeError where
    its files are more than `size_bytes_max`.
    """
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataDigestError(
            f"the manifest of the dataset {digest[:12]}… has other bytes; mend the source or the job file"
        )
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DataManifestError(
            f"{MANIFEST_FILE} is not what `hansa data manifest` writes ({first['msg']}); write it anew"
        ) from None
    seen: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    for file in manifest.files:
        path = _checked(file.path)
        if path in seen or path in folders or seen & set(path.parents):
            raise DataPathError(f"{file.path[:100]!r} stands twice in the manifest, or is both file and folder")
        seen.add(path)
        folders.update(path.parents)
    if size_bytes_max is not None and manifest.size_bytes > size_bytes_max:
        raise DataTooLargeError(
            f"the dataset has {manifest.size_bytes} bytes, which is more than the size_gb that the job states; correct it"
        )
    return manifest


def make_manifest(folder: Path) -> bytes:
    """Return the manifest of all files below `folder`, in the order of their paths. Raises DataPathError for links."""
    files = []
    for path in _listed(folder):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size_bytes = os.fstat(stream.fileno()).st_size
        name = str(_checked(path.relative_to(folder).as_posix()))
        files.append(DataFile(path=name, size_bytes=size_bytes, sha256=digest))
        if len(files) > FILES_MAX:
            raise DataTooLargeError(f"{folder} holds more than {FILES_MAX} files; pack them into fewer")
    if not files:
        raise DataManifestError(f"{folder} holds no files; name the folder of the dataset")
    return Manifest(files=tuple(files)).model_dump_json(indent=1).encode() + b"\n"


def _listed(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise DataPathError(f"{path} is a link or a device; a dataset holds plain files and folders")
        if path.is_file() and path != folder / MANIFEST_FILE:
            yield path


def _checked(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or not path.parts
        or ".." in path.parts
        or str(path) != name
        or "\\" in name
        or not name.isprintable()
        or path.parts == (MANIFEST_FILE,)
    ):
        raise DataPathError(f"{name[:100]!r} is not a path that a dataset may hold; keep to plain names in its folder")
    return path
