"""`pipelines.doctor` sees what will bite: each test breaks one thing, and finds it told."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from optim import native
from pipelines import doctor
from pipelines.data import tokenizers
from pipelines.doctor import Finding, examine


def look(folder: Path) -> dict[str, Finding]:
    findings = list(examine(folder))
    assert len({finding.what for finding in findings}) == len(findings)
    return {finding.what: finding for finding in findings}


def test_looks_at_everything_and_leaves_nothing_behind(tmp_path: Path) -> None:
    findings = look(tmp_path)
    expected = "asgo Python system processor torch CUDA NCCL vocabulary disk packages"
    assert {*expected.split(), "C compiler", "torch.compile", "free space", "open files"} <= findings.keys()
    assert findings["torch"].found.startswith(torch.__version__)
    assert not any(finding.broken for finding in findings.values())
    assert not list(tmp_path.iterdir())


def test_a_damaged_vocabulary_is_essential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tokenizers._GPT2_TABLE.read_bytes()
    monkeypatch.setattr(tokenizers, "_GPT2_TABLE", tmp_path / "table.xz")
    damaged = [table[:-100], table[:1000] + b"\0" * 10 + table[1010:], b""]
    for content in damaged:
        (tmp_path / "table.xz").write_bytes(content)
        assert look(tmp_path)["vocabulary"].broken
    (tmp_path / "table.xz").write_bytes(table)
    assert not look(tmp_path)["vocabulary"].broken


def test_names_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tokenizers, "_GPT2_TABLE", tmp_path / "table.xz")
    warning = look(tmp_path)["vocabulary"].warning
    assert str(tmp_path) not in warning
    assert "~/table.xz" in warning


def test_warns_without_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    native._loaded.cache_clear()
    try:
        findings = look(tmp_path)
    finally:
        native._loaded.cache_clear()
    assert "2 to 4 times as long" in findings["C compiler"].warning
    assert "no C++ compiler" in findings["torch.compile"].warning


def test_warns_of_a_slow_disk_and_of_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_written_mb_s", lambda folder: 26.0)
    assert "takes 100 s" in look(tmp_path)["disk"].warning
    monkeypatch.undo()
    assert "No such file" in doctor._disk_speed(tmp_path / "gone").warning


def test_warns_of_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_FEW_GB", 1e9)
    monkeypatch.setattr(doctor, "_SMALL_SHM_GB", 1e9)
    findings = look(tmp_path)
    assert "two checkpoints of GPT-2 take 5 GB" in findings["free space"].warning
    if Path("/dev/shm").exists():
        assert "--shm-size" in findings["/dev/shm"].warning


def test_warns_of_few_open_files(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
    try:
        assert "ulimit -n" in look(tmp_path)["open files"].warning
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_warns_of_versions_that_were_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.40.0+cu150")
    assert look(tmp_path)["torch"].warning == "not tested; from 2.11 to 2.14 is"
    monkeypatch.setattr(doctor, "_TESTED_PYTHON", ((2, 6), (2, 7)))
    assert look(tmp_path)["Python"].warning == "not tested; from 2.6 to 2.7 is"


def test_tells_the_gpus_and_who_else_is_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H100", total_memory=80_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ([80, 60][index], 80))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    findings = look(tmp_path)
    assert findings["GPU 0"] == Finding("GPU 0", "H100, 80 GB, compute capability 9.0")
    assert findings["GPU 1"].warning == "other processes use 25% of its memory"
    assert "no triton" in findings["torch.compile"].warning
    assert "--gpus does not work" in findings["NCCL"].warning


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_no_gpu_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is None:
        pytest.skip("torch is built without CUDA")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "no GPU, so training is on the processor: " in look(tmp_path)["CUDA"].warning
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in look(tmp_path)["CUDA"].warning


def test_compares_the_packages_with_what_the_installed_asgo_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asgo-9.9.dist-info").mkdir()
    (tmp_path / "asgo-9.9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.4\nName: asgo\nVersion: 9.9\n"
        "Requires-Dist: numpy<1\nRequires-Dist: torch>=2.11\n"
        "Provides-Extra: dev\nProvides-Extra: fast\nProvides-Extra: odd\n"
        "Requires-Dist: pytest>=8; extra == 'dev'\n"
        "Requires-Dist: pillow>=1; extra == 'fast'\n"
        "Requires-Dist: no-such-package>=1; extra == 'odd'\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    findings = look(tmp_path)
    assert findings["asgo"].found.startswith("9.9")
    assert findings["packages"].found == "1 of 2"
    assert findings["packages"].warning.startswith("numpy ")
    assert not findings["packages"].broken
    assert findings["extra fast"].found.startswith("pillow ")
    assert findings["extra odd"].found == "no no-such-package: pip install 'asgo[odd]'"
    assert "extra dev" not in findings

    with (tmp_path / "asgo-9.9.dist-info/METADATA").open("a") as file:
        file.write("Requires-Dist: no-such-package\n")
    assert look(tmp_path)["packages"].broken
