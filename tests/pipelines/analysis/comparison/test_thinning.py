"""Thinned curves show what the whole ones do."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.analysis.comparison.thinning import keep_evenly, keep_spikes, moving_mean


def test_a_spike_of_one_step_in_50_000_survives() -> None:
    losses = np.linspace(5, 3, 50_000)
    for at, loss in ((31_415, 9.0), (44_444, 1.0)):
        losses[at] = loss
    kept = keep_spikes(losses, 2000)
    assert {31_415, 44_444} <= set(kept.tolist())


@pytest.mark.parametrize("count", [0, 1, 7, 1999, 2000, 2001, 2003, 3999, 50_001, 123_457])
def test_what_is_kept_has_the_ends_the_minimum_and_the_maximum(count: int) -> None:
    losses = np.random.default_rng(count).standard_normal(count)
    kept = keep_spikes(losses, 2000)
    assert len(kept) <= 2000
    assert len(kept) >= min(count, 900)
    assert np.all(np.diff(kept) > 0)
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)
        assert losses[kept].min() == losses.min()
        assert losses[kept].max() == losses.max()


def test_every_stretch_keeps_its_own_extremes() -> None:
    losses = np.random.default_rng(0).standard_normal(20_000)
    kept = keep_spikes(losses, 102)
    for part in range(50):
        stretch = losses[part * 400 : (part + 1) * 400]
        shown = losses[kept[(kept >= part * 400) & (kept < (part + 1) * 400)]]
        assert (shown.min(), shown.max()) == (stretch.min(), stretch.max())


def test_the_moving_mean_is_the_mean_of_a_window_centred_at_the_beginning() -> None:
    values = np.random.default_rng(1).standard_normal(50)
    expected = []
    for at in range(50):
        reach = min(at, 7)
        expected.append(values[at - reach : at + reach + 1].mean())
    assert moving_mean(values, 7) == pytest.approx(expected)
    assert moving_mean(values, 0) == pytest.approx(values)


def test_runs_of_different_length_keep_the_same_steps() -> None:
    whole, part = np.arange(1.0, 50_001.0), np.arange(1.0, 31_416.0)
    of_whole, of_part = whole[keep_evenly(whole, 50_000, 1000)], part[keep_evenly(part, 50_000, 1000)]
    assert len(of_whole) == 1000
    assert (of_whole[0], of_whole[-1]) == (1, 50_000)
    assert np.ptp(np.diff(of_whole)) <= 1
    shared = of_whole[of_whole <= part[-1]]
    assert of_part[: len(shared)].tolist() == shared.tolist()
    assert of_part[-1] == part[-1]


def test_a_short_curve_is_kept_whole() -> None:
    steps = np.arange(10.0, 161.0, 10.0)
    assert keep_evenly(steps, 160, 1000).tolist() == list(range(16))
    assert len(keep_evenly(np.empty(0), 160, 1000)) == 0
