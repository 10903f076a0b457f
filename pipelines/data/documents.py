"""Read documents from plain text, JSON lines and Parquet files, one at a time."""

from __future__ import annotations

import codecs
import errno
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pipelines.data.unpacking import (
    MAX_ROW_BYTES,
    PACKED_SUFFIXES,
    bounded_lines,
    naming_damage,
    too_long,
    unpacked,
    without_packing,
)
from pipelines.errors import AsgoError, UsageError
from pipelines.storage import parse_json

Document = str | Iterator[str]
"""A document's text, or the pieces of a long one. Consume the pieces before you request the next document."""

PIECE_BYTES = 1 << 20
LONGEST_WORD = 1 << 22
"""Maximum number of characters without a place to cut. Encoding takes about 100 times their memory."""

_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PLAIN_SUFFIXES = (".txt", *_LINE_SUFFIXES)
_FOLDER_SUFFIXES = (
    *_PLAIN_SUFFIXES,
    *(plain + packed for plain in _PLAIN_SUFFIXES for packed in PACKED_SUFFIXES),
    ".parquet",
)


def find_files(inputs: Sequence[Path], column: str = "text", left_out: Counter[str] | None = None) -> list[Path]:
    """Return the files that `inputs` name. A folder stands for its text files, sorted; links are followed.

    `left_out` counts the skipped files of folders by kind: hidden files, other files, and `.json` files that are not
    JSON lines with the text under `column`.

    Raises `UsageError` for a path that does not exist, a dangling link, a folder without a text file, and a file named
    twice (its text could be in both training and validation data).
    """
    left_out = Counter() if left_out is None else left_out
    files = [file for path in inputs for file in _expand(path, column, left_out)]
    seen: set[Path] = set()
    for file in files:
        resolved = file.resolve()
        if resolved in seen:
            raise UsageError(f"{file}: the same file is named twice; name it once")
        seen.add(resolved)
    return files


def read_documents(
    files: Iterable[Path], column: str = "text", last_cut: Callable[[str], int] = len
) -> Iterator[Document]:
    """Yield every document of `files`, in order. A blank document is "", so documents keep their numbers.

    JSON lines hold one document per line and Parquet one per row, under the name `column`; any other file is one
    document. gzip and zstd are decompressed, whatever a file's name. A long document is cut where `last_cut` says (see
    `Tokenizer`). Raises `AsgoError` with file and line or row for content that is not text or cannot be cut.
    """
    for file in files:
        for document, where in _documents_of(file, column):
            if not isinstance(document, str):
                yield _recut(document, where, last_cut)
            elif not document or document.isspace():
                yield ""
            else:
                yield in_pieces(document, where, last_cut)


def pieces_of(document: Document) -> Iterable[str]:
    """Return a document's text in one or more pieces."""
    return (document,) if isinstance(document, str) else document


def in_pieces(text: str, where: str, last_cut: Callable[[str], int]) -> Document:
    """Return a text as a document: cut into pieces if it is long, as in `read_documents`."""
    if len(text) <= PIECE_BYTES:
        return text
    slices = (text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES))
    return _recut(slices, where, last_cut)


def decode_utf8(raw: bytes, where: str) -> str:
    """Decode `raw` and drop a byte order mark. Raises `AsgoError` with `where` and the first invalid byte's offset."""
    return "".join(_decode([raw], where))


def walk_files(folder: Path, suffixes: tuple[str, ...], left_out: Counter[str] | None = None) -> Iterator[Path]:
    """Yield the files below `folder` with these suffixes once each, sorted by folder and name.

    `left_out` counts the others. Links are followed. Raises `UsageError` for a dangling link.
    """
    left_out = Counter() if left_out is None else left_out
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise error

    def is_new(path: Path) -> bool:
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            left_out["linked to a second time"] += 1
            return False
        seen.add(identity)
        return True

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if not is_new(Path(parent)):  # a link to a parent folder would make the walk endless
            folders.clear()
            continue
        left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(parent, name)
            kind = _kind_left_out(path, suffixes)
            if kind is not None:
                left_out[kind] += 1
            elif is_new(path):
                yield path


