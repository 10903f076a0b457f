"""A run says what it computes with where that changes, and its processes agree on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from optim import matrix_functions, native
from pipelines.config import RunConfig
from pipelines.training.checkpoint import checkpoint_folders, read_state
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.long import long
from tests.pipelines.training.processes import Job, start

Make = Callable[..., RunConfig]
LARGE = {"model__d_model": 64, "model__d_ff": 256, "optimizer__name": "accasro"}
"""Above `native.WORTH_FROM`."""

needs_compiler = pytest.mark.skipif(not native.is_available(), reason="needs a C compiler")


@pytest.fixture(autouse=True)
def compiled_again() -> Iterator[None]:
    """As a new process would."""
    native._loaded.cache_clear()
    yield
    native._loaded.cache_clear()
    native.use(True)


def remove_last_checkpoints(run: Path, count: int) -> None:
    for folder in checkpoint_folders(RunFolder(run).checkpoints)[-count:]:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@needs_compiler
def test_a_resume_without_the_compiler_is_said_once(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(**LARGE, checkpoint__keep=9)
    train(config, tmp_path / "run", reporter)
    assert not any("bit for bit" in note or "slower" in note for note in reporter.notes)
    remove_last_checkpoints(tmp_path / "run", 1)
    train(config, tmp_path / "run", reporter, resume=True)
    assert not any("bit for bit" in note for note in reporter.notes)
    remove_last_checkpoints(tmp_path / "run", 1)
    monkeypatch.setenv("CC", "no-such-compiler")
    native._loaded.cache_clear()
    train(config, tmp_path / "run", reporter, resume=True)
    said = [note for note in reporter.notes if "not bit for bit" in note]
    assert len(said) == 1
    assert "optimizer: C kernels (cc " in said[0]
    assert "before, PyTorch operations now" in said[0]
    assert any("no C compiler 'no-such-compiler'" in note and "slower" in note for note in reporter.notes)


def test_muon_on_a_cpu_that_multiplies_otherwise_is_said(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(optimizer__name="muon", optimizer__lr=0.01)
    monkeypatch.setattr(matrix_functions, "_bfloat16_measured", False)
    train(config, tmp_path / "run", reporter)
    remove_last_checkpoints(tmp_path / "run", 1)
    monkeypatch.setattr(matrix_functions, "_bfloat16_measured", True)
    train(config, tmp_path / "run", reporter, resume=True)
    (said,) = [note for note in reporter.notes if "not bit for bit" in note]
    assert "orthogonalization: float32 before, bfloat16 now" in said


def test_another_instruction_set_torch_or_number_of_threads_is_said(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    train(config, tmp_path / "run", reporter)
    saved = read_state(checkpoint_folders(RunFolder(tmp_path / "run").checkpoints)[-1])["arithmetic"]
    assert saved["optimizer"] == "PyTorch operations"  # a small model, and AdamW
    assert saved["instructions"] == torch.backends.cpu.get_cpu_capability()
    remove_last_checkpoints(tmp_path / "run", 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    train(config, tmp_path / "run", reporter, resume=True)
    (said,) = [note for note in reporter.notes if "not bit for bit" in note]
    assert f"instructions: {saved['instructions']} before, AVX1024 now" in said
    assert "77 threads now" in said


@long
@needs_compiler
def test_processes_of_which_one_has_no_compiler_stay_replicas(small_config: Make, tmp_path: Path) -> None:
    """They would drift apart: a kernel and the operations of PyTorch round otherwise."""
    config = small_config(**LARGE, training__steps=4, checkpoint__every=4, evaluation__every=4)
    without = {"CC": "no-such-compiler"}
    for name, of_ranks in {"one": [{}, without], "both": [without, without]}.items():
        processes = start([Job(config, tmp_path / name)], 2, tmp_path, of_ranks)
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0, 0]
    one, both = (checkpoint_folders(RunFolder(tmp_path / name).checkpoints)[-1] for name in ("one", "both"))
    assert (one / "model.safetensors").read_bytes() == (both / "model.safetensors").read_bytes()
    assert read_state(one)["arithmetic"] == read_state(both)["arithmetic"]
