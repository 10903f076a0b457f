"""Where a search by grid looks next: positions in a geometric row, 0 being a contender's own value."""

from __future__ import annotations

from collections.abc import Mapping


def first_positions(points: int) -> list[int]:
    """The row that every contender begins with, from its own value outwards."""
    half = points // 2
    return sorted(range(-half, half + 1), key=lambda position: (abs(position), position))


def next_position(points: int, losses: Mapping[float, float]) -> float:
    """The position to try after those that have been.

    First the row; then, while the best lies on an edge, one step beyond that edge; else the middle of the wider gap
    next to the best, and of two that are as wide the one towards the better neighbour. `losses` is infinite for a run
    that diverged, was pruned, or has not ended yet.
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
    """Where the loss is lowest; if all are infinite, the lowest position: a smaller step may help."""
    return min(losses, key=lambda position: (losses[position], position))


def on_edge(losses: Mapping[float, float]) -> bool:
    """Whether nothing was tried on one side of the best."""
    return best_position(losses) in (min(losses), max(losses))
