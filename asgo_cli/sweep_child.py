"""`python -m asgo_cli.sweep_child PID ...`: `asgo` as a sweep of that process id starts it, ending when it is gone."""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Save and stop when the process that started this one is killed: nothing would watch the run any more."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # gone before it could be noticed
        sys.exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))

    from asgo_cli.app import main

    main()
