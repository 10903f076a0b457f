"""Batch normalization over ranks: what one process computes over the whole batch, without waiting for a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.training.synchronized_norm import synchronize_batch_norms
from tests.optim.ranks import ranks
from tests.optim.test_launches import Log

EPS = torch.finfo(torch.float64).eps


def images(offset: float) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(6, 3, 5, 4, generator=draw, dtype=torch.float64) + offset).requires_grad_()


def norm(momentum: float | None, affine: bool) -> nn.Module:
    layer = nn.BatchNorm2d(3, momentum=momentum, affine=affine, dtype=torch.float64)
    if affine:
        nn.init.uniform_(layer.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(1))
        nn.init.uniform_(layer.bias, -1.0, 1.0, generator=torch.Generator().manual_seed(2))
    return layer


def pass_through(layer: nn.Module, x: Tensor, rows: slice) -> dict[str, Tensor]:
    """Two training passes of these rows, and an evaluation: outputs, gradients and running statistics."""
    targets = torch.linspace(-2, 2, x.numel(), dtype=x.dtype).view(x.shape)
    layer(x[rows] + 1)
    (output := layer(x[rows])).mul(targets[rows].sin()).sum().backward()
    layer.eval()
    assert x.grad is not None
    of_params = {f"{name}.grad": param.grad for name, param in layer.named_parameters() if param.grad is not None}
    buffers = {name: buffer.double() for name, buffer in layer.named_buffers()}
    return {"output": output, "evaluated": layer(x[rows]), "x.grad": x.grad[rows], **of_params, **buffers}


def of_a_rank(offset: float, momentum: float | None, affine: bool) -> dict[str, Tensor]:
    layer = norm(momentum, affine)
    synchronize_batch_norms(layer)
    rank = dist.get_rank()
    return {
        name: tensor.detach()
        for name, tensor in pass_through(layer, images(offset), slice(3 * rank, 3 * rank + 3)).items()
    }


@pytest.mark.parametrize(
    ("offset", "momentum", "affine"), [(0.0, 0.1, True), (1e5, 0.1, True), (0.0, None, True), (0.0, 0.1, False)]
)
def test_two_ranks_compute_what_one_computes_over_the_whole_batch(
    offset: float, momentum: float | None, affine: bool
) -> None:
    whole = pass_through(norm(momentum, affine), images(offset), slice(None))
    with ranks(2) as two:
        first, second = two.run(of_a_rank, offset, momentum, affine)
    # Sums of 120 values near `offset`, each rounded by EPS · offset. A variance as a difference of squares would be
    # wrong by EPS · offset², a hundred times as much.
    close = {"rtol": 0.0, "atol": 1000 * EPS * (1 + offset)}
    assert first.keys() == whole.keys()
    for name, expected in whole.items():
        if name in ("output", "evaluated", "x.grad"):
            torch.testing.assert_close(torch.cat([first[name], second[name]]), expected, **close)
        elif name.endswith(".grad"):
            torch.testing.assert_close(first[name] + second[name], expected, **close)
        else:
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], expected, **close)


def test_statistics_of_bfloat16_images_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    be_alone(monkeypatch)
    layer = nn.BatchNorm2d(3)
    plain = copy.deepcopy(layer)
    synchronize_batch_norms(layer)
    halves = images(30.0).detach().bfloat16()
    output, expected = layer(halves), plain(halves.float())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_host_never_waits_for_the_gpu(momentum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors have no backward pass of their own: the test calls the layer's."""
    be_alone(monkeypatch)
    with FakeTensorMode():
        layer = nn.BatchNorm2d(16, momentum=momentum, device="cuda")
        synchronize_batch_norms(layer)
        with Log() as log:
            output = layer(torch.empty(8, 16, 7, 7, device="cuda", dtype=torch.bfloat16, requires_grad=True))
            output.grad_fn.apply(torch.empty_like(output), None, None)
    assert log.waits == []
    assert log.launches["rsqrt"] == 1


def be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the only rank of a group, without a group."""

    def gather(into: list[Tensor], values: Tensor) -> None:
        into[0].copy_(values)

    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather", gather)
    monkeypatch.setattr(dist, "all_reduce", lambda values: None)
