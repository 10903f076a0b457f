"""A sharded model in bfloat16 keeps no layers from forward to backward, and computes what a whole one does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from models.gpt import GPT, next_token_loss
from models.vision import build_classifier
from pipelines.config import RuntimeSettings, TransformerSettings
from pipelines.training.distributed import Ranks
from pipelines.training.parallel import gradients_synchronized, place_model
from tests.optim.ranks import ranks

CPU = torch.device("cpu")
VOCABULARY, WIDTH = 80, 64


def decoder(kind: str) -> nn.Module:
    """A decoder with gains that bfloat16 rounds."""
    torch.manual_seed(0)
    shape = {"context_length": 16, "n_layers": 4, "n_heads": 2, "d_model": WIDTH}
    if kind == "gpt":
        model: nn.Module = GPT(vocab_size=VOCABULARY, d_ff=4 * WIDTH, **shape)
    else:
        halves = "bfloat16" if kind == "transformer with a bfloat16 embedding" else "float32"
        model = TransformerSettings(kind="transformer", d_ff=2 * WIDTH, embedding_dtype=halves, **shape).build(
            VOCABULARY
        )
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.normal_(param, 1.0, 0.1)
    return model


def block_bytes(model: nn.Module) -> int:
    """Bytes of the matrices of all layers in bfloat16."""
    return sum(2 * param.numel() for name, param in model.named_parameters() if "blocks" in name and param.ndim == 2)


def train_twice(model: nn.Module, loss_of: nn.Module) -> dict[str, Any]:
    """Loss and gradients of two micro-batches, and the bytes of layer weights that the graph of one keeps."""
    shapes = {tuple(sorted(param.shape)) for name, param in model.named_parameters() if "blocks" in name}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        is_copy = tensor.dtype == torch.bfloat16 and not isinstance(tensor, nn.Parameter)
        if is_copy and tuple(sorted(tensor.shape)) in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    losses = []
    for part in range(2):
        kept.clear()
        tokens = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(part))
        with gradients_synchronized(loss_of, part == 1), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16):
                logits = loss_of(tokens[:, :-1])
            loss = next_token_loss(logits, tokens[:, 1:])
            bytes_kept = sum(storage.nbytes() for storage in kept.values())
            loss.backward()
        losses.append(loss.item())
    grads = {
        name: grad.full_tensor() if isinstance(grad := param.grad, DTensor) else grad
        for name, param in model.named_parameters()
    }
    return {"losses": losses, "kept": bytes_kept, "grads": grads, "logits": logits.dtype}


def compare(kind: str) -> dict[str, float]:
    """On each rank: what a sharded model keeps, and how far its losses and gradients are from a whole one's."""
    whole = decoder(kind)
    own = Ranks(dist.get_rank(), dist.get_world_size(), dist.PrefixStore("test", dist.HashStore()))
    sharded = place_model(copy.deepcopy(whole), CPU, own, RuntimeSettings(shard_model=True), torch.bfloat16)
    expected, found = train_twice(whole, whole), train_twice(sharded, sharded)
    assert {param.dtype for param in sharded.parameters()} == {param.dtype for param in whole.parameters()}
    assert found["logits"] == expected["logits"]
    off, size = (
        torch.stack([torch.linalg.vector_norm(each) for each in grads]).norm()
        for grads in (
            [found["grads"][name] - grad for name, grad in expected["grads"].items()],
            list(expected["grads"].values()),
        )
    )
    return {
        "whole keeps": expected["kept"] / block_bytes(whole),
        "kept": found["kept"] / block_bytes(whole),
        "loss": max(abs(a - b) / b for a, b in zip(found["losses"], expected["losses"], strict=True)),
        "gradient": (off / size).item(),
    }


@pytest.mark.parametrize("kind", ["gpt", "transformer", "transformer with a bfloat16 embedding"])
def test_a_sharded_model_in_bfloat16_keeps_no_layers_and_agrees_with_a_whole_one(kind: str) -> None:
    with ranks(2) as two:
        for result in two.run(compare, kind):
            assert result["whole keeps"] == pytest.approx(1.0, abs=0.01)
            assert result["kept"] <= 0.02
            assert result["loss"] <= 2**-8
            assert result["gradient"] <= 2**-7


def classify(name: str) -> dict[str, Any]:
    """On each rank: how far gradients in bfloat16, of a whole and a sharded classifier, are from float32's."""
    torch.manual_seed(0)
    exact = build_classifier(name, 8, resolution=32)
    whole = copy.deepcopy(exact)
    own = Ranks(dist.get_rank(), dist.get_world_size(), dist.PrefixStore("test", dist.HashStore()))
    sharded = place_model(copy.deepcopy(exact), CPU, own, RuntimeSettings(shard_model=True), torch.bfloat16)
    computed_in: set[torch.dtype] = set()
    for module in sharded.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(lambda layer, inputs: computed_in.add(layer.weight.dtype))
    images, labels, rows = torch.randn(8, 3, 32, 32), torch.arange(8), slice(4 * own.rank, 4 * own.rank + 4)
    for model, part in ((exact, slice(None)), (whole, slice(None)), (sharded, rows)):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            logits = model(images[part]).float()
            model.eval()(images[part])
        functional.cross_entropy(logits, labels[part]).backward()
    expected, of_whole, of_sharded = (
        torch.cat([_whole(param.grad).flatten() for param in model.parameters()]) for model in (exact, whole, sharded)
    )
    return {
        "whole": (of_whole - expected).norm().item(),
        "sharded": (of_sharded - expected).norm().item(),
        "computed in": computed_in,
    }


def _whole(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


@pytest.mark.parametrize(("name", "in_bfloat16"), [("vit_tiny", True), ("resnet20", False)])
def test_a_sharded_classifier_in_bfloat16_agrees_with_a_whole_one(name: str, in_bfloat16: bool) -> None:
    """Batch normalization has float32 statistics, so its layers stay in float32."""
    with ranks(2) as two:
        for result in two.run(classify, name):
            assert (torch.bfloat16 in result["computed in"]) == in_bfloat16
            assert 0 < result["sharded"] <= 2 * result["whole"]
