"""On a GPU the optimizers take the same steps as on the CPU, up to the precision of their roots.

Also what only a GPU has: CUDA graphs, steps that wait for nothing, parameters on two devices.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from optim import build_optimizer, elementwise
from optim.matrix_functions import inverse_root_eigh

from .cases import DESCRIPTIONS, Description, every_optimizer, noise, set_gradient, start
from .steps import assert_identical, make_params, parameters, run, set_gradients, weights, with_fallback

pytestmark = pytest.mark.gpu

CLOSE = {"rtol": 1e-4, "atol": 1e-5}

SETTINGS: dict[str, dict[str, Any]] = {
    "asgo": {},
    "dasgo": {},
    "muon": {},
    "shampoo": {},
    "asro": {"lr": 1e-2, "decrement": 0.1, "min_scale": 0.1},
    "accasro": {"lr": 1e-2, "increment": 0.1, "decrement": 0.1, "max_scale": 2.0, "min_scale": 0.1},
}
# Muon computes in bfloat16 there; the others' roots are iterations in float32.
TOLERANCE = {"muon": 5e-2, "asgo": 2e-2, "shampoo": 2e-2}


def updates(name: str, device: str) -> list[torch.Tensor]:
    """The change of every weight of a small model after three steps with the same gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.Linear(48, 24), torch.nn.Linear(24, 8)).to(device)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = build_optimizer(model, name, 3, **SETTINGS[name])
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step()
    return [(param - old).detach().cpu() for param, old in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("name", SETTINGS)
def test_updates_agree_with_the_cpu(name: str) -> None:
    for ours, expected in zip(updates(name, "cuda"), updates(name, "cpu"), strict=True):
        error = torch.linalg.vector_norm(ours - expected) / torch.linalg.vector_norm(expected)
        assert error < TOLERANCE.get(name, 1e-4)


def test_a_root_that_is_not_finite_is_reported_once_it_has_arrived() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).cuda()
    optimizer = build_optimizer(model, "asgo", 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer.state[model[0].weight]["preconditioner"].fill_(torch.nan)  # no gradient can do this
            torch.cuda.synchronize()
    assert len(caught) == 1
    assert "0.weight" in str(caught[0].message)


def test_what_the_device_cannot_decompose_is_decomposed_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    matrices = factor @ factor.mT
    expected = inverse_root_eigh(matrices, 2)
    eigh = torch.linalg.eigh

    def fails_on_the_device(matrix: Tensor) -> Any:
        if matrix.device.type == "cuda":
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_on_the_device)
    torch.testing.assert_close(inverse_root_eigh(matrices.cuda(), 2).cpu(), expected, **CLOSE)


def build_on_cuda(case: Description, dtype: torch.dtype = torch.float32, **keywords: Any) -> torch.optim.Optimizer:
    """An optimizer of parameters on the GPU, the second half under its fallback, with the roots that a GPU computes."""
    roots = {"root_method": "auto"} if "root_method" in case.overrides else {}
    return case.build(with_fallback(case, make_params(dtype, "cuda")), **roots, **keywords)


