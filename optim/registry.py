"""Optimizer classes by name, and `build_optimizer` for a whole model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn

from .groups import RowBlocks, Selection, decay_groups, matrix_groups, parts_of, undecayed, with_adam, with_parts
from .heads import unwrapped
from .specs import ADAM_KEYWORDS, SPECS, OptimizerSpec, spec_of, unknown_name


def optimizer_class(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return class and implied keywords of a name. Raises `ValueError` for an unknown name."""
    spec = spec_of(name)
    return getattr(import_module(spec.module, __package__), spec.class_name), dict(spec.implied)


def build_optimizer(
    model: nn.Module,
    name: str | type[torch.optim.Optimizer],
    total_steps: int,
    *,
    row_blocks: RowBlocks | None = None,
    by_heads: bool = False,
    head: Selection | None = None,
    adam: Selection = (),
    adam_lr: float | None = None,
    adam_betas: tuple[float, float] | None = None,
    adam_eps: float | None = None,
    adam_weight_decay: float | None = None,
    no_decay: Sequence[str] = (),
    parts: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> torch.optim.Optimizer:
    """Build one optimizer for all trainable parameters of a model.

    Matrix optimizers (`asgo`, `dasgo`, `muon`, `shampoo`) apply the matrix rule to hidden weight matrices, and Adam to
    all other parameters (see `optim.groups.matrix_groups`). The other optimizers apply weight decay to parameters with
    at least two dimensions. Wrappers (DDP, `torch.compile`, PEFT and similar) make no difference.

    Args:
        model: any module; parameters that require no gradient are left out.
        name: one of `OPTIMIZER_NAMES`, or any class of optimizers, whose groups then have no parameter names.
        total_steps: steps of the whole training; only `accasro` uses it.
        row_blocks: for matrix optimizers, parameters by name, with wildcards, whose blocks of rows are separate
            matrices: the number of equal blocks, or the rows of each block. This preconditions the query and key of
            each attention head separately, as arXiv 2503.20762 does in practice, also if one weight holds queries, keys
            and values: `row_blocks={"*.attn.c_attn.weight": (64,) * 24 + (768,)}` splits the queries and keys of
            nanoGPT's 12 heads, and keeps the values whole; `3` makes the three separate matrices. Rows are outputs, as
            in `nn.Linear`. Hugging Face's GPT-2 stores this weight transposed: its heads are columns, and cannot be
            split.
        by_heads: use the blocks of `model.attention_row_blocks()`, as in `models.gpt.GPT`; entries of `row_blocks` take
            precedence.
        head: output heads, which use Adam with a matrix optimizer: modules, parameters, or their names, with wildcards
            (`"*.classifier"`). Default: detected; `()` for none.
        adam: for matrix optimizers, further modules or parameters that use Adam, selected like `head`.
        adam_lr, adam_betas, adam_eps, adam_weight_decay: for matrix optimizers, keywords of Adam. Defaults: the
            optimizer's `lr`, (0.9, 0.95), 1e-8 and 0. Weight decay applies to Adam's parameters with at least two
            dimensions.
        no_decay: no weight decay for these: `embeddings`, `head`, or names of modules or parameters, with wildcards.
            Matrix optimizers do not decay embeddings and heads by default, so a fair comparison needs it for the
            other optimizers.
        parts: keywords of parameter groups for parts of the model (`optim.specs.PARTS`), which take precedence:
            `parts={"embedding": {"lr": 0.3}, "matrices": {"weight_decay": 0.0}}`.
        settings: keywords of the optimizer's constructor.

    Raises:
        ValueError: unknown name, unknown or invalid keyword, a name in `no_decay` or a part that the model does not
            have, `row_blocks` for a parameter or an optimizer without matrices, or a `head` or `adam` that is not part
            of the model.

    Warns (`UserWarning`) if a matrix optimizer applies Adam to most elements of possible matrices, such as flat shards
    of FSDP1, or parameters whose names do not identify weights.
    """
    if isinstance(name, str):
        cls, fixed = optimizer_class(name)
        spec, settings = SPECS[name], _accepted(cls, name, total_steps, {**fixed, **settings})
    else:
        cls, spec = name, None
    given = zip(ADAM_KEYWORDS, (adam_lr, adam_betas, adam_eps, adam_weight_decay), strict=True)
    adam_settings = {key: value for key, value in given if value is not None}
    if spec is not None and spec.takes_matrices:
        heads = _attention_row_blocks(model) if by_heads else {}
        groups = matrix_groups(model, {**heads, **(row_blocks or {})}, head, adam)
        groups = with_adam(groups, adam_settings, undecayed(model, no_decay, head))
    else:
        is_given = {
            "by_heads": by_heads,
            "row_blocks": row_blocks is not None,
            "head": head is not None and "head" not in no_decay and not parts,
            "adam": not isinstance(adam, tuple) or bool(adam),
            **{f"adam_{key}": True for key in adam_settings},
        }
        _refuse_keywords_of_matrices(cls, name, is_given)
        groups = decay_groups(model, no_decay, head)
    if parts:
        if spec is not None:
            _check_parts(spec, parts)
        groups = with_parts(groups, parts_of(model, head, adam), parts)
    return cls(groups if spec is not None else _for_any(cls, groups), **settings)


def _for_any(cls: type[torch.optim.Optimizer], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups for a class of another library: without names, and without weight decay if it has none."""
    accepted = inspect.signature(cls).parameters
    has_decay = "weight_decay" in accepted or any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    groups = [{**group, "params": [param for _, param in group["params"]]} for group in groups]
    return groups if has_decay else _without_decay(groups)


def _without_decay(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one group, or one for each part, without the key `weight_decay`."""
    merged: dict[str, dict[str, Any]] = {}
    for group in groups:
        own = {key: value for key, value in group.items() if key != "weight_decay"}
        first = merged.setdefault(group.get("part", ""), {**own, "params": []})
        first["params"] += group["params"]
    return list(merged.values())


def _check_parts(spec: OptimizerSpec, parts: Mapping[str, Mapping[str, Any]]) -> None:
    for part, keywords in parts.items():
        for key in keywords:
            if key not in spec.part_keywords(part):
                raise unknown_name(f"keyword in parts.{part} of {spec.name}", key, spec.part_keywords(part))


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


def _refuse_keywords_of_matrices(
    cls: type[torch.optim.Optimizer], name: str | type[torch.optim.Optimizer], is_given: Mapping[str, bool]
) -> None:
    shown = name if isinstance(name, str) else cls.__name__
    takers = ", ".join(spec.name for spec in SPECS.values() if spec.takes_matrices)
    for keyword, given in is_given.items():
        if given:
            raise ValueError(f"{keyword}: {shown} does not treat weights as matrices; these do: {takers}")
