"""Where a search by grid goes, against sequences worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from pipelines.sweeps.grid import best_position, first_positions, next_position, on_edge


def positions(points: int, trials: int, loss: Callable[[float], float]) -> list[float]:
    """Where the trials of a search go whose losses are known."""
    losses: dict[float, float] = {}
    for _ in range(trials):
        position = next_position(points, losses)
        assert position not in losses
        losses[position] = loss(position)
    return list(losses)


def test_the_first_points_go_outwards_from_the_contenders_own_value() -> None:
    assert first_positions(5) == [0, -1, 1, -2, 2]
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
    assert next_position(3, {0: 2.0, -1: math.inf}) == 1
    tried = {0: 2.0, -1: 3.0, 1: 1.0}
    assert next_position(3, tried) == 2
    assert next_position(3, {**tried, 2: math.inf}) == 0.5, "2 has not ended; the better neighbour of 1 is 0"


def test_a_search_in_which_all_diverges_goes_to_lower_values() -> None:
    assert positions(3, 5, lambda position: math.inf) == [0, -1, 1, -2, -3]


def test_the_edge_is_where_nothing_was_tried_on_one_side() -> None:
    assert on_edge({0: 1.0, -1: 2.0, 1: 0.5})
    assert on_edge({0: 1.0, -1: 0.5, 1: 2.0})
    assert not on_edge({0: 0.5, -1: 2.0, 1: 2.0})
    assert best_position({0: 1.0, -1: 1.0}) == -1
