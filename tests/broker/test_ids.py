"""Identifiers are unlike each other, or repeatable, as asked."""

from __future__ import annotations

import re

import pytest

from broker.ids import RandomIds, SequentialIds


def test_random_ids_have_the_stated_shape_and_differ() -> None:
    ids = RandomIds()
    made = {ids.new("job") for _ in range(1_000)}
    assert len(made) == 1_000
    assert all(re.fullmatch(r"job_[a-z2-7]{20}", name) for name in made)


def test_sequential_ids_count_for_each_prefix_and_sort_as_made(id_source: SequentialIds) -> None:
    assert [id_source.new("job"), id_source.new("lease"), id_source.new("job")] == [
        "job_000001",
        "lease_000001",
        "job_000002",
    ]
    made = [id_source.new("round") for _ in range(12)]
    assert made == sorted(made)


@pytest.mark.parametrize("prefix", ["", "Job", "job_", "../x", "a" * 13])
def test_a_prefix_that_could_confuse_is_refused(prefix: str) -> None:
    for ids in (RandomIds(), SequentialIds()):
        with pytest.raises(AssertionError):
            ids.new(prefix)
