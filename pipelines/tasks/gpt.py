"""Pretraining of decoders on token shards."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tasks.description import TaskDescription

if TYPE_CHECKING:
    import torch

    from pipelines.config import GPTRunConfig
    from pipelines.training.checkpoint import Checkpoint
    from pipelines.training.distributed import Ranks
    from pipelines.training.task import Task


def _open_data(folder: Path) -> object:
    from pipelines.data.batches import open_token_data

    return open_token_data(folder)


def _build(config: GPTRunConfig, device: torch.device, ranks: Ranks) -> Task:
    from pipelines.training.gpt_task import GPTTask

    return GPTTask(config, device, ranks)


def _length(config: GPTRunConfig) -> Fraction:
    training = config.training
    if training.tokens is not None:
        return Fraction(training.tokens)
    from pipelines.data.batches import vocab_size_of
    from pipelines.training.gpt_task import count_parameters

    parameters = count_parameters(config.model, vocab_size_of(Path(config.data.folder)))
    return Fraction(str(training.tokens_per_parameter)) * parameters


def _export_to_hugging_face(checkpoint: Checkpoint, config: GPTRunConfig, folder: Path, out: Path) -> str:
    from pipelines.exchange.hf_export import write_hf

    return write_hf(checkpoint, config, folder, out)


GPT = TaskDescription(
    name="gpt",
    summary="Pretrain a GPT on token shards.",
    examples=(
        "asgo train gpt --preset tiny --data data/text --optimizer asgo",
        "asgo train gpt --resume --out runs/tiny-asgo-s42",
        "asgo train gpt --branch runs/tiny-asgo-s42@120 --out runs/longer --steps 320",
        "asgo train gpt --optimizer accasro --gpus 4",
        "asgo train gpt --preset tiny --data data/text --set schedule.kind=linear",
        "asgo train gpt --preset tiny --print-config    # all keys for --set",
    ),
    model="a GPT",
    unit="tokens",
    short_unit="tok",
    samples="Sequences",
    data="Token shards, made by `asgo data`",
    presets=("asro-gpt", "asgo-gpt2", "asgo-nanogpt", "llama-130m", "track3", "track3-small", "llama-tiny", "tiny"),
    options=frozenset({"init_from"}),
    open_data=_open_data,
    build=_build,
    units_per_sample=lambda config: config.model.context_length,
    length=_length,
    exporters={"hf": _export_to_hugging_face},
    writes_text=True,
)
