from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.gloo_threads import ranks_of_a_site
from tests.training.memory_log import MemoryExchange, MemoryLog
from tests.training.small_job import SAMPLES, run, seats, site
from training.errors import ExchangeError
from training.exchange import Entry, Position, SampleRange
from training.outer import OuterRule
from training.outer_share import OuterShare
from training.parameters import Parameters
from training.ranks import Ranks, group_timeout
from training.strategies.diloco import Diloco


def on_each(ranks: list[Ranks], work: Callable[[Ranks], Any]) -> list[Any]:
    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda each=each: results.update({each.rank: work(each)})) for each in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[each.rank] for each in ranks]


def test_documents_and_arrays_reach_every_rank() -> None:
    ranks = ranks_of_a_site(3)
    told = on_each(ranks, lambda each: each.broadcast_json({"round": 7} if each.rank == 0 else None))
    assert told == [{"round": 7}] * 3
    arrays = on_each(ranks, lambda each: each.broadcast(np.full(4, each.rank, dtype=np.float32), 2))
    assert all(np.array_equal(each, [2, 2, 2, 2]) for each in arrays)
    assert on_each(ranks, lambda each: each.any_of([each.rank == 1, False])) == [[True, False]] * 3


def test_a_single_rank_needs_no_group() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.world) == (0, 1)
    assert ranks.broadcast_json({"a": 1}) == {"a": 1}
    assert ranks.any_of([True, False]) == [True, False]


def test_a_collective_outlasts_the_patience_of_rank_0() -> None:
    assert group_timeout(60.0).total_seconds() > 60.0


@pytest.mark.parametrize("codec", ["fp32", "topk2"])
def test_sites_of_one_two_and_three_ranks_agree_with_sites_of_one(tmp_path: Path, codec: str) -> None:
    """The partition, the codec's blocks and the hash know nothing of ranks; only the gradients' sums differ.

    So the sites of one federation, whatever their ranks, agree on every hash.
    """
    log = MemoryLog([*seats("ams"), *seats("bern", gpus=2), *seats("oslo", gpus=3)])
    bern = [site(log, tmp_path, "bern", each, codec=codec) for each in ranks_of_a_site(2)]
    oslo = [site(log, tmp_path, "oslo", each, codec=codec) for each in ranks_of_a_site(3)]
    run(site(log, tmp_path, "ams", codec=codec), *bern, *oslo)
    assert len(log.applied) == 2
    assert log.hashes_agree()
    for other in (*bern[1:], *oslo):
        for mine, theirs in zip(bern[0].module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def outer_hash_of_equal_contributions(folder: Path, world: int) -> str:
    """Run one site whose ranks all move their model by the same fixed amounts."""
    log = MemoryLog(seats("ams", gpus=world))
    ranks = ranks_of_a_site(world) if world > 1 else [Ranks()]
    sites = [site(log, folder / str(world), "ams", each, codec="int8", samples=8 * world) for each in ranks]

    def work(each: Ranks) -> str:
        module = sites[each.rank].module
        share = OuterShare(Parameters(module, 32, each), each, Diloco(OuterRule(0.7, 0.9)), total_samples=100)
        for number in (1, 2):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape) * number)
            payloads = {("ams", fragment): payload for fragment, payload in share.contribution("int8", number).items()}
            payloads |= {("oslo", fragment): payload for (_, fragment), payload in payloads.items()}
            fragments = tuple(range(len(share.fragments)))
            entries = [
                Entry("ams", 3, (SampleRange(10 * number, 10 * number + 3),), fragments),
                Entry("oslo", 5, (SampleRange(10 * number + 3, 10 * number + 8),), fragments),
            ]
            counted = share.verdict(entries, payloads, number)
            assert len(counted) == 2
            share.apply(number, counted, payloads, own_counts=True, scatter=True)
        return share.state_hash()

    hashes = on_each(ranks, work)
    assert len(set(hashes)) == 1
    return str(hashes[0])


def test_equal_contributions_give_equal_hashes_with_one_two_and_three_ranks(tmp_path: Path) -> None:
    hashes = {outer_hash_of_equal_contributions(tmp_path, world) for world in (1, 2, 3)}
    assert len(hashes) == 1


def test_a_blob_that_one_rank_cannot_decode_weighs_nothing_at_all_ranks(tmp_path: Path) -> None:
    def tamper(number: int, name: str, fragment: int, payload: bytes) -> bytes:
        return payload + b"x" if (number, name, fragment) == (2, "oslo", 1) else payload

    log = MemoryLog([*seats("ams", gpus=2), *seats("oslo")], tamper=tamper)
    sites = [site(log, tmp_path, "ams", each) for each in ranks_of_a_site(2)]
    run(*sites, site(log, tmp_path, "oslo"))
    assert log.hashes_agree()
    assert [each.session.samples_done for each in sites if each.session is not None] == [SAMPLES, SAMPLES]


class LostLog(MemoryExchange):
    """A round log that never answers."""

    def position(self) -> Position:
        message = "the log did not answer"
        raise ExchangeError(message)


def test_when_rank_0_loses_the_log_every_rank_of_the_site_learns_it(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams", gpus=2))
    sites = [site(log, tmp_path, "ams", each) for each in ranks_of_a_site(2)]
    for each in sites:
        each.exchange = LostLog(log, "ams")
        with pytest.raises(ExchangeError):
            run(*sites)
    assert all(isinstance(each.error, ExchangeError) for each in sites)
