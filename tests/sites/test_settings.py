from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from sites.errors import SettingsError
from sites.inventory import Measured, Terms, offer
from sites.policy import Policy
from sites.settings import load_settings

GOOD = """\
site_id: hamburg
folder: ./here
pools:
  - gpu_type: cpu-slot
    gpus: 2
    ask: 0.25
  - {gpu_type: A100, gpus: [GPU-a, GPU-b], ask: "2.5"}
links:
  - {target: bremen, bandwidth: 200 Mbit/s, delay_ms: 20, egress_price: 0.01}
listen: {host: 192.0.2.1, ports: 7600-7699}
i_trust_all_tenants: true
"""


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "site.yaml").write_text(text)
    return tmp_path / "site.yaml"


def test_quantities_are_read_in_the_units_people_write(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD))
    assert settings.folder == tmp_path / "here"
    assert [pool.gpu_ids for pool in settings.pools] == [("0", "1"), ("GPU-a", "GPU-b")]
    assert [[part.price for part in pool.ask_curve] for pool in settings.pools] == [[250_000], [2_500_000]]
    assert settings.links[0].bandwidth == 200e6
    assert settings.links[0].egress_price == 10_000
    assert settings.listen is not None
    assert settings.listen.ports == (7600, 7699)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("gpu_type: cpu-slot", "gpu_type: Z9000", 4, "unknown GPU type"),
        ("    ask: 0.25", "    ask: cheap", 6, "not an amount of credits"),
        ("200 Mbit/s", "fast", 9, "not a bandwidth"),
        ("7600-7699", "7699-7600", 10, "not a range of ports"),
        ("site_id: hamburg", "site_id: Hamburg", 1, "site_id"),
        ("    gpus: 2", "    gpus: 0", 5, "gpus"),
        ("    gpus: 2", "    gpus: 2\n    gpu_count: 2", 6, "gpu_count"),
        ("i_trust_all_tenants: true", "sandbox: plain", 1, "without isolation"),
        ("i_trust_all_tenants: true", "sandbox: none", 11, "bubblewrap"),
        ("target: bremen", "target: hamburg", 1, "leads to another site"),
    ],
)
def test_fault_is_told_with_its_line(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    assert old in GOOD
    with pytest.raises(SettingsError) as told:
        load_settings(write(tmp_path, GOOD.replace(old, new)))
    assert f"line {line}," in str(told.value)
    assert words in str(told.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "a: !!python/object:os.system {}", "a: &x [1]\nb: *x\n", "\x00"])
def test_file_that_is_no_settings_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError):
        load_settings(write(tmp_path, text))


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path / "site.yaml")


def test_what_an_owner_asks_beyond_a_price_is_offered(tmp_path: Path) -> None:
    text = GOOD.replace(
        "    gpus: 2\n    ask: 0.25",
        "    gpus: 16\n    ask: [{gpus: 10, price: 0.25}, {gpus: 6, price: 0.75}]\n    gpus_max_per_job: 8\n"
        "    reserved: [{from: 2030-01-05T08:00Z, to: 2030-01-05T18:00Z, gpus: 4}]",
    ).replace(
        "listen:",
        "region: eu-north\ncontinent: eu\ndrain_at: 2030-02-01T00:00Z\n"
        "data_egress: {continent: 0.02, beyond: 0.08}\nlisten:",
    )
    offered = offer(
        load_settings(write(tmp_path, text)),
        Measured(),
        Terms(Policy(), {}, draining=False, now=dt.datetime(2029, 1, 1, tzinfo=dt.UTC)),
    )
    pool = offered.pools[0]
    assert pool.ask_micros_per_gpu_hour == 250_000
    assert [(step.gpus, step.ask_micros_per_gpu_hour) for step in pool.ask_steps] == [(6, 750_000)]
    assert pool.job_gpus_max == 8
    assert [(kept.to_ms - kept.from_ms, kept.gpus) for kept in pool.reserved] == [(10 * 3_600_000, 4)]
    assert (offered.region, offered.continent) == ("eu-north", "eu")
    assert offered.drains_at_ms == 1_896_134_400_000
    egress = (offered.data_egress_to_region, offered.data_egress_to_continent, offered.data_egress_beyond)
    assert egress == (0, 20_000, 80_000)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ("[{gpus: 1, price: 0.25}, {gpus: 2, price: 0.75}]", "add up to the pool's 2 GPUs"),
        ("[{gpus: 1, price: 0.75}, {gpus: 1, price: 0.25}]", "must cost more than the one before"),
        ("[{gpus: 1, price: cheap}, {gpus: 1, price: 1}]", "not an amount of credits"),
        ("[]", "ask"),
        ("0.25\n    reserved: [{from: 2030-01-05T08:00Z, to: 2030-01-04T08:00Z, gpus: 1}]", "end after it begins"),
        ("0.25\n    reserved: [{from: 2030-01-05T08:00, to: 2030-01-06T08:00Z, gpus: 1}]", "timezone"),
    ],
)
def test_a_curve_or_a_time_that_makes_no_sense_is_told(tmp_path: Path, ask: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings(write(tmp_path, GOOD.replace("ask: 0.25", f"ask: {ask}")))
