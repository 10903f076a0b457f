"""What does not compile, or does not fit into the memory, is found before a step and changes only how a run computes.

Memory runs out here where a test says so, in a model that is compiled: then a CPU makes trials, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.gpt import GPT
from pipelines.config import RunConfig, RuntimeSettings
from pipelines.errors import AsgoError
from pipelines.training.checkpoint import checkpoint_folders, read_state
from pipelines.training.device import compiles
from pipelines.training.gpt_task import GPTTask
from pipelines.training.metrics import read_lines
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import train
from tests.conftest import SilentReporter
from tests.long import long, sampled
from tests.pipelines.training.processes import Job, carry_out
from tests.pipelines.training.test_arithmetic import remove_last_checkpoints

Make = Callable[..., RunConfig]
CLOCK = ("step_ms", "optimizer_ms", "throughput", "elapsed_s")
FEW = {"training__steps": 3, "evaluation__every": 3, "checkpoint__every": 1, "model__dropout": 0.1}


def figures(rows: list[Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def arithmetic(run: Path) -> dict[str, str]:
    found: dict[str, str] = read_state(checkpoint_folders(RunFolder(run).checkpoints)[-1])["arithmetic"]
    return found


def as_it_is(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
    """A backend of torch.compile that runs graphs as they are."""
    return graph.forward


def refuses(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
    """A backend that compiles nothing, as on a machine without a compiler."""
    raise RuntimeError("no working compiler\nand a second line")


def refuses_models(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
    """A backend that compiles small graphs only."""
    return as_it_is(graph, inputs) if len(graph.graph.nodes) < 8 else refuses(graph, inputs)


def compile_with(patch: pytest.MonkeyPatch, backend: Callable[..., Any]) -> None:
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    compile_with(monkeypatch, as_it_is)
    yield
    torch.compiler.reset()


def limit_memory(patch: pytest.MonkeyPatch, rows: int, where: Callable[[GPTTask], bool] = lambda task: True) -> None:
    """Make forward passes of more than `rows` rows run out of memory."""
    loss = GPTTask.loss

    def limited(task: GPTTask, batch: tuple[Tensor, ...]) -> Tensor:
        result = loss(task, batch)
        if len(batch[0]) > rows and where(task):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    patch.setattr(GPTTask, "loss", limited)


def test_auto_compiles_on_a_gpu_only() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [compiles(RuntimeSettings(), device) for device in (gpu, cpu)] == [True, False]
    for asked in (True, False):
        assert [compiles(RuntimeSettings(compile=asked), device) for device in (gpu, cpu)] == [asked, asked]


def count_batches(patch: pytest.MonkeyPatch) -> None:
    """Give models a buffer that each forward pass in training changes, as batch normalization does."""
    build = GPT.__init__

    def count(model: nn.Module, inputs: object) -> None:
        model.batches.add_(float(model.training))

    def counting(model: GPT, **keywords: Any) -> None:
        build(model, **keywords)
        model.register_buffer("batches", torch.zeros(()))
        model.register_forward_pre_hook(count)

    patch.setattr(GPT, "__init__", counting)


def test_a_trial_changes_nothing(
    compiled: None, small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_batches(monkeypatch)
    runs = {}
    for name in ("plain", "compiled"):
        config = small_config(**FEW, training__micro_batch_size=2, runtime__compile=name == "compiled")
        runs[name] = figures(train(config, tmp_path / name, SilentReporter()))
    assert runs["plain"] == runs["compiled"]
    plain, other = (RunFolder(tmp_path / name).checkpoints / "step-00000003/model.safetensors" for name in runs)
    assert plain.read_bytes() == other.read_bytes()
    assert arithmetic(tmp_path / "compiled")["torch.compile"] == "on"


def test_where_compiling_fails_the_run_goes_on_without_it(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(monkeypatch, refuses)
    plain = train(small_config(**FEW), tmp_path / "plain", SilentReporter())
    config = small_config(**FEW, runtime__compile=True, checkpoint__keep=9)
    rows = train(config, tmp_path / "run", reporter)
    assert figures(rows) == figures(plain)
    (said,) = reporter.notes
    assert said.startswith("the model is not compiled, so training is slower: ")
    assert "no working compiler" in said
    assert "\n" not in said
    assert arithmetic(tmp_path / "run")["torch.compile"] == "off"
    remove_last_checkpoints(tmp_path / "run", 1)
    again = train(config, tmp_path / "run", reporter, resume=True)
    assert figures(again) == figures(plain)
    assert not [note for note in reporter.notes if "bit for bit" in note]
    compile_with(monkeypatch, as_it_is)
    remove_last_checkpoints(tmp_path / "run", 1)
    train(config, tmp_path / "run", reporter, resume=True)  # the next run compiles again
    assert "torch.compile: off before, on now" in reporter.notes[-1]
    torch.compiler.reset()


@pytest.mark.parametrize(("batch", "fits", "size"), [(4, 2, 2), (4, 1, 1), (6, 2, 1), (9, 3, 3)])
def test_a_batch_that_does_not_fit_is_split_with_the_numbers_of_that_micro_batch_size(
    batch: int,
    fits: int,
    size: int,
    compiled: None,
    small_config: Make,
    tmp_path: Path,
    reporter: SilentReporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**FEW, "training__batch_size": batch, "evaluation__batches": 1000, "runtime__compile": True}
    asked = train(small_config(**settings, training__micro_batch_size=size), tmp_path / "asked", SilentReporter())
    limit_memory(monkeypatch, fits)
    rows = train(small_config(**settings), tmp_path / "run", reporter)
    assert figures(rows) == figures(asked)
    assert reporter.notes[-1].endswith(f"training.micro_batch_size={size} does the same without a trial")
    assert all(note.startswith("out of memory with micro-batches of ") for note in reporter.notes)


def test_memory_that_the_optimizers_state_takes_is_found_before_the_second_step(
    compiled: None, small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[int] = []
    step = torch.optim.AdamW.step

    def noted(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        stepped.append(1)
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    limit_memory(monkeypatch, 2, where=lambda task: len(stepped) > 0)
    rows = train(small_config(**FEW, optimizer__name="adamw", runtime__compile=True), tmp_path / "run", reporter)
    assert len(reporter.notes) == 1
    assert rows[-1]["step"] == 3


def test_a_row_that_does_not_fit_is_an_error(
    compiled: None, small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 0)
    with pytest.raises(AsgoError, match=r"^out of memory with micro-batches of 1; use a smaller model"):
        train(small_config(**FEW, runtime__compile=True), tmp_path / "run", reporter)


def test_an_error_that_has_nothing_to_do_with_compiling_is_raised(
    compiled: None, small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.GELU, "forward", lambda module, x: x.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        train(small_config(**FEW, runtime__compile=True), tmp_path / "run", reporter)


def on_one_rank(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    """In processes that start from now on: trouble on rank 1 only."""
    monkeypatch.setattr("tests.pipelines.training.processes._carry_out", functools.partial(_with_trouble, trouble))


def _with_trouble(trouble: str, jobs: Any) -> None:
    from tests.pipelines.training import processes

    second = processes.os.environ["RANK"] == "1"
    with pytest.MonkeyPatch.context() as patch:
        backend = {"one": refuses if second else as_it_is, "all": refuses_models}.get(trouble, as_it_is)
        compile_with(patch, backend)
        if trouble == "memory" and second:
            limit_memory(patch, 1)
        processes._carry_out(jobs)


@pytest.mark.parametrize("trouble", sampled(["one", "all"], "one"))
@pytest.mark.parametrize("sharing", [{}, pytest.param({"runtime__shard_model": True}, marks=long)])
def test_processes_of_which_one_cannot_compile_all_go_on_without(
    trouble: str, sharing: dict[str, bool], small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FEW, "model__dropout": 0.0, **sharing}
    carry_out_with(monkeypatch, "none", Job(small_config(**settings), tmp_path / "plain"))
    carry_out_with(monkeypatch, trouble, Job(small_config(**settings, runtime__compile=True), tmp_path / "run"))
    plain, rows = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("plain", "run"))
    assert figures(rows) == figures(plain)
    assert arithmetic(tmp_path / "run")["torch.compile"] == "off"


def test_processes_of_which_one_lacks_memory_all_split_their_batches(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FEW, "runtime__compile": True, "evaluation__batches": 1000}
    asked = small_config(**settings, training__micro_batch_size=1)
    carry_out_with(monkeypatch, "none", Job(asked, tmp_path / "asked"))
    carry_out_with(monkeypatch, "memory", Job(small_config(**settings), tmp_path / "run"))
    rows, expected = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("run", "asked"))
    assert figures(rows) == figures(expected)


def carry_out_with(monkeypatch: pytest.MonkeyPatch, trouble: str, job: Job) -> None:
    with monkeypatch.context() as patch:
        on_one_rank(patch, trouble)
        carry_out([job], 2, job.out.parent / "jobs")
