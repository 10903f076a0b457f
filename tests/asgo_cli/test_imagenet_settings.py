"""The commands in docs/imagenet.md train with the settings of the Asro paper."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from asgo_cli import train

DOCS = Path(__file__).parents[2] / "docs" / "imagenet.md"

PAPER = [
    ("adam", {"start": 1e-3, "end": 1e-3, "schedule": "constant"}),
    ("adam", {"start": 2.5e-4, "end": 2.5e-4, "schedule": "constant"}),
    ("adam", {"start": 1e-3, "end": 1e-5, "schedule": "cosine"}),
    ("adam", {"start": 2.5e-4, "end": 1e-5, "schedule": "cosine"}),
    ("accasro", {"start": 2.5e-4, "most": 1e-3, "least": 1e-5, "decrement": 7.5e-5, "increment": 2e-2}),
    ("asro", {"start": 1e-3, "least": 1e-5, "decrement": 7.5e-5}),
    ("amsgrad", {"start": 1e-3, "end": 1e-5, "schedule": "cosine"}),
    ("radam", {"start": 1e-3, "end": 1e-5, "schedule": "cosine"}),
]
"""In the order of the table: the optimizers and their learning rates. Those of Asro and AccAsro go their own way."""


def printed_config(command: str) -> dict[str, Any]:
    result = CliRunner().invoke(train.app, [*command.split(), "--print-config"])
    assert result.exit_code == 0, result.output
    return tomllib.loads(result.stdout)


def learning_rates(config: dict[str, Any]) -> dict[str, Any]:
    optimizer, schedule = config["optimizer"], config["schedule"]
    start = optimizer["lr"]
    if optimizer["name"] in ("asro", "accasro"):
        assert (schedule["kind"], schedule["warmup_steps"]) == ("constant", 2)
        scales = {"most": "max_scale", "least": "min_scale"}
        bounds = {name: start * optimizer[key] for name, key in scales.items() if key in optimizer}
        return {"start": start, **bounds, **{key: optimizer[key] for key in optimizer if key.endswith("crement")}}
    end = start if schedule["kind"] == "constant" else start * schedule["final_lr_fraction"]
    return {"start": start, "end": end, "schedule": schedule["kind"]}


def test_the_table_has_the_papers_eight_settings() -> None:
    table = DOCS.read_text(encoding="utf-8").partition("eight settings\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^\| .+ \| `asgo train (imagenet .+)` \|$", table, re.MULTILINE)
    configs = [printed_config(command) for command in commands]
    assert [config["optimizer"]["name"] for config in configs] == [name for name, _ in PAPER]
    for config, (_, rates) in zip(configs, PAPER, strict=True):
        assert learning_rates(config) == {
            name: rate if isinstance(rate, str) else pytest.approx(rate, rel=1e-12) for name, rate in rates.items()
        }
        assert (config["optimizer"]["betas"], config["optimizer"]["weight_decay"]) == ([0.9, 0.999], 0.0)
        assert (config["model"]["name"], config["data"]["resolution"]) == ("efficientnet_b1", 208)
        assert (config["training"]["batch_size"], config["training"]["steps"]) == (256, 305_305)
    outs = [command.partition("--out ")[2] or command for command in commands]
    assert len(set(outs)) == len(outs), "two runs in one folder"
