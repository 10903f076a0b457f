"""Convert our settings to the `config.json` of a Hugging Face GPT-2, and back. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.config import GPTSettings

_LAYER_NORM_EPSILON = 1e-5
_ACTIVATIONS = {"exact": "gelu", "tanh": "gelu_new"}
_GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_REQUIRED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_MUST_BE: dict[str, Any] = {
    "layer_norm_epsilon": _LAYER_NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Keys for which our model has no setting. These values are also the defaults of absent keys."""


def to_gpt2_config(settings: GPTSettings, vocab_size: int, end_of_text: int) -> dict[str, Any]:
    """Return the GPT-2 configuration of a model with these settings and an unpadded vocabulary."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": settings.context_length,
        "n_embd": settings.d_model,
        "n_layer": settings.n_layers,
        "n_head": settings.n_heads,
        "n_inner": settings.d_ff,
        "activation_function": _ACTIVATIONS[settings.gelu],
        "resid_pdrop": settings.dropout,
        "embd_pdrop": settings.dropout,
        "attn_pdrop": settings.dropout,
        "layer_norm_epsilon": _LAYER_NORM_EPSILON,
        "tie_word_embeddings": settings.tied_head,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def problems_of(config: Mapping[str, Any]) -> list[str]:
    """Return one line for each reason why our model cannot represent the configuration; empty for published GPT-2s."""
    if config.get("model_type") != "gpt2":
        return [f"model_type is {config.get('model_type')!r}; only gpt2 is supported"]
    problems = [f"{key} must be a positive whole number" for key in _REQUIRED if not _is_size(config.get(key))]
    if config.get("n_inner") is not None and not _is_size(config["n_inner"]):
        problems.append("n_inner must be a positive whole number or null")
    if config.get("activation_function", "gelu_new") not in _GELUS:
        known = ", ".join(_GELUS)
        problems.append(f"activation_function is {config['activation_function']!r}; supported: {known}")
    problems += [
        f"{key} is {config[key]!r}; only {value!r} is supported"
        for key, value in _MUST_BE.items()
        if config.get(key, value) != value
    ]
    return problems


def from_gpt2_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `GPTSettings` for a configuration without problems.

    `vocab_multiple` is the size of GPT-2's embedding: padding then gives the same size for any tokenizer that fits.
    Dropout is left out: it belongs to a training run.
    """
    return {
        "kind": "gpt",
        "context_length": config["n_positions"],
        "n_layers": config["n_layer"],
        "n_heads": config["n_head"],
        "d_model": config["n_embd"],
        "d_ff": config.get("n_inner") or 4 * config["n_embd"],
        "bias": True,
        "tied_head": config.get("tie_word_embeddings", True),
        "gelu": _GELUS[config.get("activation_function", "gelu_new")],
        "vocab_multiple": config["vocab_size"],
    }


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
