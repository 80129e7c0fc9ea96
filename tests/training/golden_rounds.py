"""Prints the hashes of five merged rounds for each codec; run as a program on unlike processors by test_merge.py."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np

from training.codecs import CODECS, Values
from training.exchange import SampleRange
from training.merge import sum_of_squares, weighted_mean
from training.outer import OuterRule, fragment_digest, outer_step, state_hash

ELEMENTS = 9001
WEIGHTS = (48, 640, 31)


def drawn(seed: int) -> Values:
    """Values from integer arithmetic alone, so that no generator's version matters."""
    with np.errstate(over="ignore"):
        state = np.arange(1, ELEMENTS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
    uniform = (state >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    return uniform * uniform * uniform


def lowrank_payload() -> bytes:
    """Two matrices by their factors and a vector, written by hand."""
    shapes = ((60, 100, 4), (30, 100, 4), (1, 1, 0))
    numbers = sum((rows + columns) * rank if rank else rows * columns for rows, columns, rank in shapes)
    halves = (drawn(5)[:numbers].view(np.uint32) >> np.uint32(16)).astype("<u2")
    table = b"".join(struct.pack("<IIB", *shape) for shape in shapes)
    return b"HLR1" + struct.pack("<QH", ELEMENTS, len(shapes)) + table + halves.tobytes()


def hashes() -> dict[str, str]:
    """Return, by codec, the hash of the outer state after five rounds of three sites, and the last norm."""
    found: dict[str, str] = {}
    for name, codec in CODECS.items():
        if name == "lowrank":  # its factors come from a library's matrix products; what they decode to does not
            found[f"{name} decoded"] = hashlib.sha256(codec.decode(lowrank_payload(), ELEMENTS)).hexdigest()
            continue
        theta, velocity = drawn(99), np.zeros(ELEMENTS, dtype=np.float32)
        carries: list[Values | None] = [None, None, None]
        payloads = hashlib.sha256()
        for number in range(5):
            decoded = []
            for site, weight in enumerate(WEIGHTS):
                payload, carries[site] = codec.encode(drawn(10 * number + site), carries[site])
                payloads.update(payload)
                decoded.append((weight, codec.decode(payload, ELEMENTS)))
            merged = weighted_mean(decoded)
            theta, velocity = outer_step(theta, velocity, merged, OuterRule(0.7, 0.9))
        found[name] = state_hash("00", [fragment_digest(theta, velocity)], (SampleRange(0, 5),))
        found[f"{name} payloads"] = payloads.hexdigest()
        found[f"{name} norm"] = sum_of_squares(theta).hex()
    return found


if __name__ == "__main__":
    print(json.dumps(hashes()))  # noqa: T201 - its parent reads this
