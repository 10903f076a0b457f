"""One mirror for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from .mirrors import make_texts, write_mirror


@pytest.fixture(scope="session")
def texts() -> list[list[str]]:
    """Three files of documents: 2,400 in all, about 180,000 tokens."""
    return [make_texts(0, 1000), make_texts(1, 300), make_texts(2, 1100)]


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]]) -> Path:
    """Those documents as Parquet files."""
    return write_mirror(tmp_path_factory.mktemp("mirror") / "parquet", texts, "parquet")
