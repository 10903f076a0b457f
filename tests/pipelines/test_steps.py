"""The length of a run in tokens, epochs or tokens per parameter becomes `training.steps`; one amount of validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import GPTRunConfig, RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.resolve import Layer, assignment_layer, preset_layer, resolve, saved_layer
from pipelines.steps import resolve_run
from pipelines.sweeps.definition import read_sweep, resolve_runs
from pipelines.training.gpt_task import count_parameters
from pipelines.training.train import plan, train
from tests.conftest import SMALL, SilentReporter

TINY = preset_layer("gpt", "tiny")
A_STEP = 16 * 128
"""Tokens in a step of the preset."""


def steps_of(*layers: Layer) -> int:
    return resolve_run([TINY, *layers]).training.steps


def given(source: str = "here", **values: Any) -> Layer:
    return Layer(source, {f"training.{key}": value for key, value in values.items()})


@pytest.mark.parametrize(
    ("tokens", "steps"), [(1, 1), (A_STEP, 1), (A_STEP + 1, 2), (10 * A_STEP, 10), (10**15, 488_281_250_000)]
)
def test_tokens_are_rounded_up_to_steps_without_any_data(tokens: int, steps: int) -> None:
    assert steps_of(given(tokens=tokens), Layer("data", {"data.folder": "nowhere"})) == steps
    assert steps_of(given(tokens=tokens), given("--batch-size", batch_size=8), given(steps=1)) == 1
    assert steps_of(given(tokens=9 * A_STEP), Layer("--set", {"model.context_length": 64})) == 18


@pytest.mark.parametrize("model", [{}, {"model.tied_head": False}, {"model.bias": False, "model.vocab_multiple": 64}])
def test_tokens_per_parameter_count_the_parameters_of_the_dry_run(model: dict[str, Any], token_folder: Path) -> None:
    small = {key: value for key, value in SMALL.items() if key != "training.steps"}
    layer = Layer("test", {**small, **model, "data.folder": str(token_folder), "training.tokens_per_parameter": 20})
    config = resolve_run([TINY, layer])
    assert isinstance(config, GPTRunConfig)
    parameters = plan(config).parameters
    assert config.training.steps == -(-20 * parameters // (4 * 16))
    vocabulary = json.loads((token_folder / "manifest.json").read_text())["tokenizer"]["alphabet"]
    assert count_parameters(config.model, len(vocabulary) + 1) == parameters


def test_the_highest_layer_that_gives_a_length_replaces_all_others() -> None:
    file, flag = given("my.toml", tokens=5 * A_STEP), given("--steps", steps=3)
    assert steps_of() == 160
    assert steps_of(file) == 5
    assert steps_of(file, flag) == 3
    assert steps_of(flag, file) == 5
    assert steps_of(given(tokens_per_parameter=1), flag, given(tokens=7 * A_STEP)) == 7
    assert steps_of(given(tokens=-1, batch_size=2), flag) == 3, "a setting that is replaced is not read"


def test_steps_are_all_that_the_rest_of_the_program_sees() -> None:
    config = resolve_run([TINY, given(tokens=5 * A_STEP)])
    assert config == resolve([TINY, given(steps=5)])
    assert "tokens" not in config.training.model_dump_json()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 3, "tokens": 3}, "here: give one of training.steps and training.tokens"),
        ({"tokens": 0}, "here: training.tokens = 0: should be greater than 0"),
        ({"tokens": "many"}, "here: training.tokens = 'many': should be a valid integer"),
        (
            {"tokens": 10**18},
            "here: training.tokens: makes 488,281,250,000,000 steps; the maximum is 1,000,000,000,000",
        ),
        ({"tokens_per_parameter": 1e300}, "here: training.tokens_per_parameter = 1e+300: should be less than or equal"),
        ({"epochs": 3}, "here: training.epochs: unknown key; known: steps, "),
        ({"token": 3}, "here: training.token: unknown key; did you mean 'tokens'?"),
    ],
)
def test_a_length_that_cannot_be_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        steps_of(given(**values))
    (line,) = str(error.value).splitlines()
    assert line.startswith(message)


def test_the_validation_is_in_batches_or_in_tokens_as_the_highest_layer_says() -> None:
    tokens, batches = (Layer("here", {f"evaluation.{key}": value}) for key, value in (("tokens", 512), ("batches", 3)))
    config = resolve_run([TINY, batches, tokens])
    assert isinstance(config, GPTRunConfig)
    assert (config.evaluation.batches, config.evaluation.tokens, config.validation_samples) == (None, 512, 4)
    assert resolve_run([TINY, tokens, batches]).validation_samples == 3 * 16


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (
            "gpt",
            {"evaluation.batches": 3, "evaluation.tokens": 512},
            "here: give one of evaluation.batches and evaluation.tokens",
        ),
        (
            "gpt",
            {"evaluation.tokens": 500},
            "configuration: evaluation.tokens=500 is not a multiple of model.context_length=128",
        ),
        ("gpt", {"evaluation.tokens": 0}, "here: evaluation.tokens = 0: should be greater than 0"),
        ("gpt", {"data.order": "random"}, "here: data.order = 'random': should be 'shuffled' or 'sequential'"),
        ("images", {"evaluation.tokens": 512}, "here: evaluation.tokens: unknown key; known: every, batches"),
        ("images", {"data.order": "sequential"}, "here: data.order: unknown key"),
    ],
)
def test_an_amount_of_validation_or_an_order_that_cannot_be_is_one_line(
    task: str, values: dict[str, Any], message: str
) -> None:
    preset = TINY if task == "gpt" else preset_layer("images", "asro-imagenet")
    with pytest.raises(UsageError) as error:
        resolve_run([preset, Layer("here", values)])
    (line,) = str(error.value).splitlines()
    assert line.startswith(message)


def test_data_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    by_data = given(tokens_per_parameter=1.0)
    with pytest.raises(UsageError, match=r"none: no such data folder; make it with: asgo data text"):
        steps_of(by_data, Layer("data", {"data.folder": str(tmp_path / "none")}))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(AsgoError, match=r"manifest\.json: damaged"):
        steps_of(by_data, Layer("data", {"data.folder": str(tmp_path)}))


def test_a_resumed_run_keeps_its_steps(token_folder: Path, tmp_path: Path, reporter: SilentReporter) -> None:
    small = {key: value for key, value in SMALL.items() if key != "training.steps"}
    begun = Layer("test", {**small, "data.folder": str(token_folder), "training.tokens": 5 * 64 - 1})
    config = resolve_run([TINY, begun])
    assert train(config, tmp_path / "run", reporter)[-1]["step"] == 5
    saved = saved_layer(tmp_path / "run", None)
    assert saved is not None
    assert resolve_run([saved]) == config
    assert saved.values["training.steps"] == 5
    assert "training.tokens" not in saved.values


def sweep_of(tmp_path: Path, text: str, *assignments: str) -> list[RunConfig]:
    (tmp_path / "my.toml").write_text(f'task = "gpt"\npreset = "tiny"\n{text}')
    runs = resolve_runs(read_sweep(str(tmp_path / "my.toml")), assignment_layer(assignments))
    return [run.config for run in runs]


def test_a_sweep_gives_each_run_its_length(tmp_path: Path) -> None:
    tokens = "[training]\ntokens = 20_480\n"
    runs = '[[runs]]\nname = "a"\n[[runs]]\nname = "b"\ntraining.steps = 3\n'
    assert [config.training.steps for config in sweep_of(tmp_path, tokens + runs)] == [10, 3]
    grid = "[grid]\ntraining.batch_size = [8, 16, 32]\n"
    assert [config.training.steps for config in sweep_of(tmp_path, tokens + grid)] == [20, 10, 5]
    assert [config.training.steps for config in sweep_of(tmp_path, tokens + grid, "training.steps=4")] == [4, 4, 4]
    with pytest.raises(UsageError, match=r"--set training\.tokens: the sweep sets it for each run \(b\)"):
        sweep_of(tmp_path, tokens + runs, "training.tokens=5")
    with pytest.raises(UsageError, match=r"--set evaluation\.tokens: the sweep sets it for each run \(batches2, b"):
        sweep_of(tmp_path, "[grid]\nevaluation.batches = [2, 4]\n", "evaluation.tokens=128")
