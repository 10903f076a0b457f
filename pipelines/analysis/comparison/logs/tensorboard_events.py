"""Event files of TensorBoard, read by the package `tensorboard`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.analysis.comparison.logs.column_names import (
    Names,
    listed,
    metric_columns,
    progress_columns,
    require_columns,
)
from pipelines.analysis.comparison.logs.log import Log, Place, Series, columns_of
from pipelines.errors import AsgoError
from pipelines.storage import printable

EVENTS = "events.out.tfevents."
_KEPT = {"scalars": 0, "tensors": 1, "images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1}
"""How many of each the reader keeps; 0 is all."""


def read_tensorboard(path: Path, given: Names) -> list[Log]:
    """Read the run of an event file, or of a folder of event files, in which a resumed run continues."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise AsgoError(f"{path}: event files need tensorboard: pip install 'asgo[tensorboard]'") from None
    try:
        events = EventAccumulator(str(path), size_guidance=_KEPT)
        events.Reload()
        tags = list(events.Tags()["scalars"])
        scalars = {tag: events.Scalars(tag) for tag in tags}
    except Exception as error:  # a damaged file raises errors of several libraries
        raise AsgoError(f"{path}: damaged event files: {printable(str(error))[:200]}") from None
    require_columns(path, tags, {key: name for key, name in given.items() if "." in key})
    columns = metric_columns(tags, given)
    if not columns:
        raise AsgoError(
            f"{path}: no tag such as train/loss or val/loss; name one: --columns val.loss=TAG; the tags are "
            f"{listed(tags) or 'none'}"
        )
    places = columns | {(None, quantity): name for quantity, name in progress_columns(tags, {}).items()}
    series: dict[Place, Series] = {}
    for place, tag in places.items():
        steps = np.array([event.step for event in scalars[tag]], np.float64)
        series[place] = steps, np.array([event.value for event in scalars[tag]], np.float64)
    return [Log("", "", None, columns_of(series))]
