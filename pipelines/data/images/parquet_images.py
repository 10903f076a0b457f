"""Read Parquet files of images as `datasets` writes them: bounded memory, names of columns and classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from pipelines.data.parquet_text import UnreadableColumn, rows_at_once
from pipelines.errors import AsgoError
from pipelines.storage import parse_json

IMAGES_AT_ONCE = 32
_READ_BYTES = 2 << 20


@contextlib.contextmanager
def opened_table(path: Path) -> Iterator[parquet.ParquetFile]:
    """Open a file; errors of reading it in this context become `AsgoError` with its name."""
    try:
        # Without pre_buffer, which would load the whole file into memory.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as table:
            yield table
    except UnreadableColumn as error:
        raise AsgoError(f"{path}: {error}") from None
    except (pyarrow.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AsgoError(f"{path}: damaged file ({reason}); remove it and download it again") from None
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror or ' '.join(str(error).split())}") from None


def batches(path: Path, table: parquet.ParquetFile, most: int, *columns: str) -> Iterator[pyarrow.RecordBatch]:
    """Yield at most `most` rows at a time. Checks page sizes first: a kilobyte can decompress to gigabytes."""
    with path.open("rb") as file:
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            rows = min(rows_at_once(file, group, column, most) for column in columns)
            yield from table.iter_batches(rows, row_groups=[number], columns=list(columns))


def features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """Return the features that `datasets` notes in a file, by column; empty without a note."""
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
        note: dict[str, Any] = parse_json((schema.metadata or {})[b"huggingface"])
        return {str(name): each for name, each in note["info"]["features"].items() if isinstance(each, dict)}
    return {}


def class_names(schema: pyarrow.Schema, column: str) -> list[str] | None:
    """Return the class names of a column of labels; None if the file does not have them."""
    names = features(schema).get(column, {}).get("names")
    return [str(name) for name in names] if isinstance(names, list) and names else None


def is_image_column(schema: pyarrow.Schema, column: str) -> bool:
    """Whether a column holds images: a struct of their bytes and their path."""
    kind: Any = schema.field(column).type if column in schema.names else pyarrow.null()
    fields = {field.name: field.type for field in kind} if pyarrow.types.is_struct(kind) else {}
    return bool(fields.get("bytes") == pyarrow.binary() and fields.get("path") == pyarrow.string())
