"""Data and configurations that several tests share."""

from __future__ import annotations

import gc
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from pipelines.compiler_cache import separate_instruction_sets
from pipelines.config import RunConfig
from pipelines.data import child
from pipelines.data.text_to_shards import prepare_text
from pipelines.resolve import Layer, preset_layer, resolve
from tests import forks

if "HYPOTHESIS_STORAGE_DIRECTORY" not in os.environ:  # else it leaves its tables in the working tree
    _hypothesis = tempfile.TemporaryDirectory(prefix="asgo-hypothesis-")
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = _hypothesis.name
torch.set_num_threads(1)
separate_instruction_sets()
for _number in (signal.SIGHUP, signal.SIGINT):
    # Ignored under nohup, and in the background of a shell script: commands that tests start would ignore it too.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)  # a handler is not inherited


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Keep `gc.collect` from visiting the million objects of all imported modules, for half a second each time."""
    gc.collect()
    gc.freeze()


WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "all", "was", "well", "with", "its", "tail")

SMALL: dict[str, Any] = {
    "model.context_length": 16,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.d_model": 16,
    "model.d_ff": 32,
    "training.steps": 6,
    "training.batch_size": 4,
    "evaluation.every": 3,
    "evaluation.batches": 2,
    "checkpoint.every": 2,
    "runtime.device": "cpu",
}
"""The preset `tiny`, made so small that a run takes a tenth of a second."""


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of character shards of about 12,000 tokens of English words."""
    folder = tmp_path_factory.mktemp("tokens")
    words = random.Random(0).choices(WORDS, k=3000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    prepare_text([folder / "text.txt"], folder / "data", tokenizer="chars", val_fraction=0.1)
    return folder / "data"


@pytest.fixture
def small_config(token_folder: Path) -> Callable[..., RunConfig]:
    """Make the configuration of a small run; keywords are dotted keys with `__` for the dot."""

    def make(**changes: Any) -> RunConfig:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        layer = Layer("test", {**SMALL, "data.folder": str(token_folder), **values})
        return resolve([preset_layer("gpt", "tiny"), layer])

    return make


@pytest.fixture(scope="module")
def forked_children() -> Iterator[None]:
    """Fork the processes that read, tokenize and decode, which otherwise import for seconds when they start."""
    with mock.patch.object(child, "multiprocessing", SimpleNamespace(get_context=lambda _: forks.server())):
        yield


class SilentReporter:
    """Keeps the notes of a run and shows nothing."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def begin(self, first_step: int, last_step: int) -> None: ...

    def trained(self, row: object) -> None: ...

    def validated(self, row: object) -> None: ...

    def hung(self, message: str) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def reporter() -> SilentReporter:
    """A reporter that shows nothing."""
    return SilentReporter()
