"""A sweep's file becomes the configurations that `asgo train` would make, or a line for every problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import GPTRunConfig
from pipelines.errors import UsageError
from pipelines.resolve import assignment_layer, preset_layer, resolve
from pipelines.sweeps.definition import SweepRun, read_sweep, resolve_runs, sweep_names
from pipelines.training.schedule import factor_at


def runs_of(source: str | Path, *assignments: str, seeds: tuple[int, ...] = ()) -> list[SweepRun]:
    return resolve_runs(read_sweep(str(source)), assignment_layer(assignments), seeds)


def problems_of(source: str | Path, *assignments: str) -> list[str]:
    with pytest.raises(UsageError) as error:
        runs_of(source, *assignments)
    return str(error.value).splitlines()


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(text: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


def schedule_of(run: SweepRun) -> tuple[str, float, float]:
    """Kind, first and last learning rate, as the paper's table has them."""
    config = run.config
    lr = config.optimizer.lr
    last = lr if config.schedule.kind == "constant" else lr * config.schedule.final_lr_fraction
    return config.schedule.kind, lr, pytest.approx(last, rel=1e-12)


def scales_of(run: SweepRun) -> dict[str, Any]:
    """Of Asro and AccAsro: where the rate begins, and what bounds and moves it."""
    settings = run.config.optimizer_keywords()
    return {
        "start": settings["lr"],
        "min": pytest.approx(settings["lr"] * settings["min_scale"], rel=1e-12),
        "max": pytest.approx(settings["lr"] * settings.get("max_scale", 1.0), rel=1e-12),
        **{key: settings[key] for key in ("decrement", "increment") if key in settings},
    }


def test_the_eight_runs_of_the_papers_language_model() -> None:
    runs = {run.variant: run for run in runs_of("asro-gpt-paper")}
    assert {name: schedule_of(run) for name, run in runs.items()} == {
        "adam-constant-7.5e-5": ("constant", 7.5e-5, 7.5e-5),
        "adam-constant-1e-3": ("constant", 1e-3, 1e-3),
        "adam-cosine-7.5e-5": ("cosine", 7.5e-5, 1e-5),
        "adam-cosine-1e-3": ("cosine", 1e-3, 1e-5),
        "accasro": ("constant", 7.5e-5, 7.5e-5),
        "asro": ("constant", 1e-3, 1e-3),
        "radam-cosine-1e-4": ("cosine", 1e-4, 1e-5),
        "amsgrad-cosine-1e-4": ("cosine", 1e-4, 1e-5),
    }
    assert all(name.startswith(run.config.optimizer.name) for name, run in runs.items())
    accasro = {"start": 7.5e-5, "min": 1e-5, "max": 1e-3, "decrement": 2e-4, "increment": 5e-2}
    assert scales_of(runs["accasro"]) == accasro
    assert scales_of(runs["asro"]) == {"start": 1e-3, "min": 1e-5, "max": 1e-3, "decrement": 2e-4}
    for run in runs.values():
        training = run.config.training
        assert (training.steps, training.batch_size, run.tokens_per_sample) == (48_005, 40, 512)
        assert (run.config.schedule.warmup_steps, training.max_grad_norm) == (2, None)
        keywords = run.config.optimizer_keywords()
        assert (keywords["betas"], keywords["weight_decay"]) == ((0.9, 0.95), 0.0)


def test_the_eight_runs_of_the_papers_image_classifier() -> None:
    runs = {run.variant: run for run in runs_of("asro-imagenet-paper")}
    assert {name: schedule_of(run) for name, run in runs.items()} == {
        "adam-constant-1e-3": ("constant", 1e-3, 1e-3),
        "adam-constant-2.5e-4": ("constant", 2.5e-4, 2.5e-4),
        "adam-cosine-1e-3": ("cosine", 1e-3, 1e-5),
        "adam-cosine-2.5e-4": ("cosine", 2.5e-4, 1e-5),
        "accasro": ("constant", 2.5e-4, 2.5e-4),
        "asro": ("constant", 1e-3, 1e-3),
        "amsgrad-cosine-1e-3": ("cosine", 1e-3, 1e-5),
        "radam-cosine-1e-3": ("cosine", 1e-3, 1e-5),
    }
    assert all(name.startswith(run.config.optimizer.name) for name, run in runs.items())
    accasro = {"start": 2.5e-4, "min": 1e-5, "max": 1e-3, "decrement": 7.5e-5, "increment": 2e-2}
    assert scales_of(runs["accasro"]) == accasro
    assert scales_of(runs["asro"]) == {"start": 1e-3, "min": 1e-5, "max": 1e-3, "decrement": 7.5e-5}
    for run in runs.values():
        training = run.config.training
        assert (training.steps, training.batch_size) == (305_305, 256)
        keywords = run.config.optimizer_keywords()
        assert (keywords["betas"], keywords["weight_decay"]) == ((0.9, 0.999), 0.0)


