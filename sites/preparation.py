"""Bring an attempt's files to the site: its workdir, the result of an earlier setup, its checkpoint.

Runs on a transfer thread. Artifacts are kept by digest and verified again at each use, because
ranks of a site without isolation could have written to the cache. A workdir after its setup is
kept too, under everything that the setup could depend on, the tenant included.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sites import bundle
from sites.attempt_folder import AttemptFolder
from sites.client import Broker
from sites.errors import ArtifactError
from sites.journal import AttemptRecord
from training.spec import JobSpec

SETUPS_KEPT: Final = 8


@dataclass(frozen=True, slots=True)
class Prepared:
    """What lies ready: `setup_done` where the workdir is one after its setup."""

    setup_done: bool
    resume_from: Path | None


def prepare(
    broker: Broker, site_folder: Path, folder: AttemptFolder, record: AttemptRecord, cache_bytes_max: int
) -> Prepared:
    """Fetch, verify and unpack all that the attempt starts from. Raises SiteError."""
    assert record.order is not None, "an attempt that runs has an order"
    spec = record.order.spec
    shutil.rmtree(folder.workdir, ignore_errors=True)  # from a former try, perhaps half a one
    cached = setup_folder(site_folder, record.tenant_id, spec)
    setup_done = spec.setup is None or cached.is_dir()
    if spec.setup is not None and cached.is_dir():
        shutil.copytree(cached, folder.workdir, symlinks=True)
        os.utime(cached)
    else:
        archive = _fetched(broker, site_folder, spec.workdir_digest, bundle.PACKED_BYTES_MAX)
        bundle.unpack(archive, spec.workdir_digest, folder.workdir)
    resume_from = None
    if record.order.checkpoint is not None:
        reference = record.order.checkpoint
        resume_from = folder.resume
        shutil.copyfile(_fetched(broker, site_folder, reference.digest, reference.size_bytes), resume_from)
        with resume_from.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != reference.digest:
                (site_folder / "artifacts" / reference.digest).unlink()
                raise ArtifactError("the checkpoint kept at this site was altered; it is fetched anew")
    _prune(site_folder / "artifacts", cache_bytes_max)
    return Prepared(setup_done, resume_from)


def keep_setup(site_folder: Path, workdir: Path, tenant_id: str, spec: JobSpec) -> None:
    """Keep a workdir whose setup has ended well, for the next attempt of the same job."""
    target = setup_folder(site_folder, tenant_id, spec)
    if target.exists():
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(workdir, partial, symlinks=True)
        partial.rename(target)
    except (OSError, shutil.Error):
        shutil.rmtree(partial, ignore_errors=True)  # a cache that cannot be filled is none
    kept = sorted(target.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in kept[:-SETUPS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def setup_folder(site_folder: Path, tenant_id: str, spec: JobSpec) -> Path:
    """Return where the workdir after this setup is kept."""
    inputs = json.dumps([tenant_id, spec.setup, spec.workdir_digest, spec.envs], sort_keys=True)
    return site_folder / "setups" / hashlib.sha256(inputs.encode()).hexdigest()


def _fetched(broker: Broker, site_folder: Path, digest: str, bytes_max: int) -> Path:
    path = site_folder / "artifacts" / digest
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.exists():
        os.utime(path)
    else:
        broker.fetch_artifact(digest, path, bytes_max=bytes_max)
    return path


def _prune(folder: Path, bytes_max: int) -> None:
    """Remove the artifacts that were not used for longest, down to `bytes_max` in all."""
    kept = sorted((path.stat().st_mtime, path) for path in folder.iterdir())
    total = sum(path.stat().st_size for _, path in kept)
    for _, path in kept[:-1]:
        if total <= bytes_max:
            return
        total -= path.stat().st_size
        path.unlink(missing_ok=True)
