"""Processes that start in milliseconds: forks of a server process, which has loaded torch once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# There is one server for all tests, and so one list of what it loads: what the launcher loads, before torch as there;
# what torch and a run load late; and a library that need not be installed, which is then left out.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "asgo_cli.supervisor", "torch._dynamo", "torch.distributed.fsdp", "pipelines.training.train",
        "pipelines.training.gpt_task", "pipelines.training.image_task", "pipelines.data.corpus.corpus_to_shards",
        "datasets", "tiktoken", "pytorch_optimizer", "tests.conftest",
    ]
)  # fmt: skip


def server() -> ForkServerContext:
    """Start the server where it finds `tests`. Its forks begin in the directory of whoever starts them."""
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()
    return context


def start(
    target: Callable[..., object], *arguments: Any, output: Path | None = None, variables: Mapping[str, str] = {}
) -> BaseProcess:
    """Start `target(*arguments)` in a process with the environment `variables`, which prints to the file `output`."""
    process = server().Process(target=_run, args=(target, arguments, output, dict(variables)))
    process.start()
    return process


def _run(
    target: Callable[..., object], arguments: tuple[Any, ...], output: Path | None, variables: dict[str, str]
) -> None:
    os.environ.update(variables)
    if output is not None:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    target(*arguments)
