"""Optimizer classes by name, and `build_optimizer` for a whole model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
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
    name: str | Callable[..., torch.optim.Optimizer],
    total_steps: int,
    *,
    row_blocks: RowBlocks | None = None,
    by_heads: bool = False,
    head: Selection | None = None,
    adam: Selection = (),
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
        row_blocks: for matrix optimizers, parameters by name whose blocks of rows are separate matrices; see
            `optim.groups.matrix_groups`.
        by_heads: use the blocks of `model.attention_row_blocks()`, as in `models.gpt.GPT`; those in `row_blocks` win.
        head: output heads, which use Adam with a matrix optimizer: modules, parameters, or their names, with wildcards
            (`"*.classifier"`). Default: detected; `()` for none.
        adam: for matrix optimizers, further modules or parameters that use Adam, selected like `head`.
        no_decay: parameters without weight decay: `embeddings`, `head`, or names, with wildcards. Matrix optimizers do
            not decay embeddings and heads by default, so a fair comparison needs it for the other optimizers.
        parts: keywords for parts of the model (`optim.specs.PARTS`), such as `{"embedding": {"lr": 0.3}}`.
        settings: keywords of the constructor; for matrix optimizers also `adam_lr`, `adam_betas`, `adam_eps` and
            `adam_weight_decay`. Adam decays only parameters with at least two dimensions.

    Raises:
        ValueError: an unknown name, an unknown or invalid keyword, or a parameter or part that the model does not have.

    Warns (`UserWarning`) if a matrix optimizer applies Adam to most elements of possible matrices, such as flat shards
    of FSDP1, or parameters whose names do not identify weights.
    """
    cls, spec, keywords = _class_of(name, total_steps, settings)
    adam_settings = {key: keywords.pop(f"adam_{key}") for key in ADAM_KEYWORDS if f"adam_{key}" in keywords}
    if spec is not None and spec.takes_matrices:
        heads = _attention_row_blocks(model) if by_heads else {}
        groups = matrix_groups(model, {**heads, **(row_blocks or {})}, head, adam)
        groups = with_adam(groups, adam_settings, undecayed(model, no_decay, head))
    else:
        is_unused = head is not None and "head" not in no_decay and not parts
        given = {"row_blocks": row_blocks is not None, "by_heads": by_heads, "head": is_unused, "adam": adam != ()}
        _refuse_keywords_of_matrices(getattr(cls, "__name__", "it") if spec is None else spec.name, given)
        groups = decay_groups(model, no_decay, head)
    if parts:
        if spec is not None:
            _check_parts(spec, parts)
        groups = with_parts(groups, parts_of(model, head, adam), parts)
    return cls(groups if spec is not None else _for_any(cls, groups), **keywords)


def _class_of(
    name: str | Callable[..., torch.optim.Optimizer], total_steps: int, settings: Mapping[str, Any]
) -> tuple[Callable[..., torch.optim.Optimizer], OptimizerSpec | None, dict[str, Any]]:
    """Return the class, its specification if it has one, and the keywords. Raises `ValueError` for an unknown one."""
    if not isinstance(name, str):
        return name, None, dict(settings)
    cls, fixed = optimizer_class(name)
    spec = SPECS[name]
    accepted = inspect.signature(cls).parameters
    known = [key for key in accepted if key != "params"]
    known += [f"adam_{key}" for key in ADAM_KEYWORDS] if spec.takes_matrices else []
    for key in settings:
        if key not in known:
            raise unknown_name(f"keyword of {name}", key, known)
    length = {"total_steps": total_steps} if "total_steps" in accepted else {}
    return cls, spec, {**fixed, **settings, **length}


def _for_any(cls: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def _attention_row_blocks(model: nn.Module) -> RowBlocks:
    for module in unwrapped(model):
        if hasattr(module, "attention_row_blocks"):
            return cast(RowBlocks, cast(Any, module).attention_row_blocks())
    raise ValueError(f"by_heads: {type(model).__name__} has no attention_row_blocks(); use row_blocks instead")


def _refuse_keywords_of_matrices(name: str, given: Mapping[str, bool]) -> None:
    takers = ", ".join(spec.name for spec in SPECS.values() if spec.takes_matrices)
    for keyword, is_given in given.items():
        if is_given:
            raise ValueError(f"{keyword}: {name} does not treat weights as matrices; these do: {takers}")
