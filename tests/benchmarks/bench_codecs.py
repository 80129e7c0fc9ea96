"""What a codec saves and what it costs: bytes against fp32, and speed against a copy of the same memory.

    python -m tests.benchmarks.bench_codecs

One thread, 64 MB of normally distributed fp32 values, larger than the caches. The reference is
`numpy.copyto` of the same values, measured in the same run. Medians of five.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from training.codecs import CODECS

ELEMENTS = 16_000_000
REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """Return the median duration of `work`."""
    durations = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)


def main() -> None:
    """Measure every codec and print the table."""
    values = np.random.default_rng(1).standard_normal(ELEMENTS).astype(np.float32)
    target = np.empty_like(values)
    copy_s = seconds(lambda: np.copyto(target, values))
    table = Table("codec", "bytes vs fp32", "encode MB/s", "of memcpy", "decode MB/s", "of memcpy")
    for codec in CODECS.values():
        payload, carry = codec.encode(values, None)
        encode_s = seconds(lambda codec=codec, carry=carry: codec.encode(values, carry))  # type: ignore[misc]
        decode_s = seconds(lambda codec=codec, payload=payload: codec.decode(payload, ELEMENTS))  # type: ignore[misc]
        table.add_row(
            codec.name,
            f"{values.nbytes / len(payload):.1f} x less",
            f"{values.nbytes / encode_s / 1e6:.0f}",
            f"1/{encode_s / copy_s:.1f}",
            f"{values.nbytes / decode_s / 1e6:.0f}",
            f"1/{decode_s / copy_s:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
