"""Draw a branch from where it parts from its parent: before, it is the same curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.analysis.comparison.results import Curve, Run


def drawn_from_their_parents(runs: Sequence[Run]) -> list[Run]:
    """Return the runs; a branch of another of them is drawn from the step where it parts."""
    return [replace(run, drawn_from=_parting(run, runs)) for run in runs]


def _parting(run: Run, runs: Sequence[Run]) -> int:
    """Return the last step that the run shares with another run from which it descends; 0 if there is none."""
    steps = [
        ancestor.step
        for generation, ancestor in enumerate(run.lineage)
        for other in runs
        # By name, not by path: both may have been copied to another machine. The losses exclude another run.
        if other.path.resolve().name == Path(ancestor.run).name
        and other.lineage == run.lineage[:generation]
        and _are_equal_until(ancestor.step, run.val, other.val)
    ]
    return max(steps, default=0)


def _are_equal_until(step: int, one: Curve, other: Curve) -> bool:
    (mine, losses), (its, others) = ((c.steps[c.steps < step], c.values[c.steps < step]) for c in (one, other))
    return np.array_equal(mine, its) and np.array_equal(losses, others)
