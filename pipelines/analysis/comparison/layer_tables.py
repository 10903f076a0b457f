"""Tables of what a run measured in its layers: the values behind the figures of layers and of shadow optimizers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.analysis.comparison.tables import Record, Table
from pipelines.analysis.shadow_figures import later_half, norm_ratio, shadow_names
from pipelines.training.shadow_file import RUN, Direction, ShadowRecords, shadow_file
from pipelines.training.statistics_file import Statistics, statistics_file


def measured_tables(run: Path) -> list[Table]:
    """Return the tables of a run's layer statistics and of its shadow optimizers, of those that it recorded.

    Raises `AsgoError` for an unreadable file.
    """
    layers, shadows = statistics_file(run).read(), shadow_file(run).read()
    made = [layer_table(layers)] if layers is not None and layers.records else []
    return made + ([shadow_table(shadows)] if shadows is not None and shadows.records else [])


def layer_table(layers: Statistics) -> Table:
    """Return every record of every parameter, without texts. A column is a path of keys in the file."""
    rows = (
        {"step": record["step"], "layer": name, **_flat(layer)}
        for record in layers.records
        for name, layer in record["layers"].items()
    )
    return Table("layer-statistics", (), (), _aligned(rows))


def shadow_table(shadows: ShadowRecords) -> Table:
    """Return every record of every step; the texts are medians over the later half of the records.

    A row without a layer is about all parameters. Only the last record has singular values, as in the figure.
    """
    heads = ("step of", "cosine", "length", "same batch", "next batch", "next batch, own length")
    own = str(shadows.header["optimizer"])
    texts = [_medians(own if name == RUN else name, name, shadows) for name in [RUN, *shadow_names(shadows)]]
    return Table("shadow-steps", heads, tuple(texts), _aligned(_shadow_rows(shadows)))


def _shadow_rows(shadows: ShadowRecords) -> Iterator[dict[str, Any]]:
    last = shadows.records[-1]
    for record in shadows.records:
        for name, direction in record["directions"].items():
            whole = {key: value for key, value in direction.items() if key != "layers"}
            yield {"step": record["step"], "direction": name, "layer": None, **_flat(whole)}
            for layer, update in direction["layers"].items():
                shown = {key: value for key, value in update.items() if record is last or key != "singular_values"}
                yield {"step": record["step"], "direction": name, "layer": layer, **_flat(shown)}


def _medians(label: str, name: str, shadows: ShadowRecords) -> tuple[str, ...]:
    found = [record["directions"] for record in later_half(shadows) if name in record["directions"]]
    place = shadows.header["lengths"].index(1.0)

    def median(values: Iterable[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        return f"{statistics.median(known):{form}}" if known else ""

    mine: Sequence[Direction] = [directions[name] for directions in found]
    return (
        label,
        median((each["cosine"] for each in mine), ".2f"),
        median((norm_ratio(directions[name], directions[RUN]) for directions in found), ".2f"),
        median((each["same_batch"]["at_lengths"][place] for each in mine), "+.5f"),
        median((each["held_out"]["at_lengths"][place] for each in mine), "+.5f"),
        median((each["held_out"]["own"] for each in mine), "+.5f"),
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> Record:
    """Return the values of nested dictionaries and lists, by their keys joined with points."""
    flat: Record = {}
    for key, inner in value.items():
        if isinstance(inner, list):
            inner = {str(place): each for place, each in enumerate(inner)}
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return flat


def _aligned(rows: Iterable[Record]) -> tuple[Record, ...]:
    """Return the rows with the columns of all of them, None where a row has no value."""
    listed = list(rows)
    columns: Record = dict.fromkeys(key for row in listed for key in row)
    return tuple(columns | row for row in listed)
