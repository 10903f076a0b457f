"""`python -m asgo_cli.sweep_child PID ...`: run `asgo ...` for the sweep with process id PID, and end with it."""

from __future__ import annotations

import os
import sys

from asgo_cli.worker import end_with_parent

if __name__ == "__main__":
    parent = int(sys.argv.pop(1))
    end_with_parent()  # without the sweep, nothing would watch this run
    if os.getppid() != parent:  # the sweep ended before the line above took effect
        sys.exit(1)

    from asgo_cli.__main__ import main

    main()