@pytest.mark.parametrize(
    ("name", "width", "batch_size"), [("asgo-nanogpt-paper", 384, 32 * 8), ("asgo-gpt2-paper", 768, 32 * 8 * 4)]
)
def test_the_five_optimizers_of_the_asgo_paper(name: str, width: int, batch_size: int) -> None:
    runs = runs_of(name)
    rates = {"asgo": 1e-2, "dasgo": 1e-2, "muon": 1e-2, "shampoo": 5e-3, "adamw": 1e-2}
    assert {run.variant: run.config.optimizer.lr for run in runs} == rates
    for run in runs:
        config = run.config
        assert run.variant == config.optimizer.name
        assert (config.seed, config.training.steps, config.training.batch_size) == (42, 2_400, batch_size)
        assert isinstance(config, GPTRunConfig)
        assert (config.model.bias, config.model.tied_head) == (True, True)
        assert config.optimizer.no_decay == ("embeddings", "head")
        assert (config.training.max_grad_norm, config.model.model_dump()["d_model"]) == (1.0, width)
        assert (config.schedule.kind, config.schedule.warmup_fraction) == ("cosine", 0.1)
        assert config.schedule.final_lr_fraction == 0.02
        assert factor_at(config.schedule, 0, 2_400) == pytest.approx(1 / 240)


@pytest.mark.parametrize("name", [name for name in sweep_names() if name.endswith("-paper")])
def test_the_papers_runs_are_trained_in_float32(name: str) -> None:
    assert {run.config.training.precision for run in runs_of(name)} == {"fp32"}


@pytest.mark.parametrize("name", sweep_names())
def test_every_shipped_sweep_resolves(name: str) -> None:
    assert len(runs_of(name)) >= 5


def test_a_run_is_what_train_makes_of_the_same_settings(write) -> None:  # type: ignore[no-untyped-def]
    path = write(
        """
        task = "gpt"
        preset = "tiny"
        training.steps = 9
        optimizers.muon.momentum = 0.5
        [[runs]]
        name = "a"
        optimizer = { name = "muon", lr = 0.25 }
        """
    )
    (run,) = runs_of(path, "training.batch_size=2", seeds=(7,))
    asked = ["training.steps=9", "training.batch_size=2", "optimizer.name=muon", "optimizer.lr=0.25"]
    asked += ["optimizer.momentum=0.5", "seed=7"]
    assert run.config == resolve([preset_layer("gpt", "tiny"), assignment_layer(asked)])
    assert run.name == "a-s7"


def test_a_grid_is_every_combination_of_each_run_and_seed(write) -> None:  # type: ignore[no-untyped-def]
    path = write(
        """
        task = "gpt"
        preset = "tiny"
        seeds = [1, 2]
        [grid]
        optimizer.name = ["asgo", "adamw"]
        "optimizer.lr" = [1e-2, 1e-3]
        [[runs]]
        name = "small"
        [[runs]]
        name = "wide"
        model.d_model = 256
        """
    )
    runs = runs_of(path)
    assert len(runs) == len({run.name for run in runs}) == 16
    assert runs[0].name == "small-asgo-lr0.01-s1", "a seed of every run before the next seed"
    assert [run.config.seed for run in runs] == [1] * 8 + [2] * 8
    (wide,) = [run.config for run in runs if run.name == "wide-adamw-lr0.001-s2"]
    assert (wide.optimizer.name, wide.optimizer.lr, wide.model.model_dump()["d_model"]) == ("adamw", 1e-3, 256)
    assert {run.config.seed for run in runs_of(path, seeds=(5,))} == {5}


