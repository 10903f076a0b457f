"""Remove secrets from addresses before they are shown or stored."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(\w+://)(?:[^\s/]*@)?([^\s?#\"'<>)]*)(\?[^\s\"'<>)]*)?")


def without_secrets(text: str) -> str:
    """Return `text` without the login and the query of its addresses: passwords, and signatures of signed URLs."""
    return _ADDRESS.sub(lambda found: f"{found[1]}{found[2]}{'?...' if found[3] else ''}", text)