def _kind_left_out(path: Path, suffixes: tuple[str, ...]) -> str | None:
    """Return why a file of a folder is not an input, or None if it is one."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "linked to itself"
        if path.is_symlink():
            raise UsageError(f"{path}: a dangling link to {path.readlink()}; repair it or remove it") from None
        raise
    if not path.name.lower().endswith(suffixes):
        return f"ending in {path.suffix.lower()}" if path.suffix else "without an ending"
    return None if path.is_file() else "not a file"


def _expand(path: Path, column: str, left_out: Counter[str]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if not path.is_dir():
        raise UsageError(f"{path}: neither a file nor a folder (text is read twice, so it cannot come from a pipe)")
    found = list(walk_files(path, _FOLDER_SUFFIXES, left_out))
    files = [file for file in found if not _is_other_json(file, column)]
    left_out["JSON without such lines"] += len(found) - len(files)
    if not files:
        raise UsageError(
            f"{path}: no file in this folder ends in {', '.join((*_PLAIN_SUFFIXES, '.parquet'))}, "
            f"with or without .gz or .zst; name files one by one"
        )
    return files


def _is_other_json(file: Path, column: str) -> bool:
    """Whether a file named .json is not JSON lines of text, but for example a configuration or an array."""
    if not without_packing(file.name).endswith(".json"):
        return False
    with unpacked(file) as stream:
        first = next((line for _, line in bounded_lines(stream, str(file)) if line.strip()), b"{}")
    try:
        row = parse_json(first)
    except ValueError:
        return True
    return not isinstance(row, dict) or column not in row


def _recut(pieces: Iterable[str], where: str, last_cut: Callable[[str], int]) -> Iterator[str]:
    """Yield the same text in pieces that can be encoded independently."""
    rest = ""
    for piece in pieces:
        text = rest + piece
        cut = last_cut(text)
        if cut:
            yield text[:cut]
        rest = text[cut:]
        if len(rest) > LONGEST_WORD:
            raise AsgoError(
                f"{where}: {len(rest):,} characters without whitespace or another place to cut, too many for gpt2; "
                "insert line breaks into the text, or pass --tokenizer bytes"
            )
    if rest:
        yield rest


def _documents_of(file: Path, column: str) -> Iterator[tuple[Document, str]]:
    """Yield the documents of a file, each with its location."""
    name = without_packing(file.name)
    if name.endswith(_LINE_SUFFIXES):
        if _is_other_json(file, column):
            raise AsgoError(
                f'{file}: not JSON lines, one object per line with its text under "{column}" (choose another with '
                "--text-column); to read the file itself as text, rename it to end in .txt"
            )
        return _read_json_lines(file, column)
    with naming_damage(file), file.open("rb") as opened:
        is_parquet = opened.read(4) == b"PAR1"
    return _read_parquet(file, column) if is_parquet or name.endswith(".parquet") else _read_text(file)


def _read_text(file: Path) -> Iterator[tuple[Document, str]]:
    with unpacked(file) as stream:
        start = stream.read(PIECE_BYTES)
        is_short = len(start) < PIECE_BYTES
    if is_short:
        yield decode_utf8(start, str(file)), str(file)
    else:
        blank = all(piece.isspace() for piece in _pieces(file))  # stops at the first text
        yield "" if blank else _pieces(file), str(file)


def _pieces(file: Path) -> Iterator[str]:
    with unpacked(file) as stream:
        yield from _decode(iter(lambda: stream.read(PIECE_BYTES), b""), str(file))


def _decode(chunks: Iterable[bytes], where: str) -> Iterator[str]:
    """Decode chunks of bytes as `decode_utf8` does; a character may span two chunks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, is_first = 0, True
    for chunk in itertools.chain(chunks, (b"",)):
        begin = done - len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise AsgoError(
                f"{where}: byte {begin + error.start:,} (0x{error.object[error.start]:02x}) is not valid UTF-8; "
                "convert the text to UTF-8 first, for example with iconv"
            ) from None
        done += len(chunk)
        if text:
            yield text.removeprefix("\ufeff") if is_first else text
            is_first = False


def _read_json_lines(file: Path, column: str) -> Iterator[tuple[str, str]]:
    with unpacked(file) as stream:
        # Split bytes, not text: in text, U+2028 and similar characters would also end a line.
        for where, line in bounded_lines(stream, str(file)):
            text = decode_utf8(line, where)
            if text.strip():
                yield _text_of_row(_parse(text, where), where, column), where


def _parse(line: str, where: str) -> object:
    try:
        return parse_json(line)
    except ValueError as error:
        raise AsgoError(f"{where}: not valid JSON ({error})") from None


def _text_of_row(row: object, where: str, column: str) -> str:
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise AsgoError(f'{where}: no string named "{column}" in this row{_hint(row)}')
    try:
        if len(text.encode()) > MAX_ROW_BYTES:
            raise too_long(where)
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise AsgoError(
            f"{where}: lone surrogate U+{code:04X} at character {error.start:,} of the text is not valid Unicode"
        ) from None
    return text


def _hint(row: object) -> str:
    """Return a hint with the names of the strings that the row has."""
    names = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
    return f"; it has {', '.join(names[:8])}: choose one with --text-column" if names else ""


def _read_parquet(file: Path, column: str) -> Iterator[tuple[str, str]]:
    import pyarrow

    from pipelines.data.parquet_text import UnreadableColumn, read_column

    number = 0
    try:
        with file.open("rb") as opened:
            for part in read_column(opened, column):
                for value in part.rows:
                    number += 1
                    where = f"{file}, row {number}"
                    yield _text_of_row({column: value.as_py()}, where, column), where
    except UnicodeDecodeError as error:
        raise AsgoError(f"{file}, row {number}: byte {error.start:,} of the text is not valid UTF-8") from None
    except UnreadableColumn as error:
        raise AsgoError(f"{file}: {error}") from None
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(file)
            raise
        raise AsgoError(f"{file}: damaged Parquet file ({' '.join(str(error).split())})") from None
