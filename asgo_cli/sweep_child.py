"""`python -m asgo_cli.sweep_child PID ...`: `asgo` as a sweep of that process id starts it, ending when it is gone."""

from __future__ import annotations

import os
import sys

from asgo_cli.worker import end_with_parent

if __name__ == "__main__":
    parent = int(sys.argv.pop(1))
    end_with_parent()  # nothing would watch the run any more
    if os.getppid() != parent:  # gone before it could be noticed
        sys.exit(1)

    from asgo_cli.__main__ import main

    main()
