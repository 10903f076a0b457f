"""Entry point of `asgo` and of `python -m asgo_cli`, which launchers start too."""

import contextlib
import io
import signal
import sys
from pathlib import Path

from pipelines.stopping import INTERRUPTED, INTERRUPTED_LINE, catch_ctrl_c, interrupted


def main() -> None:
    """Run the command line. Ctrl-C ends it at any time, even during imports, with one line and exit code 130."""
    catch_ctrl_c()
    _escape_unencodable_output()
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during shutdown would print a traceback
    sys.exit(code)


def _escape_unencodable_output() -> None:
    """Print characters that the locale cannot encode as escapes, such as \\u2192."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    # `python -m` puts the working directory first: a folder named `datasets` there would hide the library.
    with contextlib.suppress(ValueError, OSError):  # the directory may have been deleted
        if not sys.flags.safe_path and Path.cwd() != Path(__file__).resolve().parents[1]:
            sys.path.remove(str(Path.cwd()))
    main()
