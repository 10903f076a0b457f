"""FSDP2's and tensor-parallel parameters, without `ShardedOptimizer`: the same training, and checkpoints of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import dtensor_jobs as jobs
from .ranks import Ranks, ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks(2) as group:
        yield group


@pytest.mark.parametrize("name", jobs.SETTINGS)
def test_fsdp2_trains_as_one_process_and_resumes_from_a_distributed_checkpoint(two: Ranks, name: str) -> None:
    for result in two.run(jobs.fsdp, name):
        # Both compute the same in float64, but for the sum of two equal gradients: exact, and halved exactly.
        assert result["apart"] <= 1e-12
        assert result["resumed"] == 0.0
        assert result["sharded"]


def test_parameters_may_be_sharded_by_columns_or_replicated(two: Ranks) -> None:
    for result in two.run(jobs.other_placements):
        assert len(result) == 4
        # A gradient is the sum of a third and two thirds: within a rounding of 6e-8, which ASGO's root of a factor of
        # rank 4 leaves below 1e-4 of an update of 1e-2.
        assert max(result.values()) <= 1e-5
