"""Convert our weights to those of a Hugging Face GPT-2, and back: names, transposes, and joint query, key and value."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipelines.errors import AsgoError
from pipelines.tensors import Tensors

_PREFIX = "transformer."
_LAYER = {
    "ln_1": ("attention_norm",),
    "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
    "attn.c_proj": ("attention.output",),
    "ln_2": ("feed_forward_norm",),
    "mlp.c_fc": ("feed_forward.up",),
    "mlp.c_proj": ("feed_forward.down",),
}
_MASKS = (".attn.bias", ".attn.masked_bias")
"""Buffers in old files, which are not weights."""


def to_gpt2(ours: Tensors, n_layers: int, vocab_size: int) -> Tensors:
    """Return our weights with GPT-2's names and layout. Missing biases become zeros; padding rows are removed."""
    theirs: Tensors = {}
    for module, own in _modules(n_layers):
        weight = torch.cat([ours[f"{name}.weight"] for name in own])
        theirs[_PREFIX + f"{module}.weight"] = weight.T.contiguous() if _is_transposed(module) else weight
        if not _is_embedding(module):
            theirs[_PREFIX + f"{module}.bias"] = _biases(ours, own, weight)
    theirs[_PREFIX + "wte.weight"] = theirs[_PREFIX + "wte.weight"][:vocab_size]
    if "head.weight" in ours:
        theirs["lm_head.weight"] = ours["head.weight"][:vocab_size]
    return theirs


def from_gpt2(theirs: Tensors, n_layers: int, tied_head: bool, source: str) -> Tensors:
    """Return GPT-2's weights with our names, in float32. Raises `AsgoError` for a missing or unknown weight."""
    left = {name.removeprefix(_PREFIX): tensor for name, tensor in theirs.items() if not name.endswith(_MASKS)}
    ours: Tensors = {}

    def take(name: str) -> torch.Tensor:
        if name not in left:
            raise AsgoError(f"{source}: of another model: it has no {name!r}")
        return left.pop(name).float()

    for module, own in _modules(n_layers):
        weight = take(f"{module}.weight")
        rows = weight.T if _is_transposed(module) else weight
        ours |= {f"{name}.weight": part for name, part in zip(own, rows.chunk(len(own)), strict=True)}
        if not _is_embedding(module):
            parts = take(f"{module}.bias").chunk(len(own))
            ours |= {f"{name}.bias": part for name, part in zip(own, parts, strict=True)}
    if not tied_head:
        ours["head.weight"] = take("lm_head.weight")
    left.pop("lm_head.weight", None)  # some files also hold a tied head
    if left:
        raise AsgoError(f"{source}: of another model: its {next(iter(left))!r} is not in a GPT-2 of its config.json")
    return ours


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


def _biases(ours: Tensors, own: tuple[str, ...], weight: torch.Tensor) -> torch.Tensor:
    biases = [ours[f"{name}.bias"] for name in own if f"{name}.bias" in ours]
    return torch.cat(biases) if biases else torch.zeros(len(weight), dtype=weight.dtype)
