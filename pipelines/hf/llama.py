"""Convert our transformer to Hugging Face's Llama, and back; see `Architecture`. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.config import TransformerSettings
from pipelines.hf.architecture import common_problems, is_size

if TYPE_CHECKING:
    from pipelines.tensors import Tensors

PREFIX = "model."
BUFFERS: tuple[str, ...] = (".rotary_emb.inv_freq",)

_SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_MUST_BE: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
"""Keys for which our model has no setting. These values are also the defaults of absent keys."""
_FREE = {
    *("kind", "context_length", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "norm_eps", "rotary_base"),
    *("tied_head", "vocab_multiple"),
    # These do not change the function of a trained model.
    *("softcap_form", "z_loss", "init", "embedding_dtype", "dropout"),
}
_FIXED = {key: field.default for key, field in TransformerSettings.model_fields.items() if key not in _FREE}
"""Settings that a Llama does not have: our defaults are its values."""
_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}


def other_parts(settings: TransformerSettings) -> list[str]:
    """Return `key=value` for each setting with which the model is not a Llama."""
    own = settings.model_dump()
    scale, usual = settings.attention_scale, (settings.d_model // settings.n_heads) ** -0.5
    if scale is not None and math.isclose(scale, usual, rel_tol=1e-6):  # written with seven digits or more
        own["attention_scale"] = None
    return [f"model.{key}={own[key]}" for key, value in _FIXED.items() if own[key] != value]


def problems_of(config: Mapping[str, Any]) -> list[str]:
    """Return one line for each reason why our model cannot represent the configuration; empty for Llama 2."""
    problems = common_problems(config, _SIZES, _MUST_BE)
    if problems:
        return problems
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, d_head = _kv_heads(config), config.get("head_dim")
    if not is_size(kv_heads) or heads % kv_heads:
        problems.append(f"num_key_value_heads is {kv_heads!r}; it must divide num_attention_heads, {heads}")
    if width % heads or d_head not in (None, width // heads):
        quotient = f"hidden_size / num_attention_heads, {width} / {heads}"
        problems.append(f"head_dim is {d_head!r}; only {quotient}, is supported")
    if not _is_default(_rope(config)):
        problems.append(f"the rotary positions are {_rope(config)!r}; only the default ones are supported")
        return problems
    numbers = {"rms_norm_eps": _norm_eps(config), "rope_theta": _rotary_base(config)}
    problems += [
        f"{key} is {value!r}; it must be a number"
        for key, value in numbers.items()
        if isinstance(value, bool) or not isinstance(value, int | float)
    ]
    return problems


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `TransformerSettings`."""
    return {
        **_FIXED,
        "kind": "transformer",
        "context_length": config["max_position_embeddings"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": _kv_heads(config),
        "d_model": config["hidden_size"],
        "d_ff": config["intermediate_size"],
        "norm_eps": _norm_eps(config),
        "rotary_base": _rotary_base(config),
        "tied_head": config.get("tie_word_embeddings", False),
        "vocab_multiple": config["vocab_size"],
    }


def to_config(settings: TransformerSettings, vocab_size: int, end_of_text: int) -> dict[str, Any]:
    """Return the Llama configuration of a model without other parts, and with an unpadded vocabulary."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "max_position_embeddings": settings.context_length,
        "hidden_size": settings.d_model,
        "intermediate_size": settings.d_ff,
        "num_hidden_layers": settings.n_layers,
        "num_attention_heads": settings.n_heads,
        "num_key_value_heads": settings.n_kv_heads or settings.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": settings.norm_eps,
        "rope_theta": settings.rotary_base,  # transformers before version 5 does not read `rope_parameters`
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rotary_base},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": settings.tied_head,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def sizes_of(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of the embedding, and of two matrices of the last layer. Positions have no weights."""
    width, last = config["hidden_size"], config["num_hidden_layers"] - 1
    return {
        "embed_tokens.weight": [config["vocab_size"], width],
        f"layers.{last}.self_attn.k_proj.weight": [width // config["num_attention_heads"] * _kv_heads(config), width],
        f"layers.{last}.mlp.gate_proj.weight": [config["intermediate_size"], width],
    }


def weight_names(n_layers: int, tied_head: bool) -> set[str]:
    """Return the names of all weights, without prefix."""
    return {*_names(n_layers, tied_head)}


def from_weights(theirs: Tensors, n_layers: int, tied_head: bool) -> Tensors:
    """Return the weights with our names; the layout is the same."""
    return {own: theirs[name] for name, own in _names(n_layers, tied_head).items()}


def to_weights(ours: Tensors, n_layers: int, vocab_size: int) -> Tensors:
    """Return our weights with Llama's names, in float32; padding rows are removed."""
    theirs: Tensors = {}
    for name, own in _names(n_layers, tied_head="head.weight" not in ours).items():
        weight = ours[own].float()  # an embedding may be in bfloat16
        is_of_symbols = own in ("token_embedding.weight", "head.weight")
        theirs[name if own == "head.weight" else PREFIX + name] = weight[:vocab_size] if is_of_symbols else weight
    return theirs


def _names(n_layers: int, tied_head: bool) -> dict[str, str]:
    """Return our names of weights by Llama's, without prefix."""
    modules = {"embed_tokens": "token_embedding", "norm": "norm"} | {
        f"layers.{layer}.{name}": f"blocks.{layer}.{own}" for layer in range(n_layers) for name, own in _LAYER.items()
    }
    if not tied_head:
        modules["lm_head"] = "head"
    return {f"{name}.weight": f"{own}.weight" for name, own in modules.items()}


def _kv_heads(config: Mapping[str, Any]) -> Any:
    found = config.get("num_key_value_heads")
    return config["num_attention_heads"] if found is None else found


def _rope(config: Mapping[str, Any]) -> Any:
    """Return the table of rotary positions: `rope_parameters`, which older files call `rope_scaling`."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _is_default(rope: Any) -> bool:
    """Whether positions turn all pairs of a head, without scaling."""
    defaults = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    return isinstance(rope, dict) and all(
        key == "rope_theta" or (key in defaults and value == defaults[key]) for key, value in rope.items()
    )


def _rotary_base(config: Mapping[str, Any]) -> Any:
    return _rope(config).get("rope_theta", config.get("rope_theta", 10_000.0))


def _norm_eps(config: Mapping[str, Any]) -> Any:
    return config.get("rms_norm_eps", 1e-6)