def test_all_problems_of_all_runs_are_told_at_once_with_their_names(write) -> None:  # type: ignore[no-untyped-def]
    path = write(
        """
        task = "gpt"
        preset = "tiny"
        training.stepps = 9
        [[runs]]
        name = "a"
        optimizer.name = "asgoo"
        [[runs]]
        name = "b"
        optimizer.lr = -1
        [[runs]]
        name = "c"
        """
    )
    assert problems_of(path) == [
        f"run a: {path}: unknown optimizer 'asgoo'; did you mean 'asgo'?",
        f"{path}: training.stepps: unknown key; did you mean 'steps'?",
        f"run b: {path}: optimizer.lr = -1: should be greater than or equal to 0",
    ]


def test_all_that_is_wrong_in_the_shape_of_a_file_is_told_at_once(write) -> None:  # type: ignore[no-untyped-def]
    path = write(
        """
        task = "gtp"
        seed = 3
        seeds = [1, true]
        grid.optimizer.lr = 0.1
        grid.schedule = [{ kind = "constant" }]
        [[runs]]
        name = "../a"
        [[runs]]
        name = "b"
        seed = 4
        [[runs]]
        name = "b"
        """
    )
    problems = problems_of(path)
    parts = [
        "task is 'gtp'", "seeds is [1, True]", "grid: optimizer.lr is 0.1", "grid: schedule is",
        "run 1: name is '../a'",
        "run 3: another run already has the name 'b'", "file: seed: list them", "run b: seed: list them",
    ]  # fmt: skip
    for part in parts:
        assert sum(part in line for line in problems) == 1, part
    assert problems_of(write('task = "gpt"\npreset = "tiny"\n')) == [
        f"{path}: nothing to run: add tables [[runs]] with a name and settings, or a [grid] with lists of values"
    ]
    stray = problems_of(write('task = "gpt"\npreset = "tiny"\ngrid = 3\n[runs.a]\nx = 1\n'))
    assert [line.split(": ")[1] for line in stray[:2]] == ["grid", "runs.a.x"]
    assert "preset is 'tny': choose one of" in problems_of(write('task = "gpt"\npreset = "tny"\n'))[0]
    misspelt = problems_of(write('task = "gpt"\npreset = "tiny"\ngird.lr = [1]\n[[run]]\nname = "a"\n'))
    assert misspelt == [
        f"{path}: gird: unknown key; did you mean 'grid'?",
        f"{path}: run: unknown key; did you mean 'runs'?",
    ]
    long = problems_of(write(f'task = "gpt"\npreset = "tiny"\n[[runs]]\nname = "{"a" * 201}"\n'))
    assert long == [f"{path}: run {'a' * 40}...: the name has 201 characters; the maximum is 200"]
    assert problems_of("asro-gpt-papr") == ["unknown sweep 'asro-gpt-papr'; did you mean 'asro-gpt-paper'?"]
    assert problems_of("xyz")[0].endswith("; or give a FILE.toml")


def test_what_names_the_runs_cannot_be_set_for_all(write) -> None:  # type: ignore[no-untyped-def]
    path = write(
        """
        task = "gpt"
        preset = "tiny"
        [grid]
        optimizer.lr = [0.1, 0.2]
        [[runs]]
        name = "a"
        """
    )
    first, second = problems_of(path, "optimizer.lr=3", "seed=1")
    assert "--set optimizer.lr: the sweep sets it for each run (a-lr0.1, a-lr0.2)" in first
    assert "--set seed: give --seeds" in second
    path.write_text(path.read_text() + "optimizer.lr = 0.3\n", encoding="utf-8")
    assert problems_of(path) == [f"{path}: run a: optimizer.lr is set, but the grid varies it"]


def test_a_grid_of_billions_of_runs_is_one_line(write) -> None:  # type: ignore[no-untyped-def]
    grid = "".join(f"[grid.{table}]\n{key} = [{', '.join(map(str, range(1, 101)))}]\n" for table, key in KEYS)
    (problem,) = problems_of(write(f'task = "gpt"\npreset = "tiny"\n{grid}'))
    assert problem.endswith(f"grid: makes {100 ** len(KEYS):,} runs; the maximum is 10,000")


KEYS = (
    ("training", "steps"),
    ("evaluation", "every"),
    ("checkpoint", "every"),
    ("metrics", "every"),
    ("model", "d_ff"),
)
