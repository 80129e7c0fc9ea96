"""The demo's private folder: made short enough for Unix sockets, and swept later where its demo was killed.

A demo holds a lock on a file in its folder for as long as it lives, and the kernel lets go of it however the demo
ends. One that was killed with SIGKILL can remove nothing itself: the next one does. A demo that failed takes its file
away, so that its logs stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PREFIX: Final = "hansa-demo-"
ALIVE_FILE: Final = "alive"
# An attempt's Unix sockets lie 65 bytes below the home (sites/NAME/attempts/LEASE-EPOCH/agent.sock); the kernel takes 107.
HOME_PATH_BYTES_MAX: Final = 42


def make_folder() -> Path:
    """Return a new private folder, and remove those of demos that were killed."""
    sweep(Path(tempfile.gettempdir()))
    folder = tempfile.mkdtemp(prefix=PREFIX)
    if len(folder.encode()) > HOME_PATH_BYTES_MAX:
        Path(folder).rmdir()
        sweep(Path("/tmp"))  # noqa: S108  a short path is needed, and mkdtemp makes it private
        folder = tempfile.mkdtemp(prefix=PREFIX, dir="/tmp")
    return Path(folder)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Say that the folder's demo lives."""
    with (folder / ALIVE_FILE).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def keep(folder: Path) -> None:
    """Let the folder of a demo that failed stay when others are swept."""
    (folder / ALIVE_FILE).unlink(missing_ok=True)


def sweep(parent: Path) -> int:
    """Remove this user's folders of demos that live no more; return how many."""
    removed = 0
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink() and _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
    return removed


def _is_left(folder: Path) -> bool:
    with (folder / ALIVE_FILE).open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
