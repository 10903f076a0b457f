"""Adaptive grid search: positions in a geometric row; position 0 is a contender's own value."""

from __future__ import annotations

from collections.abc import Mapping


def first_positions(points: int) -> list[int]:
    """Return the initial positions, from 0 outwards."""
    half = points // 2
    return sorted(range(-half, half + 1), key=lambda position: (abs(position), position))


def next_position(points: int, costs: Mapping[float, float]) -> float:
    """Return the next position to try.

    First the initial positions. Then, while the best is on an edge, one step beyond that edge; else the middle of the
    wider gap next to the best. If both gaps are equal, the one towards the better neighbour. `costs` are losses or
    negative accuracies: infinite for a run that diverged, was pruned, or has not ended yet.
    """
    for position in first_positions(points):
        if position not in costs:
            return position
    best, tried = best_position(costs), sorted(costs)
    if best == tried[0]:
        return best - 1
    if best == tried[-1]:
        return best + 1
    below, above = tried[tried.index(best) - 1], tried[tried.index(best) + 1]
    towards = max((best - below, -costs[below], below), (above - best, -costs[above], above))[-1]
    return (best + towards) / 2


def best_position(costs: Mapping[float, float]) -> float:
    """Return the position with the lowest cost; the lowest position if all are infinite: a smaller value may help."""
    return min(costs, key=lambda position: (costs[position], position))


def on_edge(costs: Mapping[float, float]) -> bool:
    """Whether the best position is the lowest or the highest one."""
    return best_position(costs) in (min(costs), max(costs))
