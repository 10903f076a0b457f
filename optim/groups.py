"""Which parameter of a model takes which rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from .keywords import unknown_name
from .matrix_optimizer import ADAM_RULE

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NO_MATRICES = (*_EMBEDDINGS, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)

NO_DECAY = ("embeddings", "head")
"""What weight decay can leave out, besides parameters of fewer than two dimensions."""

NamedParams = list[tuple[str, Tensor]]
RowBlocks = Mapping[str, int | Sequence[int]]


def matrix_groups(model: nn.Module, row_blocks: RowBlocks | None = None) -> list[dict[str, Any]]:
    """Hidden weight matrices in groups for the matrix rule; everything else in a group for Adam.

    Hidden matrices are the two-dimensional parameters and convolution kernels named `weight` or `..._weight`, as all
    of PyTorch's layers name theirs, without those of embeddings, normalizations and the output head. Embeddings (also
    tied to the head, also positional), the head, biases and gains take Adam.

    The matrices that `row_blocks` names come after the others, a group for each way of splitting, in the order of the
    model. Raises `ValueError` for a name that is not the model's, or whose parameter takes Adam; one that needs no
    gradient is left out, as without blocks.
    """
    excluded = {id(param) for module in _without_matrices(model) for param in module.parameters(recurse=False)}
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)}
    matrices: NamedParams = []
    others: NamedParams = []
    for name, param in _trainable(model):
        is_weight = name.endswith("weight") and id(param) not in excluded
        is_matrix = is_weight and (param.ndim == 2 or id(param) in kernels)
        (matrices if is_matrix else others).append((name, param))
    blocks = row_blocks or {}
    _check_names(model, blocks, [name for name, _ in matrices])
    whole = [(name, param) for name, param in matrices if name not in blocks]
    return _not_empty({"params": whole}, *_split_groups(matrices, blocks), {"params": others, **ADAM_RULE})


def decay_groups(model: nn.Module, no_decay: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All parameters, with weight decay switched off for those of fewer than two dimensions, and for `no_decay`.

    That may name `embeddings` (of tokens and positions, also where tied to the head) and `head` (see `output_head`).
    """
    left_out = {id(param) for module in _named_in(no_decay, model) for param in module.parameters(recurse=False)}
    decayed: NamedParams = []
    others: NamedParams = []
    for name, param in _trainable(model):
        (decayed if param.ndim >= 2 and id(param) not in left_out else others).append((name, param))
    return _not_empty({"params": decayed}, {"params": others, "weight_decay": 0.0})


def check_no_decay(no_decay: Sequence[str]) -> None:
    """Raise `ValueError` for a word that is not in `NO_DECAY`."""
    for kind in no_decay:
        if kind not in NO_DECAY:
            raise unknown_name("word in no_decay", kind, NO_DECAY)


def _named_in(no_decay: Sequence[str], model: nn.Module) -> list[nn.Module]:
    head = output_head(model) if "head" in no_decay else None
    embeddings = _EMBEDDINGS if "embeddings" in no_decay else ()
    return [module for module in model.modules() if isinstance(module, embeddings) or module is head]


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the model's outputs: `model.get_output_embeddings()`, else its last `nn.Linear`."""
    if hasattr(model, "get_output_embeddings"):
        return cast("nn.Module | None", cast(Any, model).get_output_embeddings())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


def _without_matrices(model: nn.Module) -> list[nn.Module]:
    """Embeddings, normalizations and the output head."""
    head = output_head(model)
    return [module for module in model.modules() if isinstance(module, _NO_MATRICES) or module is head]


def _check_names(model: nn.Module, row_blocks: RowBlocks, matrices: list[str]) -> None:
    params = dict(model.named_parameters())
    for name in row_blocks:
        if name not in params:
            raise unknown_name("parameter in row_blocks", name, matrices)
        if params[name].requires_grad and name not in matrices:
            raise ValueError(f"row_blocks: parameter {name!r} takes Adam, not the matrix rule, so it is not split")


def _split_groups(matrices: NamedParams, row_blocks: RowBlocks) -> list[dict[str, Any]]:
    """A group for all matrices of equal blocks."""
    groups: dict[str, dict[str, Any]] = {}
    for name, param in matrices:
        if name in row_blocks:
            blocks = row_blocks[name]
            if isinstance(blocks, Sequence) and not isinstance(blocks, str):
                blocks = tuple(blocks)
            # By their text, since True equals 1, and the group has to refuse the one and take the other.
            group = groups.setdefault(repr(blocks), {"params": [], "row_blocks": blocks})
            group["params"].append((name, param))
    return list(groups.values())


def _trainable(model: nn.Module) -> NamedParams:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def _not_empty(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]
