"""CSV files: long (a row a split, as `asgo export-metrics` writes), wide (a column a split), and the exports of W&B."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipelines.analysis.comparison.logs.column_names import (
    OF_THE_RUN,
    SPLIT_WORDS,
    Names,
    listed,
    metric_columns,
    progress_columns,
    require_columns,
    step_column,
)
from pipelines.analysis.comparison.logs.log import Log, Place, Series, columns_of
from pipelines.analysis.comparison.logs.run_names import split_name
from pipelines.errors import AsgoError
from pipelines.storage import printable
from pipelines.tasks.metric import METRICS
from pipelines.training.metrics import SPLITS

_BLOCK = 1 << 22  # a longer row is an error
_ENDS = ("__MIN", "__MAX")  # of the chart exports of W&B: the lowest and highest of a group or a bin
_OF = " - "  # the columns of a chart export are named RUN - METRIC
_SPLIT = "split"
_MOST_RUNS = 10_000

Places = dict[Place, str]
"""Names of columns by what they hold."""


@dataclass(frozen=True)
class _Table:
    """The rows that have a step: arrays of equal length, null for empty cells."""

    step: pa.Array
    values: Mapping[Place, pa.Array]
    texts: Mapping[str, pa.Array]

    def rows(self, indices: npt.NDArray[np.intp]) -> _Table:
        """Return the rows with these indices."""
        kept = pa.array(indices)
        values = {place: column.take(kept) for place, column in self.values.items()}
        return _Table(self.step.take(kept), values, {key: column.take(kept) for key, column in self.texts.items()})

    def series(self, place: Place, rows: pa.Array | None = None) -> Series:
        """Return the cells of a column that are not empty, of all rows or of those that are true in `rows`."""
        recorded = self.values[place].is_valid()
        if rows is not None:
            recorded = pc.and_(recorded, rows)
        return _floats(self.step.filter(recorded)), _floats(self.values[place].filter(recorded))


def is_csv(content: bytes) -> bool:
    """Return whether the first line names a column of steps."""
    return step_column(header(content)[0], {}) is not None


def is_table_of_runs(content: bytes) -> bool:
    """Return whether it is the table `runs.csv` of a report: a row is a run, not a step."""
    return {"run", "entry", "seed", "state"} <= {name.strip() for name in header(content)[0]}


def read_csv(path: Path, content: bytes, given: Names) -> list[Log]:
    """Return the runs of a CSV file; none if it has no column of steps.

    Raises:
        UsageError: `--columns` names a column that does not exist.
        AsgoError: a row has another number of cells, or a cell is not a number.
    """
    names, delimiter = header(content)
    given = {key: next((each for each in names if each.strip() == name), name) for key, name in given.items()}
    step = step_column(names, given)
    if step is None:
        return []
    require_columns(path, names, given)
    charts = {} if given.keys() - {"step"} else _charts(names)
    if charts:
        all_places: Places = {(None, name): name for places in charts.values() for name in places.values()}
        table = _read(path, content, delimiter, step, all_places, {})
        return [Log(run, *split_name(run), columns_of(_wide(_of_chart(table, charts[run])))) for run in charts]
    texts = {key: name for key in (_SPLIT, *OF_THE_RUN) if (name := given.get(key) or _exactly(key, names))}
    if any("." in key for key in given):
        texts.pop(_SPLIT, None)
    places = _long_places(names, given) if _SPLIT in texts else _wide_places(names, given)
    if not places:
        raise AsgoError(
            f"{path}: no column of losses; name it: --columns val.loss=NAME,train.loss=NAME; it has {listed(names)}"
        )
    places |= {(None, key): name for key, name in progress_columns(names, given).items()}
    table = _read(path, content, delimiter, step, places, texts)
    return [
        Log(*named, columns_of(_long(path, part) if _SPLIT in texts else _wide(part)))
        for named, part in _runs(path, table)
    ]


def header(content: bytes) -> tuple[list[str], str]:
    """Return the names in the first line, and the delimiter."""
    first = content[:_BLOCK].removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n").partition(b"\n")[0]
    line = first.decode("utf-8", "replace").strip("\r")
    delimiter = max(",;\t", key=line.count)
    try:
        return next(csv.reader([line], delimiter=delimiter), []), delimiter
    except csv.Error:
        return [], delimiter


def _exactly(word: str, names: Sequence[str]) -> str | None:
    return next((name for name in names if name.strip().lower() == word), None)


def _long_places(names: Sequence[str], given: Names) -> Places:
    found = {metric: given.get(metric) or _exactly(metric, names) for metric in METRICS}
    return {(None, metric): name for metric, name in found.items() if name is not None}


def _wide_places(names: Sequence[str], given: Names) -> Places:
    """Return the columns of metrics; one that is given without a split is of training."""
    plain = {f"train.{metric}": given[metric] for metric in METRICS if metric in given}
    return metric_columns(names, {**plain, **given})


def _charts(names: Sequence[str]) -> dict[str, Places]:
    """Return the columns of each run of a chart export of W&B; empty if the file is not one."""
    charts: dict[str, Places] = {}
    for name in names:
        run, separator, metric = name.rpartition(_OF)
        if separator and not name.endswith(_ENDS):
            for place in metric_columns([metric], {}):
                charts.setdefault(run, {})[place] = name
    return charts


def _of_chart(table: _Table, places: Places) -> _Table:
    """Return the columns of one run of a chart export."""
    return _Table(table.step, {place: table.values[None, name] for place, name in places.items()}, {})


def _read(path: Path, content: bytes, delimiter: str, step: str, places: Places, texts: Mapping[str, str]) -> _Table:
    """Read the given columns. Raises `AsgoError` for another number of cells, or a cell that is not a number."""
    types = {name: pa.float64() for name in (step, *places.values())} | {name: pa.string() for name in texts.values()}
    try:
        table = _parse(content, delimiter, types, ".")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        table = _with_decimal_commas(content, types) if delimiter == ";" else None
        if table is None:
            raise AsgoError(f"{path}: {_reason(error)}") from None
    table = table.filter(pc.is_valid(table[step])).combine_chunks()
    return _Table(
        step=_whole(table[step]),
        values={place: _whole(table[name]) for place, name in places.items()},
        texts={key: pc.utf8_trim_whitespace(_whole(table[name])) for key, name in texts.items()},
    )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _with_decimal_commas(content: bytes, types: Mapping[str, pa.DataType]) -> pa.Table | None:
    """Parse what a spreadsheet writes where 3,28 is a number; None if that is no CSV either."""
    try:
        return _parse(content, ";", types, ",")
    except (pa.ArrowException, UnicodeDecodeError):
        return None


def _reason(error: Exception) -> str:
    text = printable(str(error))
    return "a line is too long for a CSV" if text.startswith("straddling") else text[:200]


def _parse(content: bytes, delimiter: str, types: Mapping[str, pa.DataType], decimal_point: str) -> pa.Table:
    def skip_torn(row: pyarrow.csv.InvalidRow) -> str:
        # A kill leaves an incomplete last line.
        return "skip" if content.endswith(row.text.encode()) and row.actual_columns < row.expected_columns else "error"

    return pyarrow.csv.read_csv(
        pa.BufferReader(content),
        pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK),  # whole files are read in parallel instead
        pyarrow.csv.ParseOptions(delimiter=delimiter, invalid_row_handler=skip_torn),
        pyarrow.csv.ConvertOptions(
            column_types=types, include_columns=list(types), null_values=[""], decimal_point=decimal_point
        ),
    )


def _wide(table: _Table) -> dict[Place, Series]:
    """Return the series of a table with a column a split. NaN is an empty cell where another metric has a number."""
    metrics = [table.values[place] for place in table.values if place[1] in METRICS]
    finite = reduce(pc.or_, (pc.fill_null(pc.is_finite(column), False) for column in metrics))
    series = {}
    for place, column in table.values.items():
        is_empty = pc.and_(pc.fill_null(pc.is_nan(column), False), finite)
        series[place] = table.series(place, pc.invert(is_empty))
    return series


def _long(path: Path, table: _Table) -> dict[Place, Series]:
    """Return the series of a table with a row a split. Raises `AsgoError` if no split is known."""
    names = pc.utf8_lower(table.texts[_SPLIT])
    series: dict[Place, Series] = {}
    for split in SPLITS:
        rows = _rows_of(names, SPLIT_WORDS[split])
        for place in table.values:
            found = table.series(place, rows)
            if place[1] in METRICS and len(found[0]):
                series[split, place[1]] = found
    if not series and len(names):
        shown = ", ".join(printable(str(name)) for name in pc.unique(names).to_pylist()[:5])
        raise AsgoError(f"{path}: no train or val in the column of splits: {shown}")
    return series | {place: table.series(place) for place in table.values if place[1] not in METRICS}


def _rows_of(names: pa.Array, words: Sequence[str]) -> pa.Array:
    """Return which rows are of a split: those with the last of its words only if there are no others."""
    *usual, last = words
    rows = pc.is_in(names, pa.array(usual))
    return rows if pc.any(rows).as_py() else pc.is_in(names, pa.array([last]))


def _floats(values: pa.Array) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = values.to_numpy(zero_copy_only=False)
    return found


def _runs(path: Path, table: _Table) -> Iterator[tuple[tuple[str, str, int | None], _Table]]:
    """Split the rows into runs; yield the run's name, contender and seed, and its rows.

    Raises `AsgoError` if there are too many: they are columns of something else.
    """
    keys = [key for key in OF_THE_RUN if key in table.texts]
    if not keys:
        yield ("", "", None), table
        return
    codes = np.zeros(len(table.step), np.int64)
    for key in keys:
        encoded = table.texts[key].fill_null("").dictionary_encode()
        codes = codes * len(encoded.dictionary) + encoded.indices.to_numpy()
        if len(encoded.dictionary) > _MOST_RUNS:
            raise AsgoError(f"{path}: more than {_MOST_RUNS:,} values in the column of the {key}; name another column")
    order = np.argsort(codes, kind="stable")
    begins = np.flatnonzero(np.diff(codes[order])) + 1
    for rows in np.split(order, begins) if len(order) else []:
        part = table.rows(rows)
        yield _named({key: part.texts[key][0].as_py() or "" for key in keys}), part


def _named(texts: Mapping[str, str]) -> tuple[str, str, int | None]:
    """Return the name of a run, its contender and its seed, from the columns of `OF_THE_RUN`.

    The optimizer is the contender if there is a seed too, or if the run's name says nothing.
    """
    run, optimizer, seed_text = (texts.get(key, "") for key in OF_THE_RUN)
    contender, seed = split_name(run)
    if seed_text:
        digits = seed_text.strip().removesuffix(".0")
        seed = int(digits) if digits.isdecimal() and len(digits) < 19 else None
    if optimizer and (seed_text or not contender):
        contender = optimizer
    elif optimizer not in contender:
        contender = f"{optimizer} {contender}"
    return run or "-".join(filter(None, (optimizer, seed_text and f"s{seed_text}"))), contender, seed
