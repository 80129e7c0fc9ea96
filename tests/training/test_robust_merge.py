"""One site of 3 to 8 that lies: what each merge makes of it, against the honest sites' mean."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.training.gloo_threads import ranks_of_a_site
from tests.training.memory_log import MemoryLog
from tests.training.small_job import Points, Site, run, seats, site
from training.codecs import CODECS, Values, decode
from training.codecs.framing import HEADER
from training.errors import SpecError
from training.jobfile import read_job_file
from training.merge import weighted_mean
from training.robust_merge import Contributions, merged, trimmed
from training.spec import MergeRule, SyncPlan

ROBUST: tuple[MergeRule, ...] = ("norm_cap", "trimmed_mean", "centred_clipping")
COUNTS = range(3, 9)
ELEMENTS = 5000
NAMES = ("ams", "bern", "cadiz", "delft", "essen", "fano", "genoa", "hull")


def directions(count: int) -> list[Values]:
    """What honest sites send: a common direction, and noise of a quarter of its length."""
    chance = np.random.default_rng(count)
    common = chance.standard_normal(ELEMENTS)
    return [(common + chance.standard_normal(ELEMENTS) / 4).astype(np.float32) for _ in range(count)]


def length(values: Values) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))


def stale(honest: Values) -> Values:
    """Another round's direction, of the length that directions had then."""
    return (np.random.default_rng(99).standard_normal(ELEMENTS) * 3).astype(np.float32)


LIES: dict[str, Callable[[Values], Values]] = {
    "1000x": lambda honest: honest * np.float32(1000),
    "sign flip": lambda honest: -honest,
    "1000x and sign flip": lambda honest: honest * np.float32(-1000),
    "stale copy": stale,
}


def distance_promised(rule: MergeRule, honest: list[Values], wrong_share: float) -> float:
    """The README's bounds, from the honest sites' contributions alone."""
    lengths = [length(each) for each in honest]
    spread = length(np.ptp(np.stack(honest), axis=0))
    if rule == "norm_cap":
        return 2 * wrong_share * max(lengths) + max(lengths) - min(lengths)
    return spread if rule == "trimmed_mean" else 2 * spread


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("rule", ROBUST)
def test_a_lying_site_moves_the_merge_no_further_than_promised(rule: MergeRule, lie: str) -> None:
    for count in COUNTS:
        *honest, last = directions(count)
        for place in (0, count - 1):
            sent = [(16, each) for each in honest]
            sent.insert(place, (16, LIES[lie](last)))
            apart = length(merged(rule, sent) - weighted_mean([(16, each) for each in honest]))
            assert apart <= distance_promised(rule, honest, 1 / count), (count, place)


@pytest.mark.parametrize("count", COUNTS)
def test_the_mean_breaks_every_one_of_the_promises(count: int) -> None:
    """So that the bounds above are bounds that a merge can miss."""
    *honest, last = directions(count)
    sent = [*((16, each) for each in honest), (16, LIES["1000x and sign flip"](last))]
    apart = length(merged("mean", sent) - weighted_mean([(16, each) for each in honest]))
    assert all(apart > 10 * distance_promised(rule, honest, 1 / count) for rule in ROBUST)


@pytest.mark.parametrize("rule", ["trimmed_mean", "centred_clipping"])
def test_a_sign_flip_costs_the_median_rules_a_fraction_of_what_it_costs_the_mean(rule: MergeRule) -> None:
    for count in COUNTS:
        *honest, last = directions(count)
        sent = [*((16, each) for each in honest), (16, -last)]
        right = weighted_mean([(16, each) for each in honest])
        assert length(merged(rule, sent) - right) < 0.6 * length(merged("mean", sent) - right), count


@pytest.mark.parametrize("rule", ROBUST)
def test_a_site_gains_nothing_by_overstating_its_weight(rule: MergeRule) -> None:
    *honest, last = directions(5)
    sent = [(16, each) for each in honest]
    assert np.array_equal(merged(rule, [*sent, (1 << 28, -last)]), merged(rule, [*sent, (16, -last)]))


