"""Several processes train as one does: the same losses, evaluations, checkpoints. With real processes and gloo."""

from __future__ import annotations

import shutil
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from optim import OPTIMIZER_NAMES
from pipelines.config import RunConfig
from pipelines.errors import RunInterrupted, UsageError
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.tasks import task_of
from pipelines.training.distributed import ALONE, Ranks, local_batch, rounds
from pipelines.training.parallel import wrap_in_ddp
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import train
from tests.conftest import SMALL, SilentReporter
from tests.long import LONG, sampled
from tests.pipelines.training.double_precision import bound, double_precision
from tests.pipelines.training.processes import Job, carry_out, free_port, start

Make = Callable[..., RunConfig]
STEPS = 50
FEW = ("asgo", "accasro")
"""Optimizers that stand for all where a test takes long."""


def losses(run: Path) -> np.ndarray[Any, Any]:
    return np.array([row["loss"] for row in RunFolder(run).rows()])


def checkpoint_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = [path for path in folder.glob("*.safetensors") if path.name != "history.safetensors"]
    return {f"{path.stem}:{k}": v for path in files for k, v in safetensors.torch.load_file(path).items()}


def figures(run: Path) -> list[Mapping[str, Any]]:
    clock = ("step_ms", "optimizer_ms", "throughput", "elapsed_s")
    return [{key: value for key, value in row.items() if key not in clock} for row in RunFolder(run).rows()]


@pytest.fixture(scope="module")
def fifty_steps(token_folder: Path) -> dict[str, RunConfig]:
    """A configuration an optimizer; validation on 9 windows, which neither 2 nor 4 processes share equally."""
    changes = {
        **SMALL,
        "data.folder": str(token_folder),
        "training.steps": STEPS,
        "training.batch_size": 8,
        "training.micro_batch_size": 2,
        "training.max_grad_norm": 1.0,
        "evaluation.every": 25,
        "evaluation.batches": 9,
        "checkpoint.every": STEPS,
    }
    return {
        name: resolve([preset_layer("gpt", "tiny"), Layer("test", {**changes, "optimizer.name": name})])
        for name in (OPTIMIZER_NAMES if LONG else FEW)
    }


