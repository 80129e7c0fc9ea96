"""The market's secrets on disk: made on first use, readable by their owner alone.

Several processes may start at once on an empty home; a lock file lets one of them make the keys
and the others read them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700


class KeyFolder:
    """The folder that holds the market's secrets, one file each."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be, and close it to others."""
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        folder.chmod(FOLDER_MODE)
        self.folder = folder

    def load(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Return the content of file `name`, made by `make` if it is not there yet."""
        path = self.folder / name
        with self._locked():
            if not path.exists():
                self.write(name, make())
            return path.read_bytes()

    def write(self, name: str, content: bytes) -> Path:
        """Write a file whole or not at all, bring it to the disk, and return its path."""
        path = self.folder / name
        partial = path.with_name(f"{name}.{os.getpid()}.partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        return path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_WRONLY | os.O_CREAT, FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
