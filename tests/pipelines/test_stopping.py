"""A Ctrl-C that a library swallowed is not lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SWALLOWED = """
import os, signal
from pipelines.stopping import catch_ctrl_c, stop_on_signals

catch_ctrl_c()
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass
with stop_on_signals() as stop:
    print(stop.signal_name)
"""


def test_a_run_whose_ctrl_c_was_swallowed_before_it_began_stops() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SWALLOWED], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("SIGINT\n", "")
