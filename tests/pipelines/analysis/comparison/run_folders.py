"""Run folders with given losses, written by the parts that training writes them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig
from pipelines.resolve import Layer, preset_layer
from pipelines.steps import resolve_run
from pipelines.training.lineage import Ancestor
from pipelines.training.metrics import Row
from pipelines.training.run_folder import Divergence, RunFolder

PRESETS = {"gpt": "tiny", "images": "asro-imagenet"}


def config_of(task: str = "gpt", **settings: Any) -> RunConfig:
    """The preset's configuration; keywords are dotted keys with `__` for the dot."""
    values = {key.replace("__", "."): value for key, value in settings.items()}
    return resolve_run([preset_layer(task, PRESETS[task]), Layer("test", values)])


def write_run(
    path: Path,
    val: Mapping[int, float],
    train: Sequence[float] = (),
    *,
    task: str = "gpt",
    optimizer: str = "adamw",
    data: str = "0123456789",
    device: str = "cpu",
    seconds_a_step: float = 0.5,
    lineage: Sequence[Ancestor] = (),
    accuracy: Mapping[int, float] | None = None,
    **settings: Any,
) -> RunFolder:
    """A run with validation losses by step, and the training losses of the steps 1, 2, ...

    On images, `accuracy` is that of validations, by step, and of the training steps before the next one.
    """
    config = config_of(task, optimizer__name=optimizer, **settings)
    folder = RunFolder(path)
    folder.begin(config, {"fingerprint": data}, device, lineage)
    folder.continue_from(rows_of(config, val, train, seconds_a_step, accuracy))
    folder.close()
    return folder


def rows_of(
    config: RunConfig,
    val: Mapping[int, float],
    train: Sequence[float],
    seconds_a_step: float,
    accuracy: Mapping[int, float] | None = None,
) -> list[Row]:
    """The records of a run, in the order of training."""
    rows: list[Row] = []
    images = config.task == "images"
    more: dict[str, Any] = {"accuracy": 0.25} if images else {}
    for step in range(max([len(train), *val]) + 1):
        samples = step * config.training.batch_size
        counts: dict[str, Any] = {
            "step": step, "tokens": samples * 128, "samples": samples, "epoch": step / 1e3,
            "elapsed_s": step * seconds_a_step,
        }  # fmt: skip
        if images and accuracy and step in accuracy:
            more = {"accuracy": accuracy[step]}
        if 1 <= step <= len(train):
            rows.append(Row(**counts, split="train", loss=train[step - 1], lr=0.001, step_ms=500.0 + step,
                            optimizer_ms=20.0 + step, throughput=1e4, **more))  # fmt: skip
        if step in val:
            rows.append(Row(**counts, split="val", loss=val[step], **more))
    return rows


def falling_to(final: float, steps: int = 160) -> dict[int, float]:
    """Validation losses of a run of the preset that ends at `final`."""
    return {0: 5.0, steps // 2: (5.0 + final) / 2, steps: final}


def record_divergence(folder: RunFolder, step: int, reason: str) -> None:
    """As a run does that diverges, which holds the folder."""
    folder.lock()
    folder.record_divergence(Divergence(step, reason))
    folder.close()
