"""Addresses as they may be shown and written down."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(\w+://)(?:[^\s/]*@)?([^\s?#\"'<>)]*)(\?[^\s\"'<>)]*)?")


def without_secrets(text: str) -> str:
    """`text` with no login and no query in its addresses: a password, the signature of a signed address."""
    return _ADDRESS.sub(lambda found: f"{found[1]}{found[2]}{'?...' if found[3] else ''}", text)