def set_gradients_in_place(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients at addresses that stay, as a CUDA graph needs them."""
    for index, param in enumerate(parameters(optimizer)):
        gradient = torch.tensor(noise(tuple(param.shape), 1, 100 * step + index)[0], dtype=param.dtype)
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        param.grad.copy_(gradient)


# --- CUDA graphs


def captured(step: Any, warm_up: int) -> torch.cuda.CUDAGraph:
    """A graph of `step()`, which has been taken `warm_up` times on a side stream before, as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(warm_up):
            step(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(None)
    return graph


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@every_optimizer
def test_a_captured_step_is_the_step(case: Description, maximize: bool) -> None:
    """Step counts go on in the graph, and so does a learning rate that is a tensor on the GPU."""
    lr = torch.tensor(0.1, device="cuda")
    optimizer = build_on_cuda(case, lr=lr, capturable=True, maximize=maximize)
    expected = build_on_cuda(case, maximize=maximize)

    def step(index: int | None) -> None:
        if index is not None:
            set_gradients_in_place(optimizer, index)
        optimizer.step()

    graph = captured(step, warm_up=3)
    for index in range(10):
        rate = 0.1 if index < 3 else 0.1 / index
        if index >= 3:
            set_gradients_in_place(optimizer, index)
            lr.fill_(rate)
            graph.replay()
        for group in expected.param_groups:
            group["lr"] = rate
        set_gradients_in_place(expected, index)
        expected.step()
    torch.testing.assert_close(weights(optimizer), weights(expected), **CLOSE)


@every_optimizer
def test_forward_backward_and_step_in_one_graph(case: Description) -> None:
    inputs = torch.randn(16, 6, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def training(**keywords: Any) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, 6, bias=False)).cuda()
        roots = {"root_method": "auto"} if "root_method" in case.overrides else {}
        optimizer = case.build(list(model.named_parameters()), lr=0.05, **roots, **keywords)

        def step(index: int | None) -> None:
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.mse_loss(model(inputs), inputs).backward()
            optimizer.step()

        return model, step

    model, step = training(capturable=True)
    graph = captured(step, warm_up=3)
    for _ in range(7):
        graph.replay()
    expected_model, expected_step = training()
    for index in range(10):
        expected_step(index)
    for param, expected in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(param, expected, **CLOSE)


@every_optimizer
def test_a_step_that_is_not_capturable_refuses_to_be_captured(case: Description) -> None:
    """Its count of steps would stand still in the graph, and the numbers would be wrong without a word."""
    optimizer = build_on_cuda(case)
    set_gradients_in_place(optimizer, 0)
    optimizer.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


# --- Nothing waits


@pytest.fixture
def no_waiting() -> Iterator[Any]:
    """Call it to make every wait of the host for the GPU an error, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_optimizer
def test_a_step_never_waits_for_the_gpu(case: Description, dtype: torch.dtype, lr: Any, no_waiting: Any) -> None:
    optimizer = build_on_cuda(case, dtype, lr=lr)
    for index in range(2):
        set_gradients_in_place(optimizer, index)
        optimizer.step()
    no_waiting()
    for _ in range(3):
        optimizer.step()


@pytest.mark.parametrize("case", [c for c in DESCRIPTIONS if "precond_frequency" in c.overrides], ids=lambda c: c.name)
def test_roots_refreshed_on_schedule_wait_for_nothing(case: Description, no_waiting: Any) -> None:
    optimizer = build_on_cuda(case, precond_frequency=2)
    set_gradients_in_place(optimizer, 0)
    optimizer.step()
    no_waiting()
    for _ in range(4):
        optimizer.step()


# --- Two devices


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@every_optimizer
def test_one_optimizer_may_have_parameters_on_two_devices(case: Description, lr: Any) -> None:
    """Of one shape and in one group; each does what it would do alone."""
    places = ["cpu", "cuda", "cpu", "cuda"]
    values = [torch.tensor(start((4, 3), seed), dtype=torch.float32) for seed in range(4)]
    roots = {"root_method": "newton"} if "root_method" in case.overrides else {}
    mixed = [torch.nn.Parameter(value.to(place)) for value, place in zip(values, places, strict=True)]
    apart = [case.build([torch.nn.Parameter(v.to(p))], **roots) for v, p in zip(values, places, strict=True)]
    together = case.build(mixed, lr=lr, **roots)
    for step in range(4):
        for seed, (param, alone) in enumerate(zip(mixed, apart, strict=True)):
            for each in (param, *parameters(alone)):
                set_gradient(each, noise((4, 3), 1, 10 * step + seed)[0])
            alone.step()
        together.step()
    for param, alone, place in zip(mixed, apart, places, strict=True):
        assert param.device.type == place
        assert together.state[param]["exp_avg"].device.type == place
        torch.testing.assert_close(param, parameters(alone)[0], **CLOSE)


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")], ids=["to the GPU", "to the CPU"])
@every_optimizer
def test_a_state_moves_to_the_parameters_device(case: Description, first: str, second: str) -> None:
    roots = {"root_method": "newton"} if "root_method" in case.overrides else {}
    saved = case.build(with_fallback(case, make_params(device=first)), **roots)
    run(saved, range(3))
    there = [torch.nn.Parameter(weight.to(second)) for weight in weights(saved)]
    loaded = case.build(with_fallback(case, there), **roots)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for param in there:
        tensors = {key: value for key, value in loaded.state[param].items() if key != "step"}
        assert {value.device.type for value in tensors.values()} <= {second}
    run(saved, range(3, 6))
    run(loaded, range(3, 6))
    tolerance = TOLERANCE.get(case.name.lower(), 1e-4)
    for mine, expected in zip(weights(loaded), weights(saved), strict=True):
        assert torch.linalg.vector_norm(mine.cpu() - expected.cpu()) < tolerance * torch.linalg.vector_norm(expected)


# --- Mixed precision, compilation


@every_optimizer
def test_the_gradient_scaler_skips_a_step_with_an_infinite_gradient(case: Description) -> None:
    scaled, plain = build_on_cuda(case), build_on_cuda(case)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for step in range(6):
        set_gradients(plain, step)
        pairs = [(p, like.grad) for p, like in zip(parameters(scaled), parameters(plain), strict=True)]
        scaled.zero_grad()
        scaler.scale(sum((param * grad).sum() for param, grad in pairs if grad is not None)).backward()
        if step == 2:
            parameters(scaled)[3].grad[0, 0, 0, 0] = float("inf")
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update()
        assert scaler.get_scale() == (1024.0 if step < 2 else 512.0)
    assert_identical(scaled, plain)


@every_optimizer
def test_it_trains_in_half_precision_with_a_gradient_scaler(case: Description) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False)).cuda()
    inputs, targets = torch.randn(64, 8, device="cuda"), torch.randn(64, 4, device="cuda")
    optimizer = case.build(list(model.named_parameters()), lr=0.02, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("case", [c for c in DESCRIPTIONS if not c.matrix], ids=lambda c: c.name)
def test_large_parameters_compile_once_for_all_learning_rates(
    case: Description, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled update is the update operation by operation, and no new rate or step compiles it anew."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    generator = torch.Generator("cuda").manual_seed(0)
    value = torch.randn(elementwise.COMPILE_FROM, device="cuda", generator=generator)
    gradients = [torch.randn(value.shape, device="cuda", generator=generator) for _ in range(6)]

    def train() -> tuple[Tensor, list[int]]:
        param, graphs = torch.nn.Parameter(value.clone()), []
        optimizer = case.build([param])
        for step, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            param.grad = gradient
            optimizer.step()
            graphs.append(counters["stats"]["unique_graphs"])
        return param.detach(), graphs

    in_one_graph, graphs = train()
    assert graphs == [1] * 6
    monkeypatch.setattr(elementwise, "COMPILE_FROM", value.numel() + 1)
    torch.testing.assert_close(in_one_graph, train()[0], **CLOSE)
