"""Documents out of files, one at a time: plain text, JSON lines, and Parquet."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pipelines.errors import AsgoError, UsageError

_FOLDER_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_ROWS_AT_ONCE = 256


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files that `inputs` name: a file is itself, a folder is its text files, sorted, hidden ones left out.

    Raises `UsageError` for a path that does not exist, a folder without a text file, and a file named twice
    (its text could be in the training and the validation part at once).
    """
    files = [file for path in inputs for file in _expand(path)]
    seen: set[Path] = set()
    for file in files:
        resolved = file.resolve()
        if resolved in seen:
            raise UsageError(f"{file}: the same file is named twice; name it once")
        seen.add(resolved)
    return files


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """Every document of `files`, in order; a blank one comes as "", so that a document's number is its place.

    `.jsonl` and `.jsonl.gz` hold one document a line and `.parquet` one a row, under the name "text"; any other
    file is one document. Raises `AsgoError` with file and line or row for what is not text.
    """
    for file in files:
        for text in _reader(file)(file):
            yield "" if text.isspace() else text


def decode_utf8(raw: bytes, where: str) -> str:
    """`raw` as text, without a byte order mark. Raises `AsgoError` with `where` and the first bad byte's offset."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise AsgoError(
            f"{where}: byte {error.start:,} (0x{raw[error.start]:02x}) is not valid UTF-8; "
            "convert the text to UTF-8 first, for example with iconv"
        ) from None


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if not path.is_dir():
        raise UsageError(f"{path}: neither a file nor a folder (text is read twice, so it cannot come from a pipe)")
    files = list(walk_files(path, _FOLDER_SUFFIXES))
    if not files:
        raise UsageError(f"{path}: no file in this folder ends in {', '.join(_FOLDER_SUFFIXES)}; name files one by one")
    return files


def walk_files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The files below `folder` that end so, sorted by folder and name, hidden ones left out."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if name.lower().endswith(suffixes) and not name.startswith(".") and path.is_file():
                yield path


def _reader(file: Path) -> Callable[[Path], Iterator[str]]:
    name = file.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _read_json_lines
    if name.endswith(".parquet"):
        return _read_parquet
    return _read_text


def _read_text(file: Path) -> Iterator[str]:
    yield decode_utf8(file.read_bytes(), str(file))


def _read_json_lines(file: Path) -> Iterator[str]:
    # Lines are cut as bytes: in text, U+2028 and its like would end a line too.
    for number, line in enumerate(_lines(file), start=1):
        where = f"{file}, line {number}"
        text = decode_utf8(line, where)
        if text.strip():
            yield _text_of_row(_parse(text, where), where)


def _lines(file: Path) -> Iterator[bytes]:
    if not file.name.lower().endswith(".gz"):
        with file.open("rb") as plain:
            yield from plain
        return
    try:
        with gzip.open(file, "rb") as unpacked:
            yield from unpacked
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise AsgoError(f"{file}: damaged gzip file ({error})") from None


def _parse(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AsgoError(f"{where}: not valid JSON ({error})") from None


def _text_of_row(row: object, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise AsgoError(f'{where}: no string named "text" in this row')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise AsgoError(
            f"{where}: lone surrogate U+{code:04X} at character {error.start:,} of the text is not valid Unicode"
        ) from None
    return text


def _read_parquet(file: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with file.open("rb") as opened, parquet.ParquetFile(opened) as table:
            if "text" not in table.schema_arrow.names:
                raise AsgoError(f'{file}: no column "text"; it has {", ".join(table.schema_arrow.names)}')
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=["text"]):
                for value in batch.column(0):
                    number += 1
                    yield _text_of_row({"text": value.as_py()}, f"{file}, row {number}")
    except UnicodeDecodeError as error:
        raise AsgoError(f"{file}, row {number}: byte {error.start:,} of the text is not valid UTF-8") from None
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise AsgoError(f"{file}: damaged Parquet file ({' '.join(str(error).split())})") from None
