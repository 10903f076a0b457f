"""Compiled code is kept where no other account can put something."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from pipelines.compiler_cache import use_private_compiler_cache
from pipelines.errors import UsageError


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No cache is named, and the user's own are in `tmp_path`."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what the function sets is undone
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return monkeypatch


def test_the_cache_is_the_users_own_and_closed_to_others(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_private_compiler_cache()
    folder = tmp_path / "cache/asgo/compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == folder / "inductor"
    assert Path(os.environ["TRITON_CACHE_DIR"]) == folder / "triton"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no accounts")
@pytest.mark.parametrize("intruder", ["another account's", "open to all"])
def test_a_cache_that_others_can_fill_is_not_used(intruder: str, unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planted = tmp_path / "cache/asgo/compiled"
    planted.mkdir(parents=True)
    if intruder == "open to all":
        planted.chmod(0o777)
    else:
        unset.setattr(os, "geteuid", lambda: planted.stat().st_uid + 1)
        if planted.stat().st_uid == 0:
            pytest.skip("root's folders are trusted")
    unset.setattr(tempfile, "tempdir", str(tmp_path))
    use_private_compiler_cache()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent.parent == tmp_path

    unset.setenv("TORCHINDUCTOR_CACHE_DIR", str(planted))
    with pytest.raises(UsageError, match=rf"^TORCHINDUCTOR_CACHE_DIR={planted}: belongs to another account, or "):
        use_private_compiler_cache()


def test_a_cache_that_the_user_names_is_used(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unset.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    use_private_compiler_cache()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "mine"
