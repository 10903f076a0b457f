"""`python -m asgo_cli`, which is also what torchrun starts."""

import sys
from pathlib import Path

if __name__ == "__main__":  # in a spawned child the path is its parent's, corrected already
    # Python puts the working directory first, where a folder named `models` would be taken for ours. What this file was
    # found in holds all four rooms, and is on the path by itself unless it is the working directory.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]

    from asgo_cli.app import main

    main()
