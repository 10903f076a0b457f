"""Convert our GPT to Hugging Face's GPT-2, and back; see `Architecture`. Imports torch only to convert weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipelines.config import GPTSettings
from pipelines.hf.architecture import common_problems, is_size

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.tensors import Tensors

PREFIX = "transformer."
BUFFERS: tuple[str, ...] = (".attn.bias", ".attn.masked_bias")

_LAYER_NORM_EPSILON = 1e-5
_ACTIVATIONS = {"exact": "gelu", "tanh": "gelu_new"}
_GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_MUST_BE: dict[str, Any] = {
    "layer_norm_epsilon": _LAYER_NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Keys for which our model has no setting. These values are also the defaults of absent keys."""
_LAYER = {
    "ln_1": ("attention_norm",),
    "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
    "attn.c_proj": ("attention.output",),
    "ln_2": ("feed_forward_norm",),
    "mlp.c_fc": ("feed_forward.up",),
    "mlp.c_proj": ("feed_forward.down",),
}


def problems_of(config: Mapping[str, Any]) -> list[str]:
    """Return one line for each reason why our model cannot represent the configuration; empty for published GPT-2s."""
    problems = common_problems(config, _SIZES, _MUST_BE)
    if config.get("n_inner") is not None and not is_size(config["n_inner"]):
        problems.append(f"n_inner is {config['n_inner']!r}; it must be a positive whole number or null")
    if config.get("activation_function", "gelu_new") not in [*_GELUS]:
        known = ", ".join(_GELUS)
        problems.append(f"activation_function is {config['activation_function']!r}; supported: {known}")
    return problems


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `GPTSettings`."""
    return {
        "kind": "gpt",
        "context_length": config["n_positions"],
        "n_layers": config["n_layer"],
        "n_heads": config["n_head"],
        "d_model": config["n_embd"],
        "d_ff": _inner(config),
        "bias": True,
        "tied_head": config.get("tie_word_embeddings", True),
        "gelu": _GELUS[config.get("activation_function", "gelu_new")],
        "vocab_multiple": config["vocab_size"],
    }


def to_config(settings: GPTSettings, vocab_size: int, end_of_text: int) -> dict[str, Any]:
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


def sizes_of(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of embeddings, and of a matrix of the last layer."""
    width = config["n_embd"]
    return {
        "wte.weight": [config["vocab_size"], width],
        "wpe.weight": [config["n_positions"], width],
        f"h.{config['n_layer'] - 1}.mlp.c_fc.weight": [width, _inner(config)],
    }


def weight_names(n_layers: int, tied_head: bool) -> set[str]:
    """Return the names of all weights, without prefix."""
    modules = [module for module, _ in _modules(n_layers)]
    names = {f"{module}.weight" for module in modules}
    names |= {f"{module}.bias" for module in modules if not _is_embedding(module)}
    return names if tied_head else {*names, "lm_head.weight"}


def from_weights(theirs: Tensors, n_layers: int, tied_head: bool) -> Tensors:
    """Return the weights with our names and layout."""
    ours: Tensors = {}
    for module, own in _modules(n_layers):
        weight = theirs[f"{module}.weight"]
        rows = weight.T if _is_transposed(module) else weight
        ours |= {f"{name}.weight": part for name, part in zip(own, rows.chunk(len(own)), strict=True)}
        if not _is_embedding(module):
            parts = theirs[f"{module}.bias"].chunk(len(own))
            ours |= {f"{name}.bias": part for name, part in zip(own, parts, strict=True)}
    if not tied_head:
        ours["head.weight"] = theirs["lm_head.weight"]
    return ours


def to_weights(ours: Tensors, n_layers: int, vocab_size: int) -> Tensors:
    """Return our weights with GPT-2's names and layout. Missing biases become zeros; padding rows are removed."""
    import torch

    theirs: Tensors = {}
    for module, own in _modules(n_layers):
        weight = torch.cat([ours[f"{name}.weight"] for name in own])
        theirs[PREFIX + f"{module}.weight"] = weight.T.contiguous() if _is_transposed(module) else weight
        if not _is_embedding(module):
            theirs[PREFIX + f"{module}.bias"] = _biases(ours, own, weight)
    theirs[PREFIX + "wte.weight"] = theirs[PREFIX + "wte.weight"][:vocab_size]
    if "head.weight" in ours:
        theirs["lm_head.weight"] = ours["head.weight"][:vocab_size]
    return theirs


def _inner(config: Mapping[str, Any]) -> int:
    inner: int = config.get("n_inner") or 4 * config["n_embd"]
    return inner


def _modules(n_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield GPT-2's modules, without prefix, and our modules that each holds."""
    yield "wte", ("token_embedding",)
    yield "wpe", ("position_embedding",)
    for layer in range(n_layers):
        for module, own in _LAYER.items():
            yield f"h.{layer}.{module}", tuple(f"blocks.{layer}.{name}" for name in own)
    yield "ln_f", ("norm",)


def _is_transposed(module: str) -> bool:
    # GPT-2's Conv1D modules, named `c_*`, store weights as (in, out).
    return ".c_" in module


def _is_embedding(module: str) -> bool:
    return module in ("wte", "wpe")


def _biases(ours: Tensors, own: tuple[str, ...], weight: Tensor) -> Tensor:
    import torch

    biases = [ours[f"{name}.bias"] for name in own if f"{name}.bias" in ours]
    return torch.cat(biases) if biases else torch.zeros(len(weight), dtype=weight.dtype)
