"""Which column of a log holds what: by its usual names, or by `--columns`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from pipelines.analysis.comparison.logs.log import PROGRESS, Place
from pipelines.errors import UsageError
from pipelines.storage import printable
from pipelines.tasks.metric import METRICS
from pipelines.training.metrics import SPLITS, Split

Names = Mapping[str, str]
"""Names of columns, or TensorBoard tags, by the keys of `KEYS`."""

OF_THE_RUN = ("run", "optimizer", "seed")
KEYS = (
    "step", "split", *METRICS, *(f"{split}.{name}" for split in SPLITS for name in METRICS), *PROGRESS, *OF_THE_RUN,
)  # fmt: skip
"""What `--columns` can name."""

SPLIT_WORDS: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev", "test"),
}
"""Names of a split, the best first: `test` validates only where nothing else does."""
_METRIC_WORDS = {"loss": ("loss",), "accuracy": ("accuracy", "acc"), "bpb": ("bpb",)}
_STEPS = ("step", "global step", "train global step", "trainer global step", "iter", "iteration", "iterations")
_PROGRESS_WORDS = {"tokens": ("num tokens", "num input tokens seen")}
_EXTRA = ("step", "epoch", "mean", "avg")  # train_loss_step, as Lightning names it
_SHOWN = 30


def parse_columns(text: str | None) -> dict[str, str]:
    """Parse `KEY=NAME,...`. Raises `UsageError` for an unknown key or a part that is not KEY=NAME."""
    names = {}
    for part in (text or "").split(",") if text else []:
        key, equals, name = (piece.strip() for piece in part.partition("="))
        if key not in KEYS or not equals or not name:
            close = get_close_matches(key, KEYS, 1)
            hint = f"did you mean {close[0]}?" if close and key not in KEYS else f"the keys are {', '.join(KEYS)}"
            raise UsageError(f"--columns {part.strip()}: give KEY=NAME, such as step=iteration,val.loss=nll; {hint}")
        names[key] = name
    return names


def listed(names: Sequence[str]) -> str:
    """Return the names as text, the first of many."""
    return ", ".join(printable(name[:80]) for name in names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)


def require_columns(path: Path, names: Sequence[str], given: Names) -> None:
    """Raise `UsageError` with the names that exist, if `--columns` names one that does not."""
    for key, name in given.items():
        if name not in names:
            raise UsageError(f"--columns {key}={name}: {path} has no such column; it has {listed(names)}")


def step_column(names: Sequence[str], given: Names) -> str | None:
    """Return the column of steps; None if there is none. W&B's `_step`, which counts records, comes last."""
    found = [name for name in names if _words(name) in _STEPS]
    return given.get("step") or min(
        found, key=lambda name: (name.startswith("_"), _STEPS.index(_words(name))), default=None
    )


def progress_columns(names: Sequence[str], given: Names) -> dict[str, str]:
    """Return the columns of `PROGRESS` that exist, by quantity."""
    found = {}
    for key in PROGRESS:
        words = key.replace("_", " ")
        name = given.get(key) or _first(names, [words, f"train {words}", *_PROGRESS_WORDS.get(key, ())])
        if name is not None:
            found[key] = name
    return found


def metric_columns(names: Sequence[str], given: Names) -> dict[Place, str]:
    """Return the columns of a wide log, such as `train/loss` and `val_loss`, by split and metric.

    `loss` alone is a training loss, as Hugging Face and Keras write it.
    """
    found: dict[Place, str] = {}
    for split in SPLITS:
        for metric in METRICS:
            name = given.get(f"{split}.{metric}") or _first(names, _usual(split, metric))
            if name is not None:
                found[split, metric] = name
    return found


def _usual(split: Split, metric: str) -> list[str]:
    """Return the usual names of a metric of a split as words, the best first."""
    pairs = [(word, name) for word in SPLIT_WORDS[split] for name in _METRIC_WORDS[metric]]
    usual = [text for word, name in pairs for text in (f"{word} {name}", f"{name} {word}")]
    usual += [f"{text} {extra}" for extra in _EXTRA for text in usual]
    return usual + (list(_METRIC_WORDS[metric]) if split == "train" else [])


def _first(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """Return the name whose words come first in `usual`."""
    found = [name for name in names if _words(name) in usual]
    return min(found, key=lambda name: usual.index(_words(name)), default=None)


def _words(name: str) -> str:
    return " ".join(re.findall(r"[^/_.\-\s]+", name[:200].lower()))
