"""How often the tests that kill a process kill it."""

import os

KILLS = int(os.environ.get("ASGO_KILLS", "3"))
"""20 are for once, by hand."""
