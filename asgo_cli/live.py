"""Live progress lines that survive a change of the terminal's width."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.live import Live
from rich.progress import Progress, ProgressColumn
from rich.segment import ControlType, Segment

from asgo_cli import console

# Return to column 0, from where a typed ^C has moved the cursor; erase this row, then all rows below it.
# Not in one step: from the first row that clears the screen, and tmux saves a cleared screen to its history each time.
_ERASE_BELOW = "\r\x1b[2K\x1b7\x1b[B\x1b[J\x1b8"


class LiveProgress(Progress):
    """rich's `Progress` on stderr if that is a terminal. Leaves no broken lines when the terminal gets narrower."""

    def __init__(self, *columns: str | ProgressColumn, transient: bool = False, expand: bool = False) -> None:
        super().__init__(
            *columns, console=console.words, transient=transient, disable=not console.is_live(), expand=expand
        )
        self.live = _Live(
            console=console.words, refresh_per_second=10, transient=transient, get_renderable=self.get_renderable
        )


def clear_left_over() -> None:
    """Erase the live line of a process that may have been killed, and show the cursor again, which it had hidden."""
    if console.is_live():
        console.words.show_cursor()
        console.words.print(_Codes(_ERASE_BELOW), end="")


class _Live(Live):
    """Keeps the cursor at the start of its first line, and erases from there before it draws again.

    A terminal that gets narrower wraps the lines that it shows. rich keeps the cursor after its last line, and no
    longer knows how many rows are above.
    """

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Return the printed text, followed by the live lines."""
        _, *printed, frame = super().process_renderables(renderables)
        return [_Codes(_ERASE_BELOW), *printed, _Parked(frame) if self.is_started else frame]


class _Codes:
    """Control codes for the terminal."""

    def __init__(self, text: str) -> None:
        self._segment = Segment(text, control=[(ControlType.CARRIAGE_RETURN,)])  # rich has no name for all of them

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._segment


class _Parked:
    """Renders a frame, then moves the cursor to the start of its first line."""

    def __init__(self, frame: ConsoleRenderable) -> None:
        self._frame = frame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments = list(console.render(self._frame, options))
        yield from segments
        rows = sum(segment.text.count("\n") for segment in segments)
        yield _Codes("\r" + f"\x1b[{rows}A" * bool(rows))
