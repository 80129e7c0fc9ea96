"""Compiled loops: numba where the machine has compiled them, the same functions as plain Python elsewhere.

The loops are ordinary Python over numpy arrays. numba makes them a hundred times faster and takes
minutes to compile them, once: `hansa market compile` does it, and keeps the result in a folder
named after the digest of all sources that are compiled, so that it can never be stale (numba
notices when the file of a cached function changed, but not when a function that it calls did), and of where
and from when they are, since numba takes nothing from its cache for a file that was moved or touched: what is
called complete must not be compiled anew in the middle of a round.
Without it they run as they stand: the same bits, fast enough for a market of some dozen jobs.

HANSA_COMPILE=1 compiles on first use, HANSA_COMPILE=0 never does.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from training import sync_rule, throughput

F = TypeVar("F", bound=Callable[..., Any])

_DIGEST_LENGTH: Final = 16
# Modules without compiled functions whose constants are compiled into others.
_CONSTANTS: Final = frozenset({"instance", "configuration", "throughput", "sync_rule"})
_COMPLETE: Final = "complete"


def compiled(function: F) -> F:
    """Compile a function of numbers and arrays. No fused or reordered arithmetic."""
    return _jitted(function)


def compiled_loop(function: F) -> F:
    """Compile a loop over the whole market that allocates nothing: its caller brings every array.

    numba counts references of all the hundred arrays of an Instance wherever a part of it is named.
    In a loop that costs more than the loop's own work (0.6 microseconds for a test of one bit), and
    since nothing is allocated there is nothing to count.
    """
    return _jitted(function, _nrt=False)


def inlined(function: F) -> F:
    """Compile a scalar rule into the loops that call it: passing an Instance costs more than most rules."""
    return _jitted(function, _nrt=False, inline="always")


def is_complete() -> bool:
    """Return whether `hansa market compile` has run here with these very sources."""
    return (_cache_folder() / _COMPLETE).exists()


def mark_complete() -> None:
    """Let processes from now on use what this one has compiled."""
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _COMPLETE).touch()


def _jitted(function: F, **options: object) -> F:
    if not _COMPILES:
        return function
    import numba  # noqa: PLC0415  most of a second and 100 MB, which a process without compiled loops is spared

    njit: Any = numba.njit  # `_nrt` works, but is not in its stated signature.
    vars(numba.config)["CACHE_DIR"] = str(_cache_folder())
    return cast("F", njit(cache=True, fastmath=False, error_model="numpy", **options)(function))


def _cache_folder() -> Path:
    sources = [
        source
        for source in [*sorted(Path(__file__).parent.glob("*.py")), Path(throughput.__file__), Path(sync_rule.__file__)]
        if source.stem in _CONSTANTS or b"allocation.compiled import" in source.read_bytes()
    ]
    return _root() / "hansa-compiled" / digest_of(sources)


def digest_of(sources: list[Path]) -> str:
    """Return the name of what numba compiles from `sources`: its version, their text, and numba's own stamp of each."""
    digest = hashlib.sha256(version("numba").encode())
    for source in sources:
        found = source.stat()
        digest.update(f"{source.resolve()} {found.st_mtime_ns} {found.st_size}\n".encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:_DIGEST_LENGTH]


def _root() -> Path:
    """Return the environment's own cache where we may write there, else the user's, else a temporary one."""
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "var" / "cache"
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"])
    if "HOME" in os.environ:
        return Path.home() / ".cache"
    return Path(tempfile.gettempdir()) / f"user-{os.getuid()}"


def _decided() -> bool:
    wish = os.environ.get("HANSA_COMPILE", "")
    return wish == "1" or (wish != "0" and is_complete())


_COMPILES: Final = _decided()
