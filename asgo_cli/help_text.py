"""Examples at the end of a command's `--help`."""

from __future__ import annotations


def examples(*lines: str) -> str:
    """Return an epilog of command lines, each on a line of its own that is never wrapped."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
