"""Parameter groups of a model: which parameters use the matrix rule, Adam, or no weight decay."""

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
from .specs import PARTS, unknown_name

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NO_MATRICES = (*_EMBEDDINGS, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_WEIGHT = re.compile(r"(.+_)?weight(_.+)?")

NO_DECAY = ("embeddings", "head")
"""Words in `no_decay`, besides names of modules and parameters."""

NamedParams = list[tuple[str, Tensor]]
RowBlocks = Mapping[str, int | Sequence[int]]
Selection = nn.Module | Tensor | str | Iterable[nn.Module | Tensor | str]
"""Modules (all their parameters), parameters, or names of either with `fnmatch` wildcards."""


def matrix_groups(
    model: nn.Module,
    row_blocks: RowBlocks | None = None,
    head: Selection | None = None,
    adam: Selection = (),
) -> list[dict[str, Any]]:
    """Return parameter groups: hidden weight matrices with the matrix rule, all other parameters with Adam.

    Hidden matrices are

    - two-dimensional parameters and convolution kernels named `weight`, `..._weight` or `weight_...`, as in PyTorch's
      layers, also with a parametrization;
    - the experts of three-dimensional parameters (E, m, n) with such a name, or in a module with "expert" in its name
      or class name: each expert is a separate matrix.

    Embeddings (token and positional, tied or not), normalizations, biases, gains, output heads, and the parameters in
    `adam` use Adam. `head` selects the output heads; the default is `optim.heads.output_heads`.

    `row_blocks` gives, by name or wildcards, the number of equal blocks of rows, or the rows of each block, that are
    separate matrices. This preconditions the query and key of each attention head separately, as arXiv 2503.20762 does
    in practice, also if one weight holds queries, keys and values: `{"*.attn.c_attn.weight": (64,) * 24 + (768,)}`
    splits the queries and keys of nanoGPT's 12 heads, and keeps the values whole; 3 makes three matrices. Rows are
    outputs, as in `nn.Linear`. Hugging Face's GPT-2 stores this weight transposed: its heads are columns, and cannot be
    split.

    Parameters in `row_blocks` and experts come after the other matrices, in one group for each way of splitting, in
    the order of the model. Warns if Adam gets more elements of possible matrices than the matrix rule. Parameters that
    require no gradient are left out, also those in `row_blocks`.

    Raises:
        ValueError: a name, module or parameter is not in the model, or `row_blocks` names a parameter that uses Adam.
    """
    parts = parts_of(model, head, adam)
    batch_dims = _batch_dims(model)
    matrices = [(name, param) for name, param in _trainable(model) if parts[name] == "matrices"]
    others = [(name, param) for name, param in _trainable(model) if parts[name] != "matrices"]
    blocks = _by_own_names(model, row_blocks or {})
    _check_names(model, blocks, [name for name, _ in matrices])
    selected = _selected(model, "adam", adam) | _in_modules(model, _NO_MATRICES)
    doubtful = [(name, param) for name, param in others if parts[name] == "vectors" and id(param) not in selected]
    _warn_of_few(model, matrices, doubtful)
    return _not_empty(*_split_groups(matrices, batch_dims, blocks), {"params": others, **ADAM_RULE})


def decay_groups(model: nn.Module, no_decay: Sequence[str] = (), head: Selection | None = None) -> list[dict[str, Any]]:
    """Return parameter groups without weight decay for parameters with fewer than two dimensions, and for `no_decay`.

    `no_decay` may contain `embeddings` (token and positional, tied or not), `head` (see `matrix_groups`), and names of
    modules or parameters, with wildcards. Raises `ValueError` for a name that is not in the model.
    """
    left_out = undecayed(model, no_decay, head)
    decayed: NamedParams = []
    others: NamedParams = []
    for name, param in _trainable(model):
        (decayed if param.ndim >= 2 and id(param) not in left_out else others).append((name, param))
    return _not_empty({"params": decayed}, {"params": others, "weight_decay": 0.0})


def undecayed(model: nn.Module, no_decay: Sequence[str], head: Selection | None = None) -> set[int]:
    """Return the ids of the parameters that `no_decay` selects; raises like `decay_groups`."""
    chosen: set[int] = set()
    for word in no_decay:
        if word == "embeddings":
            chosen |= _in_modules(model, _EMBEDDINGS)
        elif word == "head":
            chosen |= _selected(model, "head", output_heads(model) if head is None else head)
        else:
            chosen |= _selected(model, "no_decay", word, NO_DECAY)
    return chosen


def parts_of(model: nn.Module, head: Selection | None = None, adam: Selection = ()) -> dict[str, str]:
    """Return the part of each trainable parameter by name, in the order of the model; see `PARTS`.

    `matrices` are the hidden weight matrices of `matrix_groups`, also for optimizers without a matrix rule. A head that
    shares its weight with an embedding belongs to `embedding`.
    """
    embedding = _in_modules(model, _EMBEDDINGS)
    heads = _selected(model, "head", output_heads(model) if head is None else head)
    other = _in_modules(model, _NO_MATRICES) | _selected(model, "adam", adam)
    matrices = _batch_dims(model).keys() - other - heads

    def part_of(param: Tensor) -> str:
        key = id(param)
        if key in embedding or key in heads:
            return "embedding" if key in embedding else "head"
        return "matrices" if key in matrices else "vectors"

    return {name: part_of(param) for name, param in _trainable(model)}


def with_parts(
    groups: list[dict[str, Any]], part_of: Mapping[str, str], parts: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Split parameter groups by the parts in `parts`, which override keywords of the group.

    Groups of these parts have the key `part`; parameters of other parts stay together. Raises `ValueError` for a part
    that no parameter belongs to.
    """
    for part in parts:
        if part not in PARTS:
            raise unknown_name("part", part, PARTS)
        if part not in part_of.values():
            raise ValueError(f"parts.{part}: the model has no such parameters; it has {_listed(part_of)}")
    split = []
    for group in groups:
        named: dict[str, NamedParams] = {}
        for name, param in group["params"]:
            named.setdefault(part_of[name] if part_of[name] in parts else "", []).append((name, param))
        for part, params in named.items():
            own = {**parts[part], "part": part} if part else {}
            split.append({**group, **own, "params": params})
    return split


def with_adam(groups: list[dict[str, Any]], settings: Mapping[str, Any], left_out: set[int]) -> list[dict[str, Any]]:
    """Apply settings (`ADAM_KEYWORDS`) to the group of the Adam rule, and leave `left_out` without weight decay.

    Adam does not decay parameters with fewer than two dimensions, as in `decay_groups`.
    """
    changed = []
    for group in groups:
        uses_adam = group.get("rule") == "adam"
        group = {**group, **(settings if uses_adam else {})}
        if group.get("weight_decay") == 0.0:
            changed.append(group)
            continue
        decayed: NamedParams = []
        others: NamedParams = []
        for name, param in group["params"]:
            is_left_out = id(param) in left_out or (uses_adam and param.ndim < 2)
            (others if is_left_out else decayed).append((name, param))
        changed += _not_empty({**group, "params": decayed}, {**group, "params": others, "weight_decay": 0.0})
    return changed


def _listed(part_of: Mapping[str, str]) -> str:
    return ", ".join(part for part in PARTS if part in part_of.values())


def _in_modules(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    """Return the ids of the direct parameters of modules of some classes."""
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    return {id(param) for module in modules for _, param in _own(module)}


def _own(module: nn.Module) -> NamedParams:
    """Return the direct parameters of a module. Those of a parametrization get the name of the parametrized tensor.

    Its columns are left out: weight normalization keeps row norms in `parametrizations.weight.original0`.
    """
    named: NamedParams = [*module.named_parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        lists = cast(nn.ModuleDict, module.parametrizations)
        originals = [(name, param) for name, each in lists.items() for param in each.parameters(recurse=False)]
        named += [(name, param) for name, param in originals if not _is_column(param)]
    return named


def _batch_dims(model: nn.Module) -> dict[int, int]:
    """Return the possible matrices, by parameter id, with their number of batch dimensions (1 for experts)."""
    dims: dict[int, int] = {}
    for path, module in model.named_modules():
        has_experts = "expert" in f"{path}.{type(module).__name__}".lower()
        for name, param in _own(module):
            count = _experts_or_matrix(module, name, param, has_experts)
            if count is not None:
                dims[id(param)] = count
    return dims


def _experts_or_matrix(module: nn.Module, name: str, param: Tensor, has_experts: bool) -> int | None:
    """Return the batch dimensions: 1 for experts (E, m, n), 0 for a matrix or convolution kernel, None for neither."""
    is_weight = _WEIGHT.fullmatch(name) is not None
    if is_weight and (param.ndim == 2 or (param.ndim > 2 and hasattr(module, "kernel_size"))):
        # A column contains row norms: `weight_g` of PyTorch's older weight normalization.
        return None if name.startswith("weight_") and _is_column(param) else 0
    if param.ndim == 3 and min(param.shape[1:]) > 1 and (is_weight or (has_experts and "bias" not in name)):
        return 1
    return None


def _is_column(param: Tensor) -> bool:
    return param.ndim > 0 and param.numel() == param.shape[0]


def _selected(model: nn.Module, keyword: str, wanted: Selection, words: Sequence[str] = ()) -> set[int]:
    """Return the ids of the selected parameters. Raises `ValueError`, with the keyword, if one is not in the model.

    `words` are further values of the keyword, for the hint.
    """
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
            raise ValueError(f"{keyword}: {each!r} is not a module, parameter or name")
        if isinstance(each, str) and not found:
            raise unknown_name(f"module or parameter in {keyword}", each, [*words, *names])
        if not found <= own:
            raise ValueError(f"{keyword}: a {type(each).__name__} that is not part of the model")
        chosen |= found
    return chosen


def _by_own_names(model: nn.Module, row_blocks: RowBlocks) -> RowBlocks:
    """Translate names of a wrapped model (DDP, PEFT, ...) in `row_blocks` to the names of `model`."""
    names = {id(param): name for name, param in model.named_parameters()}
    inner = {name: names[id(param)] for each in unwrapped(model) for name, param in each.named_parameters()}
    own: dict[str, int | Sequence[int]] = {}
    for pattern, blocks in row_blocks.items():
        found = [pattern] if pattern in inner else [name for name in inner if fnmatchcase(name, pattern)]
        own |= {inner.get(name, name): blocks for name in found or [pattern]}
    return own


def _check_names(model: nn.Module, row_blocks: RowBlocks, matrices: list[str]) -> None:
    params = dict(model.named_parameters())
    for name in row_blocks:
        if name not in params:
            raise unknown_name("parameter in row_blocks", name, matrices)
        if params[name].requires_grad and name not in matrices:
            raise ValueError(f"row_blocks: parameter {name!r} uses Adam, not the matrix rule, so it cannot be split")


def _warn_of_few(model: nn.Module, matrices: NamedParams, others: NamedParams) -> None:
    """Warn if Adam gets most elements of possible matrices. `others` excludes embeddings, norms and heads."""
    # FSDP1 flattens parameters: a weight is one-dimensional.
    flat = [(name, param) for name, param in others if param.ndim == 1 and _is_flat(model, name)]
    doubtful = flat + [(n, p) for n, p in others if p.ndim >= 2 and p.shape[0] > 1 and not n.endswith("bias")]
    taken, left = (sum(param.numel() for _, param in params) for params in (matrices, doubtful))
    if not doubtful or left < taken:
        return
    name, param = max(doubtful, key=lambda named: named[1].numel())
    advice = (
        "flat shards of FSDP1 are not matrices: use fully_shard and ShardedOptimizer"
        if flat
        else "put matrices in a parameter group of their own, and list parameters intended for Adam in adam="
    )
    warnings.warn(
        f"the matrix rule has {taken:,} of the model's {sum(p.numel() for p in model.parameters()):,} elements; Adam "
        f"has {left:,} that may be matrices, such as {name!r} of shape {tuple(param.shape)}; {advice}",
        stacklevel=3,
    )


def _is_flat(model: nn.Module, name: str) -> bool:
    path, _, own_name = name.rpartition(".")
    module = model.get_submodule(path)
    return own_name == "_flat_param" or (
        own_name == "weight" and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    )


def _split_groups(matrices: NamedParams, batch_dims: dict[int, int], row_blocks: RowBlocks) -> list[dict[str, Any]]:
    """Return a group of the whole matrices, and one group for each combination of `batch_dims` and `row_blocks`."""
    groups: dict[object, dict[str, Any]] = {(0, repr(None)): {"params": []}}
    for name, param in matrices:
        dims, blocks = batch_dims[id(param)], row_blocks.get(name)
        if isinstance(blocks, Sequence) and not isinstance(blocks, str):
            blocks = tuple(blocks)
        # By repr: True == 1, but True is invalid in a group and must not share a key with 1.
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
