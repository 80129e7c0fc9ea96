"""What a codec saves and what it costs: bytes against fp32, and speed against a copy of the same memory.

    python -m tests.benchmarks.bench_codecs

One thread, 256 MB of normally distributed fp32 values, far larger than the caches, in fragments of 16 MB as the
runtime cuts them. Carry and decoded values are written to memory that is there already, as the copy is. The reference is
`numpy.copyto` of the same values, measured in the same run. CPU seconds, medians of five.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from training.codecs import CODECS, NO_HINT, Codec

ELEMENTS = 1 << 26
FRAGMENT = 1 << 22
REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """Return the median duration of `work`."""
    durations = []
    for _ in range(REPEATS):
        started = time.process_time()
        work()
        durations.append(time.process_time() - started)
    return statistics.median(durations)


def main() -> None:
    """Measure every codec and print the table."""
    values = np.random.default_rng(1).standard_normal(ELEMENTS, dtype=np.float32)
    target, carry = np.empty_like(values), np.zeros_like(values)
    fragments = [slice(start, start + FRAGMENT) for start in range(0, ELEMENTS, FRAGMENT)]
    copy_s = seconds(lambda: np.copyto(target, values))
    table = Table("codec", "bytes vs fp32", "encode MB/s", "of memcpy", "decode MB/s", "of memcpy", "both, of memcpy")
    for codec in CODECS.values():
        carry[:] = 0
        payloads: list[bytes] = []

        def encode(codec: Codec = codec, payloads: list[bytes] = payloads) -> None:
            payloads[:] = [codec.encode(values[each], carry[each], NO_HINT, carry[each])[0] for each in fragments]

        def decode(codec: Codec = codec, payloads: list[bytes] = payloads) -> None:
            for each, payload in zip(fragments, payloads, strict=True):
                codec.decode(payload, FRAGMENT, target[each])

        encode_s, decode_s = seconds(encode), seconds(decode)
        table.add_row(
            codec.name,
            f"{values.nbytes / sum(map(len, payloads)):.1f} x less",
            f"{values.nbytes / encode_s / 1e6:.0f}",
            f"1/{encode_s / copy_s:.1f}",
            f"{values.nbytes / decode_s / 1e6:.0f}",
            f"1/{decode_s / copy_s:.1f}",
            f"1/{(encode_s + decode_s) / copy_s:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
