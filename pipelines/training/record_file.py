"""Files of measurements during a run: JSON lines, a header and then one record per line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pipelines.errors import AsgoError
from pipelines.storage import naming, parse_json, refusing_links, write_atomically

H = TypeVar("H", bound=Mapping[str, Any])
R = TypeVar("R", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Records(Generic[H, R]):
    """Content of a file."""

    header: H
    records: list[R]


@dataclass(frozen=True)
class RecordFile(Generic[H, R]):
    """A file with a header and records, each with a `step`; both are typed dictionaries of JSON values."""

    path: Path
    header_type: type[H]
    record_type: type[R]
    subject: str
    """What the records are, for messages."""

    def keep_until(self, step: int) -> None:
        """Drop the records after `step`: the resumed run measures those steps again."""
        content = self.read()
        if content is None:
            self.path.unlink(missing_ok=True)  # it has only an incomplete line
            return
        kept = [record for record in content.records if record["step"] <= step]
        write_atomically(self.path, "".join([_to_line(content.header), *map(_to_line, kept)]).encode())

    def append(self, header: H, record: R) -> None:
        """Append a record; before the first one, write the header.

        Raises `AsgoError` if writing fails.
        """
        try:
            with open(self.path, "a", encoding="utf-8", opener=refusing_links) as file:
                file.write((_to_line(header) if file.tell() == 0 else "") + _to_line(record))
        except OSError as error:
            raise AsgoError(f"{self.path}: {error.strerror}; make room and continue with --resume") from error

    def read(self) -> Records[H, R] | None:
        """Read the file; None if there is none. Drops a last line without newline, which a kill left incomplete.

        Raises `AsgoError` for any other line that is not a record.
        """
        if not self.path.is_file():
            return None
        with naming(self.path):
            *lines, _torn = self.path.read_text(encoding="utf-8").split("\n")
        if not lines:
            return None
        header = cast(H, self._parsed(1, lines[0], self.header_type))
        return Records(header, [cast(R, self._parsed(*line, self.record_type)) for line in enumerate(lines[1:], 2)])

    def _parsed(self, number: int, line: str, kind: type) -> dict[str, Any]:
        try:
            value = parse_json(line)
            if not (isinstance(value, dict) and value.keys() == kind.__annotations__.keys()):
                raise ValueError(line)
        except ValueError:
            what = f"not a line of {self.subject}; remove the file to go without"
            raise AsgoError(f"{self.path}:{number}: {what}") from None
        return value


def _to_line(value: Mapping[str, Any]) -> str:
    return json.dumps(_finite(value)) + "\n"


def _finite(value: Any) -> Any:
    """Replace floats that JSON does not have (NaN and infinity) by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
