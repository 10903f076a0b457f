"""Adaptive grid search: positions in a lattice of geometric rows, one axis per setting.

A position has a coordinate per axis, in steps of its row; the origin is a contender's own values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

Position = tuple[float, ...]
_UNTRIED = 2.0
"""Width of the gap on a side where no position was tried: wider than others, so the grid grows before it refines."""


def first_positions(points: Sequence[int]) -> list[Position]:
    """Return the initial positions, from the origin outwards; `points` are the numbers of points of the rows."""
    lattice = itertools.product(*(range(-(each // 2), each // 2 + 1) for each in points))
    return sorted(lattice, key=lambda position: (max(map(abs, position)), sum(map(abs, position)), position))


def next_position(points: Sequence[int], costs: Mapping[Position, float]) -> Position:
    """Return the next position to try.

    First the initial positions. Then the middle of the widest gap on either side of the best, along one axis. A side
    where no position was tried counts as a gap of two steps, so the next position is one step beyond. Of equal gaps,
    one at the edge of all tried positions comes first, then the one towards the better neighbour, then the first axis.
    `costs` are losses or negative accuracies: infinite for a run that diverged, was pruned, or has not ended yet.
    """
    for position in first_positions(points):
        if position not in costs:
            return position
    best, gaps = best_position(costs), []
    for axis, at in enumerate(best):
        line = {each[axis]: cost for each, cost in costs.items() if _differs_only_in(axis, each, best)}
        for side in (-1, 1):
            beyond = [value for value in line if side * value > side * at]
            nearest = min(beyond, key=lambda value: abs(value - at)) if beyond else at + side * _UNTRIED
            cost = line[nearest] if beyond else 0.0
            middle = (*best[:axis], (at + nearest) / 2, *best[axis + 1 :])
            gaps.append((abs(nearest - at), axis in _edges(costs, best, side), -cost, -axis, middle))
    return max(gaps)[-1]


def best_position(costs: Mapping[Position, float]) -> Position:
    """Return the position with the lowest cost; the lowest position if all are infinite: smaller values may help."""
    return min(costs, key=lambda position: (costs[position], position))


def edge_axes(costs: Mapping[Position, float]) -> list[int]:
    """Return the axes on which the best position is the lowest or the highest of all."""
    best = best_position(costs)
    return sorted(_edges(costs, best, -1) | _edges(costs, best, 1))


def _edges(costs: Mapping[Position, float], best: Position, side: int) -> set[int]:
    """Return the axes on which no position lies beyond the best on one side, -1 or 1."""
    return {axis for axis, at in enumerate(best) if not any(side * each[axis] > side * at for each in costs)}


def _differs_only_in(axis: int, position: Position, other: Position) -> bool:
    return all(a == b for number, (a, b) in enumerate(zip(position, other, strict=True)) if number != axis)
