"""`trainer_state.json` of the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.analysis.comparison.logs.column_names import (
    Names,
    metric_columns,
    progress_columns,
    require_columns,
)
from pipelines.analysis.comparison.logs.log import Log, Place, Series, columns_of
from pipelines.errors import AsgoError
from pipelines.storage import parse_json

STATE = "trainer_state.json"


def newest_state(folder: Path) -> Path | None:
    """Return the newest state of an output folder or a checkpoint; None if there is none."""
    checkpoints = [path for path in folder.glob(f"checkpoint-*/{STATE}") if path.parent.name[11:].isdecimal()]
    saved = sorted(checkpoints, key=lambda path: int(path.parent.name[11:]))[-1:]
    own = [folder / STATE] if (folder / STATE).is_file() else []
    # `save_state` writes one into the output folder at the end of training, so a resumed run may have an old one.
    return max(own + saved, key=lambda path: path.stat().st_mtime, default=None)


def read_hugging_face(path: Path, given: Names) -> list[Log]:
    """Read the run of a state file."""
    try:
        state = parse_json(path.read_bytes())
        records = [dict(record) for record in state["log_history"] if "step" in record]
        records = [record for record in records if "train_runtime" not in record]  # a summary, with `train_loss`
        steps, reached = int(state.get("max_steps") or 0), int(state.get("global_step") or 0)
        names = list(dict.fromkeys(key for record in records for key in record))
        require_columns(path, names, {key: name for key, name in given.items() if "." in key})
        series: dict[Place, Series] = {}
        for place, name in metric_columns(names, given).items():
            series[place] = _series(records, name)
        for quantity, name in progress_columns(names, {}).items():
            series[None, quantity] = _series(records, name)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise AsgoError(f"{path}: not a state of Hugging Face's Trainer") from None
    return [Log("", "", None, columns_of(series), steps if steps > 0 else None, reached)]


def _series(records: list[dict[str, Any]], name: str) -> Series:
    found = [(float(record["step"]), record[name]) for record in records if name in record]
    values = [math.nan if value is None else float(value) for _, value in found]
    return np.array([step for step, _ in found], np.float64), np.array(values, np.float64)
