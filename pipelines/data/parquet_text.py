"""The text column of Parquet files, a few rows at a time; what a file claims of its sizes is checked before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow
import pyarrow.compute
from pyarrow import parquet

MAX_PAGE_BYTES = 256 << 20
"""A page is unpacked as a whole. Most writers end one at 1 MB, some only after 1,024 rows."""

_ROWS_AT_ONCE = 256
_BYTES_AT_ONCE = 256 << 20
_PART_BYTES = 32 << 20
_READ_BYTES = 2 << 20
_STRINGS = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
_PLAIN = 0
_DEEPEST_HEADER = 8


class UnreadableColumn(ValueError):
    """There is no such column, or it would take more memory than a file may."""


class Part(NamedTuple):
    """Some rows, (rows,): part `number` of a row group; `first` is the first one's number in the file."""

    group: int
    number: int
    first: int
    rows: pyarrow.Array


def read_column(
    file: BinaryIO, column: str, *, first_group: int = 0, only_strings: bool = False, look_ahead: bool = True
) -> Iterator[Part]:
    """Read a column of text: 256 rows and 32 MB at once at most, or one row.

    With `look_ahead` the pages of a row group are looked at before they are unpacked, so that reading takes less than
    a gigabyte; that reads the file at many places. Raises `UnreadableColumn`; with `only_strings` also for a column of
    other values than strings (and dictionaries of strings).
    """
    with parquet.ParquetFile(file, buffer_size=_READ_BYTES) as table:
        _require_column(table.schema_arrow, column, only_strings)
        first = sum(table.metadata.row_group(group).num_rows for group in range(first_group))
        for group in range(first_group, table.num_row_groups):
            rows = _ROWS_AT_ONCE
            if look_ahead:
                rows = rows_at_once(file, table.metadata.row_group(group), column, rows)
            batches = table.iter_batches(rows, row_groups=[group], columns=[column])
            for number, part in enumerate(part for batch in batches for part in _parts(batch.column(0))):
                yield Part(group, number, first, part)
                first += len(part)


def _require_column(schema: pyarrow.Schema, column: str, only_strings: bool) -> None:
    if column not in schema.names:
        raise UnreadableColumn(
            f'no column "{column}"; it has {", ".join(schema.names)}: name one of them by --text-column'
        )
    kind = schema.field(schema.names.index(column)).type  # of several of that name, the first counts
    if only_strings and (kind.value_type if pyarrow.types.is_dictionary(kind) else kind) not in _STRINGS:
        raise UnreadableColumn(f'no column "{column}" of strings; it has {", ".join(map(str, schema))}')


def _parts(rows: pyarrow.Array) -> Iterator[pyarrow.Array]:
    """Cut rows where they are too long to be handed on together."""
    if pyarrow.types.is_dictionary(rows.type):
        rows = rows.dictionary_decode()
    if rows.nbytes <= _PART_BYTES or rows.type not in _STRINGS:
        yield rows
        return
    first = size = 0
    for index, length in enumerate(pyarrow.compute.binary_length(rows).fill_null(0).to_pylist()):
        if index > first and size + length > _PART_BYTES:
            yield rows[first:index]
            first, size = index, 0
        size += length
    yield rows[first:]


def rows_at_once(file: BinaryIO, group: parquet.RowGroupMetaData, column: str, most: int) -> int:
    """How many rows may be read at once, `most` or fewer: those of whole pages have `_BYTES_AT_ONCE` bytes at most.

    The footer's totals do not tell: the pages are looked at, in the file itself. Raises `UnreadableColumn`, and
    `ValueError` for pages that are damaged.
    """
    columns = [group.column(index) for index in range(group.num_columns)]
    chunk = next((each for each in columns if each.path_in_schema == column), None)
    if chunk is None:
        return most
    start = min(offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset)
    longest = 1  # bytes of a row, in the mean of its page
    for page in _pages(file, start, start + chunk.total_compressed_size):
        if page.size > MAX_PAGE_BYTES:
            raise UnreadableColumn(
                f"a page of {page.size:,} bytes, and at most {MAX_PAGE_BYTES:,} are read; write it with smaller pages"
            )
        longest = max(longest, page.size // page.values)
    return max(1, min(most, _BYTES_AT_ONCE // longest))


class _Page(NamedTuple):
    """The unpacked size of a page, and how many values share it: 1 where each of them may repeat all of it."""

    size: int
    values: int


def _pages(file: BinaryIO, start: int, end: int) -> Iterator[_Page]:
    """The pages between two places of a file."""
    while start < end:
        file.seek(start)
        header = _Header(file).fields()
        size, packed = header.get(2), header.get(3)
        if not isinstance(size, int) or not isinstance(packed, int) or min(size, packed) < 0:
            raise ValueError("a page without a size")
        kind, place_of_encoding = (8, 4) if 8 in header else (5, 2)
        data = header.get(kind)
        values = data.get(1) if isinstance(data, dict) and data.get(place_of_encoding) == _PLAIN else 1
        yield _Page(size, max(1, values) if isinstance(values, int) else 1)
        start = file.tell() + packed


class _Header:
    """Reads a page's header, which is in Thrift's compact form, from where the file is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def fields(self, depth: int = 0) -> dict[int, object]:
        """The integers of a struct and the structs in it, by their numbers."""
        if depth > _DEEPEST_HEADER:
            raise ValueError("a page header nested too deeply")
        found: dict[int, object] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._integer()
            found[number] = self._value(kind & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> object:
        match kind:
            case 1 | 2:  # a boolean is its own kind
                return None
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                self._file.seek(8, 1)
            case 8:
                self._file.seek(self._unsigned(), 1)
            case 12:
                return self.fields(depth + 1)
            case _:  # a page header has no list and no map
                raise ValueError("a damaged page header")
        return None

    def _byte(self) -> int:
        byte = self._file.read(1)
        if not byte:
            raise ValueError("a page header beyond the end of the file")
        return byte[0]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a damaged page header")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
