"""What every process that a preparation starts does first."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import parent_process


def begin_child() -> None:
    """Leave Ctrl-C to the parent, which ends its children; and end when the parent is killed and cannot do that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
