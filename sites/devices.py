"""The host's NVIDIA GPUs as NVML sees them: type, memory, health, use and power; and whether they are what site.yaml promises.

Without a driver or the library there is nothing to see, and why is said: a site of CPU slots, or one whose GPUs are on other
nodes (Slurm), works without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from sites.settings import SiteSettings
from training.catalogue import GPU_TYPES

CPU_SLOT: Final = "cpu-slot"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU. What its driver does not tell is None; `ecc_errors` are uncorrected ones since the driver was loaded."""

    index: int
    uuid: str
    name: str
    memory_bytes: int | None
    ecc_errors: int | None
    utilisation_percent: int | None
    power_w: float | None
    temperature_c: int | None


@dataclass(frozen=True, slots=True)
class Devices:
    """What was found; `absence` says why nothing could be looked at, empty where it could."""

    found: tuple[Device, ...]
    driver: str = ""
    absence: str = ""


def read_devices() -> Devices:
    """Return the host's GPUs, or why none can be seen."""
    try:
        # Here: an agent of CPU slots does not carry the library's megabytes.
        import pynvml  # noqa: PLC0415
    except ImportError:
        return Devices((), absence="the library nvidia-ml-py is not installed; pip install 'hansa[site]'")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Devices((), absence=f"the NVIDIA driver does not answer here ({error}); see that nvidia-smi works")
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return Devices(tuple(_device(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())), driver)
    except pynvml.NVMLError as error:
        return Devices((), absence=f"the NVIDIA driver broke off ({error}); see that nvidia-smi works")
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _device(nvml: Any, index: int) -> Device:  # noqa: ANN401  the library has no types
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(function: str, *words: object) -> Any:  # noqa: ANN401  each answers in its own type
        try:
            return getattr(nvml, function)(handle, *words)
        except nvml.NVMLError:
            return None  # a consumer's card has no ECC, a virtual one no power

    memory, use = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetUtilizationRates")
    power = ask("nvmlDeviceGetPowerUsage")
    return Device(
        index=index,
        uuid=_text(ask("nvmlDeviceGetUUID") or ""),
        name=_text(ask("nvmlDeviceGetName") or "unknown"),
        memory_bytes=None if memory is None else int(memory.total),
        ecc_errors=ask("nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        utilisation_percent=None if use is None else int(use.gpu),
        power_w=None if power is None else power / 1000,
        temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
    )


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def kind_of(name: str) -> str | None:
    """Return the market's name of a GPU that its driver calls `name`, None where the catalogue does not know it.

    `NVIDIA A100-SXM4-80GB` is an A100, `Quadro RTX 6000` an RTX6000; a GH200 is no H200.
    """
    words = name.replace("_", "-").replace(" ", "-").upper().split("-")
    starts = range(len(words))
    told = {"".join(words[start:end]) for start in starts for end in range(start + 1, len(words) + 1)}
    return next((kind for kind in GPU_TYPES if kind != CPU_SLOT and kind.upper() in told), None)


def mismatches(settings: SiteSettings, devices: Devices) -> Iterator[str]:
    """Yield where site.yaml promises other GPUs than there are, a sentence each; nothing where none are promised here."""
    promised = {pool.gpu_type: len(pool.gpu_ids) for pool in settings.pools if pool.gpu_type != CPU_SLOT}
    if not promised or settings.slurm is not None:
        return
    if devices.absence:
        yield f"site.yaml promises {sum(promised.values())} GPUs, but {devices.absence}"
        return
    kinds = [kind_of(device.name) for device in devices.found]
    for kind, count in sorted(promised.items()):
        if kinds.count(kind) < count:
            yield f"site.yaml promises {count} {kind}, NVML finds {kinds.count(kind)} (of {len(kinds)} GPUs)"
    for device in devices.found:
        if device.ecc_errors:
            yield f"GPU {device.index} ({device.name}) has {device.ecc_errors} uncorrected memory errors"
