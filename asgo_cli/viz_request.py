"""The arguments of `asgo viz`, and its progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asgo_cli.live import LiveProgress


@dataclass(frozen=True)
class Request:
    """The command's arguments; the optimizers are not checked yet."""

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
        """Return the figure's path: `out`, or a file named after the only name, or `several` if there are more."""
        return self.out or Path(f"{names[0] if len(names) == 1 else several}{ending}.png")


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """Show a bar of `total` steps on a terminal. `counter(name)`, of the yielded `counter`, returns a step counter."""
    with LiveProgress(transient=True) as progress:
        bar = progress.add_task("", total=total)

        def counter(name: str) -> Callable[[int], None]:
            return lambda more: progress.update(bar, description=name, advance=more)

        yield counter
