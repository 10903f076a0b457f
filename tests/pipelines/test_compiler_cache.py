"""Compiled code is kept where no other account can put something."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from pipelines.compiler_cache import use_private_compiler_cache
from pipelines.errors import UsageError
from tests.long import long


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The temporary folder, where everybody can write; the user's own cache is `tmp_path / "cache"`."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what torch sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_all_that_torch_keeps_is_in_a_folder_of_the_users_own(shared: Path, tmp_path: Path) -> None:
    use_private_compiler_cache()
    own = tmp_path / "cache/asgo/compiled"
    assert own.stat().st_mode & 0o777 == 0o700
    assert Path(default_cache_dir()).parent == own
    assert own in Path(cache_dir()).parents
    assert os.environ["TMPDIR"] == str(own), "for the processes that compile"
    assert not list(shared.iterdir())


def test_a_cache_that_others_can_fill_is_not_used(shared: Path, tmp_path: Path) -> None:
    planted = tmp_path / "cache/asgo/compiled"
    planted.mkdir(parents=True)
    planted.chmod(0o777)
    use_private_compiler_cache()
    own = Path(tempfile.gettempdir())
    assert (own.parent, own.stat().st_mode & 0o777) == (shared, 0o700)


def test_a_temporary_folder_of_the_users_own_stays(shared: Path) -> None:
    shared.chmod(0o700)
    use_private_compiler_cache()
    assert tempfile.gettempdir() == str(shared)


def test_each_instruction_set_has_a_folder_of_its_own(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        use_private_compiler_cache()
        folders.add(cache_dir())
    assert len(folders) == 2


def test_a_cache_that_the_user_names_must_be_safe(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    use_private_compiler_cache()
    use_private_compiler_cache()
    assert cache_dir() == str(tmp_path / "mine" / torch.backends.cpu.get_cpu_capability())

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared))
    with pytest.raises(UsageError, match=f"^TORCHINDUCTOR_CACHE_DIR={shared}: belongs to another account, or "):
        use_private_compiler_cache()


@long
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has one instruction set")
def test_code_for_another_instruction_set_is_not_used(tmp_path: Path) -> None:
    """Two nodes may share a home folder. With one cache, the second would compile loops made for wider vectors."""
    program = (
        "import torch; from pipelines.compiler_cache import use_private_compiler_cache as use; use();"
        "x = torch.arange(1000.0); print(torch.compile(lambda x: (x + 1).sqrt())(x).sum().item());"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    (first, own), (second, other) = (
        subprocess.run(
            [sys.executable, "-c", program], env={**environment, **more}, capture_output=True, text=True, check=True
        ).stdout.split()
        for more in ({}, {"ATEN_CPU_CAPABILITY": "default"})
    )
    assert float(first) == pytest.approx(float(second), rel=1e-6)
    assert own != other
