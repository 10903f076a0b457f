"""Where a run branches from another: the request, and the record in `config.json`. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from pipelines.config import Settings
from pipelines.errors import UsageError

_AT_STEP = re.compile(r"(.+)@([0-9]{1,18})", re.DOTALL)


class Ancestor(Settings):
    """A checkpoint that a run descends from."""

    run: str
    """The run's folder, as the user gave it."""
    step: Annotated[int, Field(ge=0, le=10**12)]
    sha256: str
    """SHA-256 of the checkpoint's `state.json`, which has those of the other files."""
    optimizer: str

    def __str__(self) -> str:
        return f"{self.run}@{self.step}"


@dataclass(frozen=True)
class BranchPoint:
    """A checkpoint at which a new run is to begin; the newest one if `step` is None."""

    run: Path
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `RUN` or `RUN@STEP`. A folder with such a name is a `RUN`. Raises `UsageError` for another text."""
        match = _AT_STEP.fullmatch(text)
        if match and not Path(text).is_dir():
            return cls(Path(match[1]), int(match[2]))
        if not text or (not Path(text).exists() and "@" in Path(text).name):
            raise UsageError(f"--branch {text}: should be RUN or RUN@STEP, such as runs/trunk@800")
        return cls(Path(text))

    def __str__(self) -> str:
        return str(self.run) if self.step is None else f"{self.run}@{self.step}"

    def is_of(self, ancestor: Ancestor) -> bool:
        """Whether a run with this parent may have begun here."""
        same_run = str(self.run) == ancestor.run or self.run.resolve() == Path(ancestor.run).resolve()
        return same_run and self.step in (None, ancestor.step)
