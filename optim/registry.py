"""Optimizers by name, and one optimizer for a whole model."""

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
    """The class behind a name and the keywords that belong to the name; `ValueError` for an unknown one."""
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
    """One optimizer for all trainable parameters of a model, each under the rule that fits it.

    Matrix optimizers (`asgo`, `dasgo`, `muon`, `shampoo`) take the hidden weight matrices and leave the rest to Adam
    (see `optim.groups.matrix_groups`). All others take every parameter, with weight decay on those of two or more
    dimensions. A model that is wrapped in DDP, `torch.compile`, PEFT and the like is treated as the bare one.

    Args:
        model: any module; parameters that need no gradient are left out.
        name: one of `OPTIMIZER_NAMES`.
        total_steps: steps of the whole training; read by `accasro` alone.
        row_blocks: for matrix optimizers, by parameter name, weights whose blocks of rows are matrices of their own:
            the number of equal blocks, or the rows of each block. A head's query and key can so be preconditioned on
            their own, as arXiv 2503.20762 does in practice, also where they share a weight with the values:
            `row_blocks={"transformer.h.0.attn.c_attn.weight": (64,) * 24 + (768,)}` takes the queries and keys of
            nanoGPT's 12 heads one by one and the values whole. Rows are outputs, as in `nn.Linear`; Hugging Face's
            GPT-2 stores that weight transposed, so its heads are columns and cannot be split like this.
        by_heads: split what `model.attention_row_blocks()` names, as `models.gpt.GPT` has it; `row_blocks` comes on
            top.
        head: the layers that make the model's outputs, which take Adam under a matrix optimizer: modules, parameters,
            or their names, with wildcards (`"*.classifier"`). Found automatically where it is not given; `()` for none.
        adam: for matrix optimizers, what else takes Adam, named alike.
        no_decay: `embeddings`, `head` or both: they take no weight decay. Matrix optimizers leave these to Adam
            without decay in any case, so a comparison with them is on equal terms only where its rivals do too.
        settings: keywords of the optimizer's constructor.

    Raises:
        ValueError: an unknown name, a keyword that the optimizer does not have or that is out of range, an unknown
            word in `no_decay`, blocks for a parameter or an optimizer that has none, or a head or an exception that is
            not the model's.

    Warns (`UserWarning`) where a matrix optimizer leaves most of a model's matrices to Adam, such as flat shards of
    FSDP1, or parameters whose names tell nothing.
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
    """The keywords of the constructor; `ValueError` for one that it does not have."""
    accepted = inspect.signature(cls).parameters
    for key in keywords:
        if key not in accepted:
            raise unknown_name(f"keyword of {name}", key, [key for key in accepted if key != "params"])
    return {**keywords, "total_steps": total_steps} if "total_steps" in accepted else keywords


def _attention_row_blocks(model: nn.Module) -> RowBlocks:
    for module in unwrapped(model):
        if hasattr(module, "attention_row_blocks"):
            return cast(RowBlocks, cast(Any, module).attention_row_blocks())
    raise ValueError(f"by_heads: {type(model).__name__} has no attention_row_blocks(); name its blocks in row_blocks")


def _no_matrices(name: str, keyword: str) -> ValueError:
    takers = ", ".join(spec.name for spec in SPECS.values() if spec.takes_matrices)
    return ValueError(f"{keyword}: {name} does not treat weights as matrices; these do: {takers}")
