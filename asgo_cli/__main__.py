"""The program: `asgo`, and `python -m asgo_cli`, which is also what torchrun starts."""

import contextlib
import io
import signal
import sys
from pathlib import Path

from pipelines.stopping import INTERRUPTED, INTERRUPTED_LINE, catch_ctrl_c, interrupted


def main() -> None:
    """Run the command line. Ctrl-C ends it with one line and exit code 130 at any time, also while it loads."""
    catch_ctrl_c()
    _print_what_cannot_be_encoded()
    code: str | int | None = INTERRUPTED
    try:
        from asgo_cli.app import main as command_line

        command_line()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        pass
    if code == INTERRUPTED and interrupted():
        with contextlib.suppress(OSError):
            print(INTERRUPTED_LINE, file=sys.stderr)  # noqa: T201
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python, when it ends, would answer with a traceback
    sys.exit(code)


def _print_what_cannot_be_encoded() -> None:
    """Where the locale is not UTF-8, show other characters by their numbers, such as \\u2192."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    # Python puts the working directory first, where a folder named `datasets` would be taken for the library.
    with contextlib.suppress(ValueError, OSError):  # the directory may have been deleted
        if not sys.flags.safe_path and Path.cwd() != Path(__file__).resolve().parents[1]:
            sys.path.remove(str(Path.cwd()))
    main()
