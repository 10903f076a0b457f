"""Generate text from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from models.gpt import sample
from pipelines.config import GPTRunConfig, RuntimeSettings
from pipelines.data.tokenizers import build_tokenizer
from pipelines.errors import AsgoError
from pipelines.tasks import task_of
from pipelines.training.checkpoint import find_checkpoint
from pipelines.training.device import pick_device
from pipelines.training.gpt_task import build_decoder, require_weights_of


def generate(
    path: Path,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    runtime: RuntimeSettings,
    note: Callable[[str], None] = lambda line: None,
) -> str:
    """Continue a prompt with the model of a checkpoint, or of a run's newest valid one; returns the whole text.

    Calls `note` with one line for each newer checkpoint that is damaged or unreadable.
    Raises `AsgoError` if there is no valid checkpoint or the tokenizer does not know a character of the prompt.
    """
    checkpoint, skipped = find_checkpoint(path)
    for line in skipped:
        note(line)
    config = checkpoint.config()
    if not isinstance(config, GPTRunConfig):
        raise AsgoError(f"{checkpoint.folder}: a checkpoint of {task_of(config).model}, which does not generate text")
    device = pick_device(runtime)
    tokenizer = build_tokenizer(checkpoint.state["data"]["tokenizer"])
    tensors = checkpoint.model_tensors()
    require_weights_of(config.model, tokenizer.vocab_size, tensors, str(checkpoint.folder))
    model = build_decoder(config.model, tokenizer.vocab_size)
    model.load_state_dict(tensors, strict=False)  # a tied head is saved once, under the embedding's name
    model.to(device).eval()
    tokens = sample(
        model,
        torch.tensor([tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()], device=device),
        context_length=config.model.context_length,
        new_tokens=new_tokens,
        vocab_size=tokenizer.vocab_size,
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(seed),
    )
    return tokenizer.decode(tokens[1:].tolist())
