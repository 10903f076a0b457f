"""What the user asked `asgo viz` for, and the bar that shows how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asgo_cli.live import LiveProgress


@dataclass(frozen=True)
class Request:
    """The command's arguments, checked as far as can be without knowing any optimizer."""

    names: Sequence[str]  # of functions, or of matrix problems
    expression: str | None
    optimizers: Sequence[str]
    start: tuple[float, float] | None
    steps: int | None
    seed: int
    out: Path | None
    as_json: bool
    command: str  # `asgo viz` with the names as given, for the closing lines

    def path(self, names: Sequence[str], several: str, ending: str = "") -> Path:
        """Where the figure goes: the file asked for, or else one named by the only name, or by what several are."""
        return self.out or Path(f"{names[0] if len(names) == 1 else several}{ending}.png")


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """A bar of so many steps, on a terminal; gives a function that makes, for a name, what counts more steps."""
    with LiveProgress(transient=True) as progress:
        bar = progress.add_task("", total=total)

        def counter(name: str) -> Callable[[int], None]:
            return lambda more: progress.update(bar, description=name, advance=more)

        yield counter
