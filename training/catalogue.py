"""The GPU types that the market knows, with the figures from which a cold prediction starts.

Peak figures are the vendors' dense half-precision tensor throughput and memory bandwidth; what a
training step reaches of them is `achieved_share`, a prior that measurement replaces. A CPU slot
(one core of a host) stands in for a GPU where there is none: it is a type of its own, never
mistaken for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class GpuType:
    """One row of the catalogue. Rates are per device."""

    name: str
    peak_flops_per_s: float
    memory_bytes: int
    intra_site_bits_per_s: float
    achieved_share: float = 0.35


_GB: Final = 1_000_000_000
_TERA: Final = 1e12

# Sources: vendors' data sheets (dense FP16 or BF16 tensor figures; SXM parts where both exist).
# cpu-slot: one AVX2 or AVX-512 core doing small fp32 matrix products through torch; its peak is
# what a 256 x 256 product reaches on common servers, and a site reports its own measured figure.
GPU_TYPES: Final[dict[str, GpuType]] = {
    gpu.name: gpu
    for gpu in (
        GpuType("cpu-slot", 6.0e10, 2 * _GB, 8e9, achieved_share=0.5),
        GpuType("T4", 65 * _TERA, 16 * _GB, 25e9),
        GpuType("RTX6000", 130 * _TERA, 24 * _GB, 50e9),
        GpuType("V100", 125 * _TERA, 32 * _GB, 100e9),
        GpuType("A10", 125 * _TERA, 24 * _GB, 50e9),
        GpuType("L40S", 362 * _TERA, 48 * _GB, 100e9),
        GpuType("A100", 312 * _TERA, 80 * _GB, 200e9),
        GpuType("H100", 989 * _TERA, 80 * _GB, 400e9),
        GpuType("H200", 989 * _TERA, 141 * _GB, 400e9),
        GpuType("B200", 2250 * _TERA, 180 * _GB, 800e9),
    )
}
