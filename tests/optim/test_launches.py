"""On fake CUDA tensors, which need no GPU: a step copies nothing between host and device, and launches few kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optim import build_optimizer, elementwise, rows
from optim.specs import OPTIMIZER_NAMES, SPECS

SETTINGS: dict[str, dict[str, Any]] = {
    "asro": {"lr": 1e-3, "decrement": 2e-4, "min_scale": 0.01},
    "accasro": {"lr": 1e-3, "increment": 0.05, "decrement": 2e-4, "max_scale": 5.0, "min_scale": 0.1},
}
COPIES = {"_to_copy", "copy_", "lift_fresh_copy", "_foreach_copy_"}
NOT_LAUNCHED = {
    "_local_scalar_dense", "alias", "as_strided", "detach", "device", "empty", "empty_like", "expand", "new_empty",
    "permute", "select", "slice", "split", "split_with_sizes", "t", "transpose", "unbind", "unsqueeze", "view",
    "_unsafe_view",
}  # fmt: skip


class Log(TorchDispatchMode):
    """Counts operations on CUDA tensors, and lists what makes the host wait for the device or copy to it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        devices = {each.device.type for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)}
        if "cuda" in devices and (name == "_local_scalar_dense" or (name in COPIES and "cpu" in devices)):
            self.waits.append(name)
        if "cuda" in devices and name not in NOT_LAUNCHED:
            self.launches[name] += 1
        return result


@pytest.fixture(autouse=True)
def fake_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fake step count on the CPU cannot be read: any number stands for it."""

    def on_host(value: Any) -> Any:
        return 2.0 if isinstance(value, Tensor) and value.device.type == "cpu" else value

    monkeypatch.setattr(elementwise, "on_host", on_host)
    monkeypatch.setattr(elementwise, "COMPILE_FROM", 10**12)  # compilation needs a real GPU
    with FakeTensorMode():
        yield


def gpt2_layer(layers: int = 1) -> nn.Module:
    def layer() -> list[nn.Module]:
        square = [nn.Linear(768, 768) for _ in range(4)]
        return [nn.LayerNorm(768), *square, nn.LayerNorm(768), nn.Linear(768, 3072), nn.Linear(3072, 768)]

    with torch.device("cuda"):
        return nn.Sequential(*[module for _ in range(layers) for module in layer()])


def logged_step(optimizer: torch.optim.Optimizer) -> Log:
    """Log the second step: the first one makes the state."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.empty_like(param)
    optimizer.step()
    with Log() as log:
        optimizer.step()
    return log


def settings_of(name: str) -> dict[str, Any]:
    return SETTINGS.get(name, {} if SPECS[name].takes_matrices else {"lr": 1e-3})


# PyTorch's fused SGD has no fake kernel.
@pytest.mark.parametrize("name", [name for name in OPTIMIZER_NAMES if not name.startswith("sgd")])
def test_a_step_copies_nothing_and_waits_for_nothing(name: str) -> None:
    log = logged_step(build_optimizer(gpt2_layer(), name, 10, **settings_of(name)))
    assert log.waits == []
    assert log.launches


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_roots_by_cholesky_copy_nothing(precision: str) -> None:
    optimizer = build_optimizer(
        gpt2_layer(), "asgo", 10, root_method="cholesky", root_steps=8, root_precision=precision
    )
    log = logged_step(optimizer)
    assert log.waits == []
    assert log.launches["linalg_cholesky_ex"] == 1  # all matrices have one side of 768
    assert log.launches["baddbmm"] == 24 + 2  # three products a step of Polar Express, and two Gram products


@pytest.mark.parametrize(
    ("name", "most"), [("asgo", 240), ("dasgo", 125), ("muon", 80), ("shampoo", 900), ("adamw", 4), ("amsgrad", 4)]
)
def test_gpt2_is_stepped_in_few_launches(name: str, most: int) -> None:
    """A layer after another, DASGO made 670 of them."""
    log = logged_step(build_optimizer(gpt2_layer(12), name, 10, **settings_of(name)))
    assert sum(log.launches.values()) <= most


@pytest.mark.parametrize(("name", "most"), [("asro", 45), ("accasro", 60)])
def test_vectors_are_stepped_together(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's 97 vectors are too few elements to compile for: one after another they were 2,000 launches."""
    monkeypatch.setattr(rows, "is_plain", lambda tensor: True)
    vectors = [param for param in gpt2_layer(12).parameters() if param.ndim == 1]
    model = nn.Module()
    for index, vector in enumerate(vectors):
        model.register_parameter(str(index), vector)
    log = logged_step(build_optimizer(model, name, 10, **SETTINGS[name]))
    assert len(vectors) > 90
    assert sum(log.launches.values()) <= most
