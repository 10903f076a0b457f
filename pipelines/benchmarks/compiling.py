"""Whether torch.compile is at work."""

from __future__ import annotations

import sys


def compiled_graphs() -> int:
    """How many graphs torch.compile has captured in this process."""
    utils = sys.modules.get("torch._dynamo.utils")  # not imported means that nothing was compiled
    return utils.counters["stats"]["unique_graphs"] if utils is not None else 0
