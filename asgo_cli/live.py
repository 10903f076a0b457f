"""Lines that change while work goes on, on a terminal that may change its width meanwhile."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.live import Live
from rich.progress import Progress, ProgressColumn
from rich.segment import ControlType, Segment

from asgo_cli import console

# To the beginning of the row, where a typed ^C has moved the cursor; this row, and then, from the next one, all below.
# In one step, from the first row of the screen, it would count as clearing the screen, which tmux saves every time.
_ERASE_BELOW = "\r\x1b[2K\x1b7\x1b[B\x1b[J\x1b8"


class LiveProgress(Progress):
    """rich's progress on stderr, where that is a terminal, with no broken lines left behind when it gets narrower."""

    def __init__(self, *columns: str | ProgressColumn, transient: bool = False, expand: bool = False) -> None:
        super().__init__(
            *columns, console=console.words, transient=transient, disable=not console.is_live(), expand=expand
        )
        self.live = _Live(
            console=console.words, refresh_per_second=10, transient=transient, get_renderable=self.get_renderable
        )


def clear_left_over() -> None:
    """Make room for words after a process may have been killed that kept a live line: it hides the cursor, too."""
    if console.is_live():
        console.words.show_cursor()
        console.words.print(_Codes(_ERASE_BELOW), end="")


class _Live(Live):
    """Keeps the cursor at the beginning of its first line, and erases from there before it draws again.

    A terminal that gets narrower breaks the lines that it shows. rich keeps the cursor behind its last line, and does
    not know then how many rows lie above.
    """

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What is printed, and the live lines after it."""
        _, *printed, frame = super().process_renderables(renderables)
        return [_Codes(_ERASE_BELOW), *printed, _Parked(frame) if self.is_started else frame]


class _Codes:
    """What a terminal obeys and does not show."""

    def __init__(self, text: str) -> None:
        self._segment = Segment(text, control=[(ControlType.CARRIAGE_RETURN,)])  # rich has no name for all of them

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._segment


class _Parked:
    """Something with the cursor at its beginning afterwards."""

    def __init__(self, frame: ConsoleRenderable) -> None:
        self._frame = frame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments = list(console.render(self._frame, options))
        yield from segments
        rows = sum(segment.text.count("\n") for segment in segments)
        yield _Codes("\r" + f"\x1b[{rows}A" * bool(rows))
