"""Compiled loops: numba with a cache on disk that can never be stale.

numba notices when the file of a cached function changed, but not when a function that it calls
did. So the cache lives in a folder named after the digest of all sources that are compiled: a new
version of Hansa compiles anew, an unchanged one starts at once.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numba

from training import throughput

F = TypeVar("F", bound=Callable[..., Any])

_DIGEST_LENGTH: Final = 16
# Modules without compiled functions whose constants are compiled into others.
_CONSTANTS: Final = frozenset({"instance", "configuration", "throughput"})


def compiled(function: F) -> F:
    """Compile a function of numbers and arrays on first use. No fused or reordered arithmetic."""
    jitted: Any = numba.njit(cache=True, fastmath=False, error_model="numpy")(function)
    return cast("F", jitted)


def compiled_loop(function: F) -> F:
    """Compile a loop over the whole market that allocates nothing: its caller brings every array.

    numba counts references of all the hundred arrays of an Instance wherever a part of it is named.
    In a loop that costs more than the loop's own work (0.6 microseconds for a test of one bit), and
    since nothing is allocated there is nothing to count.
    """
    njit: Any = numba.njit  # `_nrt` works, but is not in its stated signature.
    jitted = njit(cache=True, fastmath=False, error_model="numpy", _nrt=False)(function)
    return cast("F", jitted)


def inlined(function: F) -> F:
    """Compile a scalar rule into the loops that call it: passing an Instance costs more than most rules."""
    njit: Any = numba.njit
    jitted = njit(cache=True, fastmath=False, error_model="numpy", _nrt=False, inline="always")(function)
    return cast("F", jitted)


def _cache_folder() -> Path:
    digest = hashlib.sha256(numba.__version__.encode())
    for source in [*sorted(Path(__file__).parent.glob("*.py")), Path(throughput.__file__)]:
        text = source.read_bytes()
        if source.stem in _CONSTANTS or b"allocation.compiled import" in text:
            digest.update(text)
    return _root() / "hansa-compiled" / digest.hexdigest()[:_DIGEST_LENGTH]


def _root() -> Path:
    """Return the environment's own cache where we may write there, else the user's, else a temporary one."""
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "var" / "cache"
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"])
    if "HOME" in os.environ:
        return Path.home() / ".cache"
    return Path(tempfile.gettempdir()) / f"user-{os.getuid()}"


vars(numba.config)["CACHE_DIR"] = str(_cache_folder())
