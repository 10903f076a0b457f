"""One spelling of `NAME:key=value,...` for `asgo train --set`, `asgo viz` and `asgo bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.analysis.optimizer_settings import MATRICES, parse_settings
from pipelines.benchmarks.peers import parse_choice
from pipelines.benchmarks.training import CPU_SIZE
from pipelines.benchmarks.training_workload import TrainingBenchSettings, choose_workload, configure
from pipelines.errors import UsageError
from pipelines.optimizers import parse_value, split_optimizer
from pipelines.resolve import assignment_layer, preset_layer, resolve


@pytest.mark.parametrize(
    ("text", "name", "keywords"),
    [
        ("adam", "adam", {}),
        ("adam:", "adam", {}),
        ("adam:lr=0.1", "adam", {"lr": "0.1"}),
        ("adam:lr=0.1, eps=1e-4", "adam", {"lr": "0.1", "eps": "1e-4"}),
        ("adam:betas=0.8,0.9,lr=1", "adam", {"betas": "0.8,0.9", "lr": "1"}),
        ("adam:betas=[0.8, 0.9],lr=1", "adam", {"betas": "[0.8, 0.9]", "lr": "1"}),
    ],
)
def test_a_name_and_its_keywords_are_taken_apart(text: str, name: str, keywords: dict[str, str]) -> None:
    assert split_optimizer(text) == (name, keywords)


def test_what_is_not_key_and_value_is_refused() -> None:
    with pytest.raises(ValueError, match="'lr' is not key=value"):
        split_optimizer("adam:lr")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("1e-3", 1e-3), (".5", 0.5), ("5.", 5.0), ("-.5e-3", -0.5e-3), ("inf", float("inf")),
        ("true", True), ("True", True), ("False", False), ("TRUE", "TRUE"),
        ("0.9,0.95", [0.9, 0.95]), ("[0.9, 0.95]", [0.9, 0.95]), ("(0.9, .95)", [0.9, 0.95]), ("[.9, 1]", [0.9, 1]),
        ('"eigh"', "eigh"), ("eigh", "eigh"), ("a,b", "a,b"), ("0.9,b", "0.9,b"), ("data/1,2/x", "data/1,2/x"),
        ("", ""), (",", ","), ("[" * 500 + ",", "[" * 500 + ","), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_values_are_toml_or_pythons(text: str, value: object) -> None:
    found = parse_value(text)
    assert (type(found), found) == (type(value), value)


def trained(name: str, key: str, value: str) -> Any:
    layers = [preset_layer("gpt", "tiny"), assignment_layer([f"optimizer.name={name}", f"optimizer.{key}={value}"])]
    return resolve(layers).optimizer_keywords()[key]


def drawn(name: str, key: str, value: str) -> Any:
    return parse_settings(f"{name}:{key}={value}", MATRICES).keywords[key]


def benched(name: str, key: str, value: str) -> Any:
    return parse_choice(f"{name}:lr=0.1,{key}={value}").keywords[key]


def benched_in_training(name: str, key: str, value: str) -> Any:
    settings = TrainingBenchSettings(model="tiny")
    config = configure(choose_workload(settings, CPU_SIZE), settings, f"{name}:{key}={value}", Path("data"), False)
    return config.optimizer_keywords()[key]


@pytest.mark.parametrize("command", [trained, drawn, benched, benched_in_training])
@pytest.mark.parametrize(
    ("name", "key", "texts", "value"),
    [
        ("adam", "betas", ("0.9,0.95", "[0.9, 0.95]", "(0.9, 0.95)", ".9,.95"), (0.9, 0.95)),
        ("muon", "nesterov", ("true", "True"), True),
        ("muon", "nesterov", ("false", "False"), False),
        ("asgo", "lr", ("0.5", ".5", "5e-1"), 0.5),
        ("asgo", "root_steps", ("7",), 7),
        ("asgo", "root_method", ("eigh", '"eigh"'), "eigh"),
    ],
)
def test_every_command_takes_every_spelling(
    command: Any, name: str, key: str, texts: tuple[str, ...], value: object
) -> None:
    for text in texts:
        found = command(name, key, text)
        assert (type(found), found) == (type(value), value), text


def test_a_list_of_a_wrong_length_is_refused_by_each() -> None:
    for command in (trained, drawn, benched, benched_in_training):
        for text in ("0.9", "[0.9, 0.95, 0.99]"):
            with pytest.raises(UsageError, match="betas"):
                command("asro", "betas", text)
