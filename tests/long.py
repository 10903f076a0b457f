"""Which tests run: `make test` leaves out those that take long; `make check` runs all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

LONG = os.environ.get("ASGO_TESTS") == "all"
long = pytest.mark.skipif(not LONG, reason="takes long; ASGO_TESTS=all runs it")


def sampled(values: Sequence[Any], *kept: Any) -> list[Any]:
    """Parameters of a test, of which only `kept` run without ASGO_TESTS=all."""
    return [value if value in kept else pytest.param(value, marks=long) for value in values]