@pytest.mark.parametrize("rule", ROBUST)
def test_equal_contributions_are_merged_to_themselves(rule: MergeRule) -> None:
    (values,) = directions(1)
    for count in COUNTS:
        assert np.allclose(merged(rule, [(3, values)] * count), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", ROBUST)
def test_two_sites_are_merged_at_the_shorter_ones_length_and_one_is_taken_as_it_is(rule: MergeRule) -> None:
    one, two = directions(2)
    shorter = min(length(one), length(two))
    found = merged(rule, [(16, one), (16, two * np.float32(1000))])
    assert length(found) <= shorter * (1 + 1e-6)
    assert np.array_equal(merged(rule, [(16, one)]), one)


def test_the_trimmed_mean_drops_one_of_few_and_leaves_at_least_one() -> None:
    assert [trimmed(count) for count in COUNTS] == [1, 1, 1, 1, 1, 2]
    (zero, one, far) = (np.float32([each, -0.0]) for each in (0, 1, 1e6))
    assert merged("trimmed_mean", [(1, zero), (1, far), (1, one)]).tolist() == [1.0, 0.0]


def hashes() -> str:
    sent: Contributions = [(16 + place, each) for place, each in enumerate(directions(5))]
    return " ".join(merged(rule, sent).tobytes().hex()[:4000] for rule in ROBUST)


def test_the_bits_do_not_depend_on_the_processors_features() -> None:
    code = "from tests.training.test_robust_merge import hashes; print(hashes())"
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert process.stdout.strip() == hashes()


# Whole sessions, over a log whose hub hands on what the lying site sends.


def liar(lie: str) -> Callable[[int, str, int, bytes], bytes]:
    """Put what a lie makes of it in place of each contribution of bern; of stale copies, those of round 1."""
    kept: dict[int, bytes] = {}

    def tamper(number: int, name: str, fragment: int, payload: bytes) -> bytes:
        if name != "bern":
            return payload
        if lie == "stale copy":
            return kept.setdefault(fragment, payload)
        if lie == "NaN":
            return payload[:-4] + np.float32(np.nan).tobytes() if number <= 3 else payload
        values = decode(payload, (len(payload) - HEADER.size) // 4)
        return bytes(CODECS["fp32"].encode(LIES[lie](values), None)[0])

    return tamper


def held_out_loss(each: Site) -> float:
    points = Points()
    with torch.no_grad():
        return float(torch.nn.functional.mse_loss(each.module(points.inputs), points.targets))


PLAN = {"samples": 480, "outer_learning_rate": 0.7, "outer_momentum": 0.3}


def loss_with(folder: Path, lie: str | None, rule: MergeRule, count: int) -> float:
    log = MemoryLog(seats(*NAMES[:count]), **({} if lie is None else {"tamper": liar(lie)}))
    sites = [site(log, folder / f"{lie} {rule} {count}", name, merge=rule, **PLAN) for name in NAMES[:count]]
    run(*sites)
    assert log.hashes_agree()
    return held_out_loss(sites[0])


@pytest.mark.parametrize("count", [3, 5, 8])
def test_training_survives_a_lying_site_under_each_rule_and_not_under_the_mean(tmp_path: Path, count: int) -> None:
    honest = loss_with(tmp_path, None, "mean", count)
    untrained = held_out_loss(site(MemoryLog(seats("ams")), tmp_path / "untrained", "ams"))
    assert honest < 0.9 * untrained
    assert not loss_with(tmp_path, "1000x and sign flip", "mean", count) < 10 * untrained
    for rule in ROBUST:
        assert loss_with(tmp_path, "1000x and sign flip", rule, count) < untrained, rule


@pytest.mark.parametrize("rule", ["mean", *ROBUST])
def test_what_is_not_a_number_weighs_nothing_under_any_rule(tmp_path: Path, rule: MergeRule) -> None:
    assert np.isfinite(loss_with(tmp_path, "NaN", rule, 3))


@pytest.mark.parametrize("lie", ["sign flip", "stale copy"])
@pytest.mark.parametrize("rule", ROBUST)
def test_sites_of_one_two_and_three_ranks_agree_beside_a_lying_one(tmp_path: Path, rule: MergeRule, lie: str) -> None:
    log = MemoryLog([*seats("ams", "bern"), *seats("delft", gpus=2), *seats("oslo", gpus=3)], tamper=liar(lie))
    delft = [site(log, tmp_path, "delft", each, merge=rule) for each in ranks_of_a_site(2)]
    oslo = [site(log, tmp_path, "oslo", each, merge=rule) for each in ranks_of_a_site(3)]
    run(site(log, tmp_path, "ams", merge=rule), site(log, tmp_path, "bern", merge=rule), *delft, *oslo)
    assert log.applied
    assert log.hashes_agree()


# The plan.

JOB = """\
name: my-job
resources: {accelerators: "H100:2..8"}
run: python train.py
market:
  budget: 12.5
  sites_max: SITES
  sync: {strategy: diloco, merge: MERGE}
  workload: {samples: 19200, batch_per_gpu: 16, parameters: 136960, flops_per_sample: 5.3e7}
"""


def job(sites: int, merge: str) -> SyncPlan:
    return read_job_file(JOB.replace("SITES", str(sites)).replace("MERGE", merge)).spec("a" * 64).market.sync


def test_a_job_file_names_the_rule_and_needs_three_sites_for_it() -> None:
    assert job(3, "norm_cap").merge == "norm_cap"
    assert job(2, "mean").merge == "mean"
    with pytest.raises(SpecError, match="compares at least 3 sites, but sites_max is 2"):
        job(2, "norm_cap")
    with pytest.raises(SpecError, match="Input should be"):
        job(3, "median")


def test_rules_that_a_strategy_or_a_codec_cannot_keep_are_refused() -> None:
    for strategy in ("quorum", "neighbour", "async"):
        with pytest.raises(ValidationError, match="merges in its own way"):
            SyncPlan.model_validate({"strategy": strategy, "merge": "norm_cap"})
    for codec in ("auto", "topk2"):
        with pytest.raises(ValidationError, match="name another codec"):
            SyncPlan.model_validate({"strategy": "diloco", "codec": codec, "merge": "trimmed_mean"})
    assert SyncPlan(strategy="sparse", merge="norm_cap").codec == "topk2"


def test_a_plan_placed_on_one_site_can_be_read_again() -> None:
    asked = SyncPlan(strategy="diloco", codec="int8", merge="trimmed_mean")
    placed = asked.placed(SyncPlan(strategy="local", codec="fp32"))
    assert SyncPlan.model_validate_json(placed.model_dump_json()).merge == "trimmed_mean"
