"""How the `--help` of a command ends."""

from __future__ import annotations


def examples(*lines: str) -> str:
    """Command lines to copy, each on a line of its own that is never broken."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
