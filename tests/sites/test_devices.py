"""The host's GPUs: what NVML finds, and what is said where there is no driver. NVML itself is the real library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sites.devices import Device, Devices, kind_of, mismatches, read_devices
from sites.doctor import Level, examine
from sites.settings import load_settings
from tests.sites.test_settings import GOOD, write
from training.clock import SystemClock

A100 = Device(0, "GPU-1", "NVIDIA A100-SXM4-80GB", 80_000_000_000, 0, 0, 60.0, 30)


def test_without_a_driver_why_is_said() -> None:
    devices = read_devices()
    if devices.found:
        assert devices.driver
        assert all(device.uuid.startswith("GPU-") and device.memory_bytes for device in devices.found)
    else:
        assert "NVIDIA driver" in devices.absence
        assert "nvidia-smi" in devices.absence


def test_without_the_library_why_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in read_devices().absence


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Quadro RTX 6000", "RTX6000"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA GeForce RTX 3090", None),
        ("cpu-slot", None),
    ],
)
def test_a_drivers_name_is_the_markets(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_what_is_promised_and_not_there_is_named(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD))  # two slots and two A100
    assert list(mismatches(settings, Devices((A100, A100), "1"))) == []
    (short,) = mismatches(settings, Devices((A100,), "1"))
    assert short == "site.yaml promises 2 A100, NVML finds 1 (of 1 GPUs)"
    (away,) = mismatches(settings, Devices((), absence="the driver sleeps"))
    assert away == "site.yaml promises 2 GPUs, but the driver sleeps"
    ill = Device(1, "GPU-2", "NVIDIA A100-PCIE-40GB", None, 3, None, None, None)
    (broken,) = mismatches(settings, Devices((A100, ill), "1"))
    assert "3 uncorrected memory errors" in broken
    slots = load_settings(write(tmp_path, GOOD.replace('  - {gpu_type: A100, gpus: [GPU-a, GPU-b], ask: "2.5"}\n', "")))
    assert list(mismatches(slots, Devices((), absence="the driver sleeps"))) == []


def test_the_doctor_finds_promised_gpus_missing(tmp_path: Path) -> None:
    if read_devices().found:
        pytest.skip("this host has NVIDIA GPUs; the promise may hold")
    settings = load_settings(write(tmp_path, GOOD))
    (fault,) = [finding for finding in examine(settings, SystemClock()) if finding.check == "gpus"]
    assert fault.level is Level.FAULT
    assert "promises 2 GPUs" in fault.detail
