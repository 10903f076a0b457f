"""Model and batch of a training benchmark, and the configuration of each run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.config import GPTRunConfig
from pipelines.data.tokenizers import BytesTokenizer, CharsTokenizer, Gpt2Tokenizer, Tokenizer
from pipelines.errors import UsageError
from pipelines.optimizers import split_optimizer
from pipelines.resolve import Layer, assignment_layer, preset_layer
from pipelines.steps import resolve_run
from pipelines.training.distributed import largest_divisor

DEFAULT_OPTIMIZERS = ("adamw", "accasro", "muon", "asgo")

_PRESETS = {"gpt2": "asgo-gpt2", "asro-gpt": "asro-gpt", "nanogpt": "asgo-nanogpt", "tiny": "tiny"}
"""Presets by model."""
MODEL_NAMES = tuple(_PRESETS)
_TOKENIZERS: dict[str, Tokenizer] = {
    "asgo-nanogpt": CharsTokenizer("".join(map(chr, range(32, 32 + 65)))),  # only the number matters: Shakespeare's
    **dict.fromkeys(("tiny", "llama-tiny", "track3-small"), BytesTokenizer()),
}
"""Tokenizers of presets whose data are not GPT-2 tokens."""
_CONTEXT_LENGTHS = {"gpt2": 1024}  # GPT-2's own; the preset has a shorter one


@dataclass(frozen=True)
class DefaultSize:
    """The default model, and the default tokens per step and per micro-batch of any model."""

    model: str
    tokens: int
    micro_batch_tokens: int


GPU_SIZE = DefaultSize("gpt2", 2**19, 2**15)
CPU_SIZE = DefaultSize("tiny", 2**13, 2**12)  # a minute or two on two cores


@dataclass(frozen=True)
class TrainingBenchSettings:
    """What to measure; None means a default for the device.

    `optimizers` are names of `asgo train`, with keywords after a colon: `asgo:lr=0.01,beta2=0.9`. The batch sizes count
    sequences of `context_length` tokens. A `preset` of `asgo train gpt` takes the place of a `model`.
    """

    model: str | None = None
    optimizers: Sequence[str] = DEFAULT_OPTIMIZERS
    batch_size: int | None = None
    micro_batch_size: int | None = None
    context_length: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool | None = None
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    repeats: int = 10
    budget_s: float = 20.0
    preset: str | None = None


@dataclass(frozen=True)
class Workload:
    """What all candidates train; the batch sizes count sequences."""

    model: str
    """The name of the model, or of the preset that was asked for."""
    preset: str
    tokenizer: Tokenizer
    context_length: int
    batch_size: int
    micro_batch_size: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.batch_size * self.context_length


def choose_workload(settings: TrainingBenchSettings, size: DefaultSize) -> Workload:
    """Return the workload of the settings. Raise `UsageError` for an unknown model or preset, or an invalid batch."""
    if settings.model and settings.preset:
        raise UsageError("--preset: has a model of its own; leave --model out")
    model = settings.preset or settings.model or size.model
    if not settings.preset and model not in _PRESETS:
        nearest = difflib.get_close_matches(model, MODEL_NAMES, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(MODEL_NAMES)}"
        raise UsageError(f"--model: unknown model {model!r}; {hint}")
    preset = settings.preset or _PRESETS[model]
    tokenizer = _TOKENIZERS.get(preset, Gpt2Tokenizer())
    own_context_length = preset_layer("gpt", preset).values["model.context_length"]
    if not settings.preset:
        own_context_length = _CONTEXT_LENGTHS.get(model, own_context_length)
    context_length = settings.context_length or own_context_length
    fitting = settings.micro_batch_size or max(1, size.micro_batch_tokens // context_length)
    batch_size = settings.batch_size or max(1, size.tokens // (context_length * fitting)) * fitting
    rows = settings.micro_batch_size or largest_divisor(batch_size, fitting)
    if batch_size % rows:
        raise UsageError(f"--micro-batch-size {rows}: does not divide the batch of {batch_size}")
    return Workload(model, preset, tokenizer, context_length, batch_size, rows)


def configure(
    workload: Workload, settings: TrainingBenchSettings, text: str, data: Path, compiled: bool
) -> GPTRunConfig:
    """Return the configuration of a run with the optimizer `text`. Raise `UsageError` for an unknown one."""
    try:
        name, keywords = split_optimizer(text)
    except ValueError as error:
        raise UsageError(f"--optimizer {text}: {error}; write it as asgo:lr=0.01,beta2=0.9") from None
    values = {
        "data.folder": str(data),
        "model.context_length": workload.context_length,
        "model.dropout": 0.0,
        "training.batch_size": workload.batch_size,
        "training.micro_batch_size": workload.micro_batch_size,
        "training.precision": settings.precision,
        "runtime.device": settings.device,
        "runtime.compile": compiled,
        "evaluation.batches": 1,  # of the few tokens that there are; nothing is validated
    }
    given = assignment_layer([f"optimizer.{key}={value}" for key, value in keywords.items()])
    optimizer = {"optimizer.name": name, **given.values}
    preset = preset_layer("gpt", workload.preset)
    config = resolve_run([preset, Layer("asgo bench train", values), Layer(f"--optimizer {text}", optimizer)])
    assert isinstance(config, GPTRunConfig)
    return config
