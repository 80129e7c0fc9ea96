from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.sharded_sites import LIMIT_S, run_sites


def alone(mode: str, world: int) -> dict[str, Any]:
    """A site with a round log of its own."""
    name = f"{mode.replace('+', '-')}-{world}"
    return {"name": name, "mode": mode, "world": world, "log": name}


def paired(mode: str, world: int) -> list[dict[str, Any]]:
    """A site, and another of one rank in a round log of theirs: what is merged is not what the site said."""
    site = alone(mode, world) | {"batch": 4}
    return [site, {"name": f"other-{site['name']}", "mode": "plain", "world": 1, "log": site["log"], "batch": 4}]


def joined(mode: str, world: int, first: str = "plain", first_world: int = 1) -> list[dict[str, Any]]:
    """A site, and another that comes once round 2 is sealed."""
    log = f"{first}-{mode}".replace("+", "-")
    return [
        {"name": f"early-{log}", "mode": first, "world": first_world, "log": log, "batch": 3},
        {"name": f"late-{log}", "mode": mode, "world": world, "log": log, "batch": 3, "joins_after": 2},
    ]


def hashes(found: list[dict[str, Any]]) -> dict[str, str]:
    """The outer state that all ranks of a site saw, by round; a round after which the site had no batch is left out."""
    assert all(rank["hashes"] == found[0]["hashes"] for rank in found)
    return dict(found[0]["hashes"])


