"""Where a search by grid goes, against sequences worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from pipelines.sweeps.grid import Position, best_position, edge_axes, first_positions, next_position


def positions(points: int, trials: int, loss: Callable[[float], float]) -> list[float]:
    """Where the trials of a search go whose losses are known."""
    return [at for (at,) in lattice_positions([points], trials, lambda position: loss(*position))]


def lattice_positions(points: list[int], trials: int, loss: Callable[[Position], float]) -> list[Position]:
    """The same with several axes."""
    losses: dict[Position, float] = {}
    for _ in range(trials):
        position = next_position(points, losses)
        assert position not in losses
        losses[position] = loss(position)
    return list(losses)


def test_the_first_points_go_outwards_from_the_contenders_own_value() -> None:
    assert first_positions([5]) == [(0,), (-1,), (1,), (-2,), (2,)]
    assert positions(5, 5, lambda position: math.nan) == [0, -1, 1, -2, 2], "whatever the losses are"


@pytest.mark.parametrize(
    ("best", "sequence"),
    [
        # Beyond the edge until the best is inside; then the gap towards the better neighbour, and then the wider one.
        (3.2, [0, -1, 1, 2, 3, 4, 3.5, 2.5, 3.25]),
        (-1.9, [0, -1, 1, -2, -3, -1.5, -2.5, -1.75]),
        (0.2, [0, -1, 1, 0.5, -0.5, 0.25, 0.125]),
    ],
)
def test_the_grid_is_widened_at_the_edge_and_refined_inside(best: float, sequence: list[float]) -> None:
    assert positions(3, len(sequence), lambda position: abs(position - best)) == sequence


def test_a_point_that_is_being_tried_is_not_tried_again_and_does_not_count_as_good() -> None:
    assert next_position([3], {(0,): 2.0, (-1,): math.inf}) == (1,)
    tried: dict[Position, float] = {(0,): 2.0, (-1,): 3.0, (1,): 1.0}
    assert next_position([3], tried) == (2,)
    assert next_position([3], {**tried, (2,): math.inf}) == (0.5,), "2 has not ended; the better neighbour of 1 is 0"


def test_a_search_in_which_all_diverges_goes_to_lower_values() -> None:
    assert positions(3, 5, lambda position: math.inf) == [0, -1, 1, -2, -3]


def test_the_edge_is_where_nothing_was_tried_on_one_side() -> None:
    assert edge_axes({(0,): 1.0, (-1,): 2.0, (1,): 0.5}) == [0]
    assert edge_axes({(0,): 1.0, (-1,): 0.5, (1,): 2.0}) == [0]
    assert edge_axes({(0,): 0.5, (-1,): 2.0, (1,): 2.0}) == []
    assert best_position({(0,): 1.0, (-1,): 1.0}) == (-1,)
    assert edge_axes({(0, 0): 0.5, (-1, 0): 2.0, (1, 0): 2.0, (0, 1): 1.0}) == [1]


def test_two_rows_begin_as_a_lattice_from_the_contenders_own_values_outwards() -> None:
    crossed = [(-1, 0), (0, -1), (0, 1), (1, 0)]
    assert first_positions([3, 3]) == [(0, 0), *crossed, (-1, -1), (-1, 1), (1, -1), (1, 1)]
    assert len(set(first_positions([5, 3]))) == 15
    assert first_positions([3, 3, 3])[0] == (0, 0, 0)


def bowl(*best: float) -> Callable[[Position], float]:
    return lambda position: sum((at - aim) ** 2 for at, aim in zip(position, best, strict=True))


def test_two_rows_are_widened_on_the_axis_where_the_best_is_on_the_edge() -> None:
    widened = lattice_positions([3, 3], 14, bowl(2.1, 0.1))[9:]
    assert widened == [(2, 0), (3, 0), (2, 1), (2, -1), (2.5, 0)], "beyond the edge, beside the best, then between"
    assert lattice_positions([3, 3], 12, bowl(0.1, -2.9))[9:] == [(0, -2), (0, -3), (0, -4)]
    assert lattice_positions([3, 3], 12, bowl(1.9, 1.9))[9:] == [(2, 1), (3, 1), (2, 2)]


def test_two_rows_are_refined_on_both_axes() -> None:
    assert lattice_positions([3, 3], 13, bowl(0.1, 0.1))[9:] == [(0.5, 0), (0, 0.5), (-0.5, 0), (0, -0.5)]


@pytest.mark.parametrize("best", [(0.0, 0.0), (1.3, -0.8), (2.6, 2.2), (-3.4, 0.4)])
def test_a_grid_of_two_rows_comes_near_the_best(best: tuple[float, float]) -> None:
    loss = bowl(*best)
    assert min(map(loss, lattice_positions([3, 3], 24, loss))) < 0.15
