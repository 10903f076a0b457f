"""Which parameter of a model takes which rule."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .heads import output_heads, unwrapped
from .matrix_optimizer import ADAM_RULE
from .specs import unknown_name

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NO_MATRICES = (*_EMBEDDINGS, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_WEIGHT = re.compile(r"(.+_)?weight(_.+)?")

NO_DECAY = ("embeddings", "head")
"""What weight decay can leave out, besides parameters of fewer than two dimensions."""

NamedParams = list[tuple[str, Tensor]]
RowBlocks = Mapping[str, int | Sequence[int]]
Selection = nn.Module | Tensor | str | Iterable[nn.Module | Tensor | str]
"""Modules, with all their parameters; parameters; or names of either, with the wildcards of `fnmatch`."""


def matrix_groups(
    model: nn.Module,
    row_blocks: RowBlocks | None = None,
    head: Selection | None = None,
    adam: Selection = (),
) -> list[dict[str, Any]]:
    """Hidden weight matrices in groups for the matrix rule; everything else in a group for Adam.

    Hidden matrices are

    - the two-dimensional parameters and convolution kernels named `weight`, `..._weight` or `weight_...`, as all of
      PyTorch's layers name theirs, also behind a parametrization;
    - the experts of three-dimensional parameters (E, m, n) that are so named, or are in a module whose name or class
      says "expert": each is a matrix of its own.

    Embeddings (also tied to the head, also positional), normalizations, biases, gains and the output heads take Adam,
    and what `adam` names. `head` names the heads; by default they are those of `optim.heads.output_heads`.

    The matrices that `row_blocks` names and the experts come after the others, a group for each way of splitting, in
    the order of the model. Warns where Adam is left with more elements that may be matrices than the matrix rule has.

    Raises:
        ValueError: a name, module or parameter that is not the model's, or blocks for one that takes Adam. A parameter
            in `row_blocks` that needs no gradient is left out, as without blocks.
    """
    excluded = {
        id(param) for module in model.modules() if isinstance(module, _NO_MATRICES) for _, param in _own(module)
    }
    excluded |= _selected(model, "head", output_heads(model) if head is None else head)
    excluded |= _selected(model, "adam", adam)
    batch_dims = {key: dims for key, dims in _batch_dims(model).items() if key not in excluded}
    matrices = [(name, param) for name, param in _trainable(model) if id(param) in batch_dims]
    others = [(name, param) for name, param in _trainable(model) if id(param) not in batch_dims]
    blocks = _by_own_names(model, row_blocks or {})
    _check_names(model, blocks, [name for name, _ in matrices])
    _warn_of_few(model, matrices, [(name, param) for name, param in others if id(param) not in excluded])
    return _not_empty(*_split_groups(matrices, batch_dims, blocks), {"params": others, **ADAM_RULE})


def decay_groups(model: nn.Module, no_decay: Sequence[str] = (), head: Selection | None = None) -> list[dict[str, Any]]:
    """All parameters, with weight decay switched off for those of fewer than two dimensions, and for `no_decay`.

    That may name `embeddings` (of tokens and positions, also where tied to the head) and `head` (see `matrix_groups`).
    """
    left_out: set[int] = set()
    if "embeddings" in no_decay:
        modules = [module for module in model.modules() if isinstance(module, _EMBEDDINGS)]
        left_out |= {id(param) for module in modules for _, param in _own(module)}
    if "head" in no_decay:
        left_out |= _selected(model, "head", output_heads(model) if head is None else head)
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


def _own(module: nn.Module) -> NamedParams:
    """A module's own parameters, those behind a parametrization by the name of the tensor that it makes.

    Without columns there: a weight normalization keeps the lengths of rows in `parametrizations.weight.original0`.
    """
    named: NamedParams = [*module.named_parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        lists = cast(nn.ModuleDict, module.parametrizations)
        originals = [(name, param) for name, each in lists.items() for param in each.parameters(recurse=False)]
        named += [(name, param) for name, param in originals if not _is_column(param)]
    return named


def _batch_dims(model: nn.Module) -> dict[int, int]:
    """The parameters, by id, that are matrices if no rule says otherwise, with the dimensions that count experts."""
    dims: dict[int, int] = {}
    for path, module in model.named_modules():
        has_experts = "expert" in f"{path}.{type(module).__name__}".lower()
        for name, param in _own(module):
            count = _experts_or_matrix(module, name, param, has_experts)
            if count is not None:
                dims[id(param)] = count
    return dims


def _experts_or_matrix(module: nn.Module, name: str, param: Tensor, has_experts: bool) -> int | None:
    """1 for experts (E, m, n), 0 for a matrix or a kernel, None for what is neither."""
    is_weight = _WEIGHT.fullmatch(name) is not None
    if is_weight and (param.ndim == 2 or (param.ndim > 2 and hasattr(module, "kernel_size"))):
        # A column is the length of each row: `weight_g` of PyTorch's older weight normalization.
        return None if name.startswith("weight_") and _is_column(param) else 0
    if param.ndim == 3 and min(param.shape[1:]) > 1 and (is_weight or (has_experts and "bias" not in name)):
        return 1
    return None


def _is_column(param: Tensor) -> bool:
    return param.ndim > 0 and param.numel() == param.shape[0]


def _selected(model: nn.Module, keyword: str, wanted: Selection) -> set[int]:
    """The ids of the parameters that a keyword names."""
    names = {name: param for module in unwrapped(model) for name, param in module.named_parameters()}
    own = {id(param) for param in names.values()}
    chosen: set[int] = set()
    for each in [wanted] if isinstance(wanted, nn.Module | Tensor | str) else wanted:
        if isinstance(each, nn.Module):
            found = {id(param) for param in each.parameters()}
        elif isinstance(each, Tensor):
            found = {id(each)}
        elif isinstance(each, str):
            found = {id(names[name]) for name in names if fnmatchcase(name, each) or fnmatchcase(name, f"{each}.*")}
        else:
            raise ValueError(f"{keyword}: {each!r} is no module, parameter or name")
        if isinstance(each, str) and not found:
            raise unknown_name(f"module or parameter in {keyword}", each, names)
        if not found <= own:
            raise ValueError(f"{keyword}: a {type(each).__name__} that is not part of the model")
        chosen |= found
    return chosen


def _by_own_names(model: nn.Module, row_blocks: RowBlocks) -> RowBlocks:
    """The blocks by the names of `model`, where they are given by those of a model that it wraps."""
    names = {id(param): name for name, param in model.named_parameters()}
    inner = {name: names[id(param)] for each in unwrapped(model)[1:] for name, param in each.named_parameters()}
    return {name if name in names.values() else inner.get(name, name): blocks for name, blocks in row_blocks.items()}


def _check_names(model: nn.Module, row_blocks: RowBlocks, matrices: list[str]) -> None:
    params = dict(model.named_parameters())
    for name in row_blocks:
        if name not in params:
            raise unknown_name("parameter in row_blocks", name, matrices)
        if params[name].requires_grad and name not in matrices:
            raise ValueError(f"row_blocks: parameter {name!r} takes Adam, not the matrix rule, so it is not split")


def _warn_of_few(model: nn.Module, matrices: NamedParams, others: NamedParams) -> None:
    """Warn where most of what may be matrices takes Adam; `others` is without embeddings, norms and heads."""
    # FSDP1 flattens parameters: a weight of one dimension, whole or in part.
    flat = [(name, param) for name, param in others if param.ndim == 1 and _is_flat(model, name)]
    doubtful = flat + [(n, p) for n, p in others if p.ndim >= 2 and p.shape[0] > 1 and not n.endswith("bias")]
    taken, left = (sum(param.numel() for _, param in params) for params in (matrices, doubtful))
    if not doubtful or left < taken:
        return
    name, param = max(doubtful, key=lambda named: named[1].numel())
    advice = (
        "flat shards of FSDP1 are no matrices: use fully_shard and ShardedOptimizer"
        if flat
        else "give those that are matrices a parameter group of their own, or name what is meant to take Adam in adam="
    )
    warnings.warn(
        f"the matrix rule has {taken:,} of the model's {sum(p.numel() for p in model.parameters()):,} elements; Adam "
        f"takes {left:,} that may be matrices, such as {name!r} of shape {tuple(param.shape)}; {advice}",
        stacklevel=3,
    )


def _is_flat(model: nn.Module, name: str) -> bool:
    path, _, own_name = name.rpartition(".")
    module = model.get_submodule(path)
    return own_name == "_flat_param" or (
        own_name == "weight" and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    )


def _split_groups(matrices: NamedParams, batch_dims: dict[int, int], row_blocks: RowBlocks) -> list[dict[str, Any]]:
    """A group for all whole matrices, and one for all experts or matrices of equal blocks."""
    groups: dict[object, dict[str, Any]] = {(0, repr(None)): {"params": []}}
    for name, param in matrices:
        dims, blocks = batch_dims[id(param)], row_blocks.get(name)
        if isinstance(blocks, Sequence) and not isinstance(blocks, str):
            blocks = tuple(blocks)
        # By their text, since True equals 1, and the group has to refuse the one and take the other.
        group = groups.setdefault((dims, repr(blocks)), {"params": []})
        group["params"].append((name, param))
        if blocks is not None:
            group["row_blocks"] = blocks
        if dims:
            group["batch_dims"] = dims
    return list(groups.values())


def _trainable(model: nn.Module) -> NamedParams:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def _not_empty(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]
