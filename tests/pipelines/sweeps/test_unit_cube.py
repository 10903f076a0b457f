"""Quasi-random points of a search: even and reproducible."""

from __future__ import annotations

import numpy as np
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from scipy.stats import qmc

from pipelines.sweeps.study import between, one_of
from pipelines.sweeps.unit_cube import from_unit, quasi_random, to_unit

SQUARE = {"x": between(0.0, 1.0, log=False), "y": between(0.0, 1.0, log=False)}


def points(seed: int, count: int) -> np.ndarray:
    return np.array([list(quasi_random(seed, number, SQUARE).values()) for number in range(count)])


def test_the_points_are_more_even_than_independent_ones_for_every_number_of_them() -> None:
    for count in (8, 12, 20, 50):
        even = [float(qmc.discrepancy(points(seed, count))) for seed in range(5)]
        drawn = [float(qmc.discrepancy(np.random.default_rng(seed).random((count, 2)))) for seed in range(200)]
        assert max(even) < 0.6 * float(np.median(drawn))


def test_the_sequence_depends_on_the_seed_alone_and_does_not_begin_in_a_corner() -> None:
    assert (points(3, 9)[:5] == points(3, 5)).all()
    assert quasi_random(3, 4, SQUARE) == quasi_random(3, 4, dict(reversed(SQUARE.items())))
    firsts = np.array([points(seed, 1)[0] for seed in range(40)])
    assert len(np.unique(firsts)) == 80
    assert abs(firsts.mean() - 0.5) < 0.15


def test_all_values_of_a_setting_are_equally_probable() -> None:
    for space in (between(1, 4, log=False), one_of(["a", "b", "c", "d"])):
        values = [from_unit(fraction, space) for fraction in (np.arange(400) + 0.5) / 400]
        assert sorted(values.count(value) for value in set(values)) == [100] * 4
        assert from_unit(1.0, space) in (4, "d")


def test_values_map_to_the_unit_interval_and_back() -> None:
    assert from_unit(0.25, between(1e-4, 1.0, log=True)) == pytest.approx(1e-3)
    assert from_unit(0.25, between(-2.0, 2.0, log=False)) == pytest.approx(-1.0)
    for distribution in (FloatDistribution(1e-4, 1.0, log=True), IntDistribution(2, 9)):
        for value in (distribution.low, distribution.high):
            assert from_unit(to_unit(value, distribution), distribution) == pytest.approx(value)
