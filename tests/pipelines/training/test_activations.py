"""With `training.activations=bf16`, the residual stream is in bfloat16, and the loss is the same up to its rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.tasks import task_of
from pipelines.training.distributed import ALONE
from tests.conftest import SMALL

Make = Callable[..., RunConfig]
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("tiny", {}),
    "transformer": ("llama-tiny", {"model.embedding_norm": True, "model.qk_norm": True}),
    "transformer with layer norms": ("llama-tiny", {"model.norm": "layer", "model.positions": "learned"}),
}


def first_micro_batch(config: RunConfig) -> tuple[float, set[torch.dtype], int]:
    """Its loss, the dtypes that layers get, and the bytes of all tensors that the backward pass needs."""
    torch.manual_seed(0)
    task = task_of(config).build(config, torch.device("cpu"), ALONE)
    dtypes: set[torch.dtype] = set()
    kept: dict[int, torch.UntypedStorage] = {}
    for block in task.model.blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(lambda block, inputs: dtypes.add(inputs[0].dtype))

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(next(iter(task.micro_batches(0))))
    loss.backward()
    assert all(param.grad is not None and param.grad.dtype == param.dtype for param in task.model.parameters())
    return loss.item(), dtypes, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_residual_stream_is_in_bfloat16(decoder: str, token_folder: Path) -> None:
    preset, settings = DECODERS[decoder]
    shape = {**SMALL, "model.n_kv_heads": 2} if preset == "llama-tiny" else SMALL
    values = {**shape, **settings, "data.folder": str(token_folder), "training.precision": "bf16"}

    def configured(activations: str) -> RunConfig:
        return resolve([preset_layer("gpt", preset), Layer("test", {**values, "training.activations": activations})])

    loss, dtypes, kept = first_micro_batch(configured("fp32"))
    own_loss, own_dtypes, own_kept = first_micro_batch(configured("bf16"))
    assert (dtypes, own_dtypes) == ({torch.float32}, {torch.bfloat16})
    assert own_loss == pytest.approx(loss, rel=2**-8)
    assert own_kept < kept


def test_without_a_forward_pass_in_bfloat16_nothing_changes(small_config: Make) -> None:
    assert first_micro_batch(small_config()) == first_micro_batch(small_config(training__activations="bf16"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_another_precision_is_refused(precision: str, small_config: Make) -> None:
    with pytest.raises((UsageError, ValidationError), match="activations=bf16 needs precision=bf16"):
        small_config(training__activations="bf16", training__precision=precision)
