"""The validation loss that all are timed to, and when each came to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipelines.analysis.comparison.results import Entry, Reach, Run, Target

_REFERENCES = ("adamw", "adam")


def target_of(contenders: Sequence[Entry], asked: float | None) -> Target | None:
    """The loss asked for, else the final one of the reference: adamw, adam, or whoever ends highest."""
    if asked is not None:
        return Target(asked, "asked for")
    ended = [entry for entry in contenders if entry.final is not None]
    if len(contenders) < 2 or not ended:
        return None
    named = (entry for name in _REFERENCES for entry in ended if entry.optimizer == name)
    reference = next(named, ended[-1])
    assert reference.final is not None
    return Target(reference.final.mean, f"{reference.label}'s final loss")


def with_reach(entry: Entry, target: Target | None) -> Entry:
    """The entry with its runs timed to the target."""
    if target is None:
        return entry
    places = [_first_at_most(run, target.loss) for run in entry.runs]
    found = list(zip(entry.runs, places, strict=True))
    return replace(
        entry,
        reach=Reach(
            steps=tuple(None if at is None else int(run.val.steps[at]) for run, at in found),
            tokens=tuple(None if at is None else int(run.val.tokens[at]) for run, at in found),
            seconds=tuple(None if at is None else float(run.val.seconds[at]) for run, at in found),
        ),
    )


def _first_at_most(run: Run, loss: float) -> int | None:
    """The place of the first validation with such a loss."""
    places = np.flatnonzero(run.val.losses <= loss)
    return int(places[0]) if len(places) else None
