"""Export a decoder as a folder that Hugging Face's `transformers` loads as GPT-2 or Llama."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from pipelines.config import DecoderSettings, GPTRunConfig, GPTSettings, TransformerSettings
from pipelines.data.tokenizers import CharsTokenizer, build_tokenizer
from pipelines.errors import UsageError
from pipelines.exchange.tokenizer_files import tokenizer_files
from pipelines.hf import gpt2, llama
from pipelines.hf.architecture import Architecture
from pipelines.shell import command
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.gpt_task import require_weights_of


def write_hf(checkpoint: Checkpoint, config: GPTRunConfig, folder: Path, out: Path) -> str:
    """Write configuration, weights and tokenizer into `folder`; returns a command for `out`, its final path.

    Raises `AsgoError` if the weights do not fit the model, and `UsageError` if it is neither a GPT-2 nor a Llama.
    """
    settings = config.model
    architecture = _architecture_of(settings, checkpoint.folder)
    tokenizer = build_tokenizer(checkpoint.state["data"]["tokenizer"])
    tensors = checkpoint.model_tensors()
    require_weights_of(settings, tokenizer.vocab_size, tensors, str(checkpoint.folder))
    weights = architecture.to_weights(tensors, settings.n_layers, tokenizer.vocab_size)
    # Trap: files of `save_file` are readable by their owner only.
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text)
    model = architecture.to_config(settings, tokenizer.vocab_size, tokenizer.end_of_text)
    files = {
        "config.json": json.dumps(model, indent=1) + "\n",
        "generation_config.json": json.dumps(ends, indent=1) + "\n",
        **tokenizer_files(tokenizer, settings.context_length),
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    if not isinstance(tokenizer, CharsTokenizer):
        return command("lm_eval", "--model", "hf", "--model_args", f"pretrained={out}", "--tasks", "lambada_openai")
    # A `chars` tokenizer does not know all characters of public benchmarks.
    length = min(100, settings.context_length // 2)  # without a limit, generation exceeds the last position and fails
    writing = f"pipeline('text-generation', {str(out)!r})('TEXT', max_new_tokens={length})"
    return command("python", "-c", f"from transformers import pipeline; print({writing})")


def _architecture_of(settings: DecoderSettings, source: Path) -> Architecture:
    if isinstance(settings, GPTSettings):
        return gpt2
    if not isinstance(settings, TransformerSettings):
        raise UsageError(f"{source}: --format hf does not support decoders of kind {settings.kind}")
    other = llama.other_parts(settings)
    if other:
        raise UsageError(f"{source}: --format hf writes a Llama, which cannot have {', '.join(other)}")
    return llama