@pytest.fixture(scope="module")
def curves(fifty_steps: dict[str, RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Any]:
    """Losses of each optimizer's run by one process, by two and by four, in float64."""
    root = tmp_path_factory.mktemp("sizes")
    with double_precision():
        for name, config in fifty_steps.items():
            train(config, root / f"1-{name}", SilentReporter())
    for size in (2, 4):
        jobs = [Job(config, root / f"{size}-{name}", double=True) for name, config in fifty_steps.items()]
        carry_out(jobs, size, root / "jobs")
    return lambda size, name: losses(root / f"{size}-{name}")


@pytest.mark.parametrize("name", sampled(OPTIMIZER_NAMES, *FEW))
def test_one_two_and_four_processes_agree_to_rounding_at_every_step(
    name: str, curves: Callable[[int, str], Any]
) -> None:
    alone = curves(1, name)
    assert len(alone) == STEPS + 3
    for size in (2, 4):
        difference = np.abs(curves(size, name) - alone) / alone
        assert difference.max() <= bound(STEPS), (
            f"{size} processes: {difference.max():.1e} at record {difference.argmax()}"
        )


def losses_and_gradients(config: RunConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of each micro-batch of the first step, in float32: (k,) losses and (k, *shape) gradients."""
    torch.manual_seed(config.seed)
    task = task_of(config).build(config, torch.device("cpu"), ALONE)
    found: list[float] = []
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name, _ in task.model.named_parameters()}
    for batch in task.micro_batches(0):
        loss = task.loss(batch)
        task.model.zero_grad()
        loss.backward()
        found.append(loss.item())
        for name, param in task.model.named_parameters():
            assert param.grad is not None
            gradients[name].append(param.grad.double())
    return torch.tensor(found, dtype=torch.float64), {name: torch.stack(each) for name, each in gradients.items()}


def test_in_float32_the_first_step_differs_by_the_rounding_of_one_sum(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """A micro-batch's loss and gradient are the same bits wherever it is computed: 2 divides them exactly.

    The mean of k of them passes, in any order, through k - 1 additions and two divisions, of which each is off by
    u = eps / 2 of the sum of magnitudes. AdamW's average, from which the gradient is read here, is one rounding more.
    """
    settings: dict[str, Any] = {
        "optimizer__name": "adamw",
        "training__steps": 1,
        "training__max_grad_norm": 1e9,
    }  # not reached
    settings |= {"training__batch_size": 8, "training__micro_batch_size": 1}
    config = small_config(**settings)
    train(config, tmp_path / "1", reporter)
    shares = small_config(runtime__shard_model=True, **settings)
    carry_out([Job(config, tmp_path / "2"), Job(shares, tmp_path / "2-shares")], 2, tmp_path / "jobs")
    terms, gradients = losses_and_gradients(config)
    share = (len(terms) + 2) * torch.finfo(torch.float32).eps / 2
    assert share < 1e-6
    for run in (tmp_path / name for name in ("1", "2", "2-shares")):
        loss = next(row["loss"] for row in RunFolder(run).rows() if row["split"] == "train")
        assert abs(loss - terms.mean()) <= share * terms.mean(), run
        state = checkpoint_tensors(run, 1)
        for name, each in gradients.items():
            gradient = state[f"optimizer:{name}/exp_avg"].double() / np.float32(1 - 0.9)
            assert ((gradient - each.mean(0)).abs() <= share * each.abs().mean(0)).all(), (run, name)


SHAPES: dict[str, dict[str, Any]] = {
    "alone": {},
    "replicated": {},
    "sharded-optimizer": {"runtime__shard_optimizer": True},
    "sharded-model": {"runtime__shard_model": True},
}
"""Ways to keep a run in memory; all but the first by two processes."""

MOVES = [
    ("alone", "replicated"),
    ("alone", "sharded-optimizer"),
    ("alone", "sharded-model"),
    ("sharded-model", "sharded-optimizer"),
    ("sharded-optimizer", "sharded-model"),
    ("replicated", "alone"),
    ("sharded-optimizer", "alone"),
    ("sharded-model", "alone"),
]


@pytest.fixture(scope="module")
def moved(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs in all ways, and runs that went on from the first third of another way's; in float64."""
    root = tmp_path_factory.mktemp("moves")
    changes = {**SMALL, "data.folder": str(token_folder), "optimizer.name": "asgo", "checkpoint.keep": 9}
    changes |= {"training.ema_decay": 0.5, "evaluation.batches": 1}
    changes |= {"training.max_grad_norm": 100.0}  # not reached: the norm's rounding would come into every gradient
    changes |= {"model.bias": False}  # the gradient of a key's bias is rounding alone, which Adam makes as large as any

    def config(shape: str) -> RunConfig:
        values = {key.replace("__", "."): value for key, value in SHAPES[shape].items()}
        return resolve([preset_layer("gpt", "tiny"), Layer("test", {**changes, **values})])

    with double_precision():
        train(config("alone"), root / "alone", SilentReporter())
    carry_out([Job(config(shape), root / shape, double=True) for shape in SHAPES if shape != "alone"], 2, root / "jobs")
    for before, after in MOVES:
        beginning = shutil.copytree(root / before, root / f"{before}-{after}")
        for step in (4, 6):
            shutil.rmtree(beginning / "checkpoints" / f"step-{step:08d}")
        if after == "alone":
            with double_precision():
                train(config(after), beginning, SilentReporter(), resume=True)
    jobs = [
        Job(config(after), root / f"{before}-{after}", resume=True, double=True)
        for before, after in MOVES
        if after != "alone"
    ]
    carry_out(jobs, 2, root / "jobs")
    return root


def largest_difference(one: Path, other: Path) -> float:
    """Over all tensors of two last checkpoints, which must have the same: the norm of the difference, as a share."""
    mine, its = (
        {name: tensor for name, tensor in checkpoint_tensors(run, 6).items() if not name.startswith("rng")}
        for run in (one, other)
    )
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {
        name: (t.shape, t.dtype) for name, t in its.items()
    }
    return max(float((mine[name] - its[name]).norm() / mine[name].norm().clamp_min(1e-30)) for name in mine)


TWO_PROCESSES = (
    "sharded-optimizer",
    "sharded-model",
    "sharded-model-sharded-optimizer",
    "sharded-optimizer-sharded-model",
)


@pytest.mark.parametrize("run", TWO_PROCESSES)
def test_sharded_runs_equal_replicated_ones(run: str, moved: Path) -> None:
    assert largest_difference(moved / "replicated", moved / run) <= bound(6)
    np.testing.assert_allclose(losses(moved / run), losses(moved / "replicated"), rtol=bound(6))


@pytest.mark.parametrize("run", ["replicated", *("-".join(move) for move in MOVES if "alone" in move)])
def test_checkpoints_move_between_numbers_of_processes(run: str, moved: Path) -> None:
    """The sum over two processes is rounded otherwise, and the roots of these small matrices make more of that."""
    assert largest_difference(moved / "alone", moved / run) <= bound(6)
    np.testing.assert_allclose(losses(moved / run), losses(moved / "alone"), rtol=bound(6))


def test_as_many_processes_go_on_bit_for_bit_and_a_signal_to_one_stops_and_saves_all(
    small_config: Make, tmp_path: Path
) -> None:
    """With dropout, which each process draws by itself."""
    config = small_config(
        model__dropout=0.2, training__steps=60, checkpoint__every=60, evaluation__every=60, metrics__every=1
    )
    carry_out([Job(config, tmp_path / "whole")], 2, tmp_path)
    processes = start([Job(config, tmp_path / "stopped")], 2, tmp_path)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 20:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    processes[1].terminate()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [RunInterrupted.exit_code] * 2
    carry_out([Job(config, tmp_path / "stopped", resume=True)], 2, tmp_path)
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    expected, found = (checkpoint_tensors(tmp_path / run, 60) for run in ("whole", "stopped"))
    assert found.keys() == expected.keys() >= {"rng-0:cpu", "rng-1:cpu"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def be_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts a single process."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**variables, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)


def test_no_replica_outlives_the_process_group(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end gloo's group with Python's lock in its hands: a hang, once in a hundred runs or so."""
    replicas: list[weakref.ref[nn.Module]] = []
    alive_at_the_end: list[bool] = []

    def remembered(model: nn.Module, ranks: Ranks) -> nn.Module:
        network = wrap_in_ddp(model, ranks)
        replicas.append(weakref.ref(network))
        return network

    def watched_end(end: Callable[[], None] = dist.destroy_process_group) -> None:
        alive_at_the_end.extend(replica() is not None for replica in replicas)
        end()

    be_a_group_of_one(monkeypatch)
    monkeypatch.setattr("pipelines.training.train.wrap_in_ddp", remembered)
    monkeypatch.setattr(dist, "destroy_process_group", watched_end)
    train(small_config(), tmp_path / "run", SilentReporter())
    assert alive_at_the_end == [False]


def test_accumulated_gradients_are_added_up_over_the_processes_once_a_step(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buckets: list[torch.Tensor] = []

    def counting(group, bucket):  # type: ignore[no-untyped-def]  (torch refuses annotations that are text)
        buckets.append(bucket.buffer())
        return allreduce_hook(group, bucket)

    def counted(model: nn.Module, ranks: Ranks) -> nn.Module:
        network = wrap_in_ddp(model, ranks)
        assert isinstance(network, DistributedDataParallel)
        network.register_comm_hook(dist.group.WORLD, counting)
        return network

    be_a_group_of_one(monkeypatch)
    monkeypatch.setattr("pipelines.training.train.wrap_in_ddp", counted)
    train(small_config(training__micro_batch_size=1), tmp_path / "run", SilentReporter())
    assert len(buckets) == 6  # steps, of four micro-batches each; a model this small is one bucket


def test_every_validation_sample_is_read_once_and_all_processes_take_as_many_turns() -> None:
    for count, rows, size in ((9, 1, 2), (9, 4, 4), (1, 3, 4), (64, 8, 2)):
        of_rank = [list(rounds(count, rows, Ranks(rank, size))) for rank in range(size)]
        assert len({len(turns) for turns in of_rank}) == 1
        assert sorted(place for turns in of_rank for turn in turns for place in turn) == list(range(count))
        assert max(len(turn) for turns in of_rank for turn in turns) <= rows


def test_a_batch_that_cannot_be_shared_is_refused(small_config: Make) -> None:
    config = small_config(training__batch_size=8, training__micro_batch_size=4)
    assert local_batch(config.training, Ranks(1, 2)).micro_batches == [slice(4, 8)]
    with pytest.raises(UsageError, match=r"batch_size=8 cannot be divided equally among 3 processes"):
        local_batch(config.training, Ranks(0, 3))
    with pytest.raises(UsageError, match=r"micro_batch_size=4 does not divide the 2 samples that each of 4 processes"):
        local_batch(config.training, Ranks(0, 4))
