"""Optimizer classes by name, and `build_optimizer` for a whole model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn

from .groups import RowBlocks, Selection, check_no_decay, decay_groups, matrix_groups
from .heads import unwrapped
from .specs import SPECS, spec_of, unknown_name


def optimizer_class(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return class and implied keywords of a name. Raises `ValueError` for an unknown name."""
    spec = spec_of(name)
    return getattr(import_module(spec.module, __package__), spec.class_name), dict(spec.implied)


def build_optimizer(
    model: nn.Module,
    name: str,
    total_steps: int,
    *,
    row_blocks: RowBlocks | None = None,
    by_heads: bool = False,
    head: Selection | None = None,
    adam: Selection = (),
    no_decay: Sequence[str] = (),
    **settings: Any,
) -> torch.optim.Optimizer:
    """Build one optimizer for all trainable parameters of a model.

    Matrix optimizers (`asgo`, `dasgo`, `muon`, `shampoo`) apply the matrix rule to hidden weight matrices, and Adam to
    all other parameters (see `optim.groups.matrix_groups`). The other optimizers apply weight decay to parameters with
    at least two dimensions. Wrappers (DDP, `torch.compile`, PEFT and similar) make no difference.

    Args:
        model: any module; parameters that require no gradient are left out.
        name: one of `OPTIMIZER_NAMES`.
        total_steps: steps of the whole training; only `accasro` uses it.
        row_blocks: for matrix optimizers, parameters by name whose blocks of rows are separate matrices: the number of
            equal blocks, or the rows of each block. This preconditions the query and key of each attention head
            separately, as arXiv 2503.20762 does in practice, also if one weight holds queries, keys and values:
            `row_blocks={"transformer.h.0.attn.c_attn.weight": (64,) * 24 + (768,)}` splits the queries and keys of
            nanoGPT's 12 heads, and keeps the values whole. Rows are outputs, as in `nn.Linear`. Hugging Face's GPT-2
            stores this weight transposed: its heads are columns, and cannot be split.
        by_heads: use the blocks of `model.attention_row_blocks()`, as in `models.gpt.GPT`; entries of `row_blocks` take
            precedence.
        head: output heads, which use Adam with a matrix optimizer: modules, parameters, or their names, with wildcards
            (`"*.classifier"`). Default: detected; `()` for none.
        adam: for matrix optimizers, further modules or parameters that use Adam, selected like `head`.
        no_decay: `embeddings`, `head` or both: no weight decay for these. Matrix optimizers never decay them, so a fair
            comparison needs it for the other optimizers.
        settings: keywords of the optimizer's constructor.

    Raises:
        ValueError: unknown name, unknown or invalid keyword, unknown value in `no_decay`, `row_blocks` for a parameter
            or an optimizer without matrices, or a `head` or `adam` that is not part of the model.

    Warns (`UserWarning`) if a matrix optimizer applies Adam to most elements of possible matrices, such as flat shards
    of FSDP1, or parameters whose names do not identify weights.
    """
    check_no_decay(no_decay)
    cls, fixed = optimizer_class(name)
    keywords = _accepted(cls, name, total_steps, {**fixed, **settings})
    if SPECS[name].takes_matrices:
        heads = _attention_row_blocks(model) if by_heads else {}
        return cls(matrix_groups(model, {**heads, **(row_blocks or {})}, head, adam), **keywords)
    for keyword, is_given in {
        "by_heads": by_heads,
        "row_blocks": row_blocks is not None,
        "head": head is not None and "head" not in no_decay,
        "adam": not isinstance(adam, tuple) or bool(adam),
    }.items():
        if is_given:
            raise _no_matrices(name, keyword)
    return cls(decay_groups(model, no_decay, head), **keywords)


def _accepted(
    cls: type[torch.optim.Optimizer], name: str, total_steps: int, keywords: dict[str, Any]
) -> dict[str, Any]:
    """Return the constructor keywords. Raises `ValueError` for an unknown keyword."""
    accepted = inspect.signature(cls).parameters
    for key in keywords:
        if key not in accepted:
            raise unknown_name(f"keyword of {name}", key, [key for key in accepted if key != "params"])
    return {**keywords, "total_steps": total_steps} if "total_steps" in accepted else keywords


def _attention_row_blocks(model: nn.Module) -> RowBlocks:
    for module in unwrapped(model):
        if hasattr(module, "attention_row_blocks"):
            return cast(RowBlocks, cast(Any, module).attention_row_blocks())
    raise ValueError(f"by_heads: {type(model).__name__} has no attention_row_blocks(); use row_blocks instead")


def _no_matrices(name: str, keyword: str) -> ValueError:
    takers = ", ".join(spec.name for spec in SPECS.values() if spec.takes_matrices)
    return ValueError(f"{keyword}: {name} does not treat weights as matrices; these do: {takers}")
