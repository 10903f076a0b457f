"""Adaptive grid search: positions in a geometric row; position 0 is a contender's own value."""

from __future__ import annotations

from collections.abc import Mapping


def first_positions(points: int) -> list[int]:
    """Return the initial positions, from 0 outwards."""
    half = points // 2
    return sorted(range(-half, half + 1), key=lambda position: (abs(position), position))


def next_position(points: int, losses: Mapping[float, float]) -> float:
    """Return the next position to try.

    First the initial positions. Then, while the best is on an edge, one step beyond that edge; else the middle of the
    wider gap next to the best. If both gaps are equal, the one towards the better neighbour. `losses` is infinite for
    a run that diverged, was pruned, or has not ended yet.
    """
    for position in first_positions(points):
        if position not in losses:
            return position
    best, tried = best_position(losses), sorted(losses)
    if best == tried[0]:
        return best - 1
    if best == tried[-1]:
        return best + 1
    below, above = tried[tried.index(best) - 1], tried[tried.index(best) + 1]
    towards = max((best - below, -losses[below], below), (above - best, -losses[above], above))[-1]
    return (best + towards) / 2


def best_position(losses: Mapping[float, float]) -> float:
    """Return the position with the lowest loss; the lowest position if all are infinite: a smaller value may help."""
    return min(losses, key=lambda position: (losses[position], position))


def on_edge(losses: Mapping[float, float]) -> bool:
    """Whether the best position is the lowest or the highest one."""
    return best_position(losses) in (min(losses), max(losses))
