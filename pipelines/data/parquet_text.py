"""Read the text column of Parquet files, a few rows at a time. Checks the sizes that a file declares first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow
import pyarrow.compute
from pyarrow import parquet

MAX_PAGE_BYTES = 256 << 20
"""Pages are decompressed as a whole. Most writers end a page at 1 MB, some only after 1,024 rows."""

_ROWS_AT_ONCE = 256
_BYTES_AT_ONCE = 256 << 20
_PART_BYTES = 32 << 20
_READ_BYTES = 2 << 20
_STRINGS = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
_PLAIN = 0
_DEEPEST_HEADER = 8


class UnreadableColumn(ValueError):
    """The column does not exist, or would take too much memory."""


class Part(NamedTuple):
    """Part `number` of row group `group`: `rows`, shape (rows,). `first` is the index in the file of its first row."""

    group: int
    number: int
    first: int
    rows: pyarrow.Array


def read_column(
    file: BinaryIO, column: str, *, first_group: int = 0, only_strings: bool = False, look_ahead: bool = True
) -> Iterator[Part]:
    """Yield a text column in parts of at most 256 rows and 32 MB, or of one row.

    With `look_ahead`, reads the page headers of a row group before it decompresses the pages: reading then takes less
    than 1 GB of memory, but needs random access. Raises `UnreadableColumn`; with `only_strings` also for a column of
    values other than strings (or dictionaries of strings).
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
        raise UnreadableColumn(f'no column "{column}"; it has {", ".join(schema.names)}: choose one with --text-column')
    kind = schema.field(schema.names.index(column)).type  # the first, if several have this name
    if only_strings and (kind.value_type if pyarrow.types.is_dictionary(kind) else kind) not in _STRINGS:
        raise UnreadableColumn(f'no column "{column}" of strings; it has {", ".join(map(str, schema))}')


def _parts(rows: pyarrow.Array) -> Iterator[pyarrow.Array]:
    """Split rows into parts of at most `_PART_BYTES`, or of one row."""
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
    """Return how many rows to read at once, at most `most`, so they take about `_BYTES_AT_ONCE` bytes at most.

    Reads the page headers, because the footer has only totals. Raises `UnreadableColumn`, and `ValueError` for damaged
    pages.
    """
    columns = [group.column(index) for index in range(group.num_columns)]
    chunk = next((each for each in columns if each.path_in_schema == column), None)
    if chunk is None:
        return most
    start = min(offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset)
    longest = 1  # bytes of a row, as the mean of its page
    for page in _pages(file, start, start + chunk.total_compressed_size):
        if page.size > MAX_PAGE_BYTES:
            raise UnreadableColumn(
                f"a page has {page.size:,} bytes, more than {MAX_PAGE_BYTES:,}; write the file with smaller pages"
            )
        longest = max(longest, page.size // page.values)
    return max(1, min(most, _BYTES_AT_ONCE // longest))


class _Page(NamedTuple):
    """Uncompressed size of a page, and its number of values; 1 if one value may take the whole size (dictionaries)."""

    size: int
    values: int


def _pages(file: BinaryIO, start: int, end: int) -> Iterator[_Page]:
    """Yield the pages between two byte offsets of a file."""
    while start < end:
        file.seek(start)
        header = _Header(file).fields()
        # Fields of PageHeader: 2 and 3 are the sizes, 5 is DataPageHeader, 8 DataPageHeaderV2.
        size, packed = header.get(2), header.get(3)
        if not isinstance(size, int) or not isinstance(packed, int) or min(size, packed) < 0:
            raise ValueError("a page without a size")
        kind, place_of_encoding = (8, 4) if 8 in header else (5, 2)
        data = header.get(kind)
        values = data.get(1) if isinstance(data, dict) and data.get(place_of_encoding) == _PLAIN else 1
        yield _Page(size, max(1, values) if isinstance(values, int) else 1)
        start = file.tell() + packed


class _Header:
    """Reader of a page header in Thrift's compact protocol, at the file's current position."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def fields(self, depth: int = 0) -> dict[int, object]:
        """Return the integers and structs of a struct, by field number."""
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
            case 1 | 2:  # a boolean's value is in its type
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