def last(found: list[dict[str, Any]]) -> tuple[str, str]:
    return max(hashes(found).items(), key=lambda item: int(item[0]))


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Three federations of two sites in one run: most of its time goes into importing torch."""
    together = [
        {"name": "ams", "mode": "plain", "world": 1, "batch": 3},
        {"name": "bern", "mode": "tp+fsdp", "world": 4, "batch": 3},
    ]
    return run_sites(
        tmp_path_factory.mktemp("sites") / "run",
        [*paired("ddp", 2), *paired("fsdp", 2), *together, *joined("fsdp", 2)],
        codec="int8",
    )


def test_a_fully_sharded_site_contributes_the_same_bits_as_a_replicated_one(
    sites: dict[str, list[dict[str, Any]]],
) -> None:
    replicated, sharded = sites["ddp-2"], sites["fsdp-2"]
    assert replicated[0]["steps"] >= 4
    assert [rank["seen"] for rank in sharded] == [rank["seen"] for rank in replicated]
    assert [rank["losses"] for rank in sharded] == [rank["losses"] for rank in replicated]
    assert len(set(hashes(replicated).values())) >= 3
    assert hashes(sharded) == hashes(replicated)


def test_sites_agree_whatever_way_each_of_them_shards(sites: dict[str, list[dict[str, Any]]]) -> None:
    found = sites
    one, other = hashes(found["ams"]), hashes(found["bern"])
    assert len(set(one.values()) & set(other.values())) >= 3
    assert {number: one[number] for number in one if number in other} == {
        number: other[number] for number in other if number in one
    }
    assert last(found["ams"]) == last(found["bern"])
    first, second, third, fourth = (rank["seen"] for rank in found["bern"])
    assert first == second, "ranks that share tensors share batches"
    assert third == fourth
    assert first != third


def agree_after_the_join(found: dict[str, list[dict[str, Any]]], log: str) -> None:
    early, late = found[f"early-{log}"], found[f"late-{log}"]
    one, other = hashes(early), hashes(late)
    assert min(map(int, other)) >= 2, "it came when round 2 was sealed"
    assert len(one.keys() & other.keys()) >= 2
    assert {number: one[number] for number in other if number in one} == {
        number: other[number] for number in other if number in one
    }
    assert last(early) == last(late)
    assert 0 < late[0]["steps"] < early[0]["steps"]


def test_a_sharded_site_joins_a_running_job_by_the_snapshot_of_a_whole_one(
    sites: dict[str, list[dict[str, Any]]],
) -> None:
    agree_after_the_join(sites, "plain-fsdp")


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("strategy", ["diloco", "every_step", "streaming", "quorum", "neighbour", "async"])
def test_a_site_joins_late_whatever_way_it_and_the_others_shard(tmp_path: Path, strategy: str) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "period_steps": 1 if strategy == "every_step" else 2}
    if strategy == "streaming":
        settings |= {"period_steps": 4, "fragments": 2, "overlap_steps": 1, "mixing": 0.5}
    if strategy == "quorum":
        settings["quorum_sites"] = 2
    pairs = [*joined("tp+fsdp", 4, "fsdp", 2), *joined("plain", 1, "tp", 2), *joined("fsdp", 3, "ddp", 2)]
    found = run_sites(tmp_path / "run", pairs, samples=288, **settings)
    for log in ("fsdp-tp-fsdp", "tp-plain", "ddp-fsdp"):
        agree_after_the_join(found, log)


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("strategy", ["every_step", "streaming", "quorum", "neighbour", "async"])
def test_every_strategy_runs_on_shards(tmp_path: Path, strategy: str) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "period_steps": 1 if strategy == "every_step" else 2}
    if strategy == "streaming":
        settings |= {"period_steps": 4, "fragments": 2, "overlap_steps": 1, "mixing": 0.5}
    if strategy == "quorum":
        settings["quorum_sites"] = 2
    found = run_sites(tmp_path / "run", [*paired("ddp", 2), *paired("fsdp", 2)], **settings)
    assert hashes(found["fsdp-2"]) == hashes(found["ddp-2"])


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(("mode", "world"), [("fsdp", 3), ("hsdp", 4)])
def test_more_than_two_ranks_follow_as_many_replicas(tmp_path: Path, mode: str, world: int) -> None:
    """Gloo sums their gradients in another order for shards than for replicas, so these agree to rounding only."""
    found = run_sites(tmp_path / "run", [alone("ddp", world), alone(mode, world)])
    hashes(found[f"{mode}-{world}"])
    for sharded, replicated in zip(found[f"{mode}-{world}"], found[f"ddp-{world}"], strict=True):
        assert sharded["losses"] == pytest.approx(replicated["losses"], rel=1e-5)


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_S + 60)
def test_tensor_parallel_ranks_are_one_replica_with_larger_batches(tmp_path: Path) -> None:
    found = run_sites(tmp_path / "run", [alone("plain", 1), alone("tp", 2), alone("ddp", 2), alone("tp+fsdp", 4)])
    for tensor, replica in (("tp-2", "plain-1"), ("tp+fsdp-4", "ddp-2")):
        sharded, whole = found[tensor.replace("+", "-")], found[replica]
        hashes(sharded)
        assert sharded[0]["steps"] == whole[0]["steps"]
        assert sharded[0]["seen"] == whole[0]["seen"]
        assert sharded[0]["losses"] == pytest.approx(whole[0]["losses"], rel=1e-5)


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_S + 60)
def test_a_run_goes_on_from_the_checkpoint_of_another_mesh(tmp_path: Path) -> None:
    """Two replicas resume from two shards' checkpoint to the same bits; four ranks in two axes to rounding."""
    whole = run_sites(tmp_path / "whole", [{"name": "ams", "mode": "fsdp", "world": 2}])["ams"]
    checkpoint = str(tmp_path / "whole" / "ams" / "checkpoint" / "round-000002.safetensors")
    for mode, world, is_same in (("ddp", 2, True), ("fsdp", 2, True), ("tp+fsdp", 4, False)):
        settings = {"resume_from": checkpoint, "base_round": 2, "done": [[0, 48]]}
        found = run_sites(tmp_path / mode, [{"name": "ams", "mode": mode, "world": world}], **settings)["ams"]
        assert found[0]["losses"] == pytest.approx(whole[0]["losses"][4:], rel=1e-5)
        assert (last(found) == last(whole)) == is_same
