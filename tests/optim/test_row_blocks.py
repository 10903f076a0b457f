"""`row_blocks`: blocks of a parameter's rows, each a matrix of its own, as if they were separate parameters."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optim import AccAsro, Asro, build_optimizer

from .cases import Description, full_rank, matrix_optimizers, parameter, relative_error, set_gradient, start
from .steps import assert_identical, copies, run

SPLITS = [
    pytest.param((12, 6), 3, id="wide-blocks"),
    pytest.param((6, 12), 2, id="wide-blocks-of-a-wide-matrix"),
    pytest.param((12, 3), 2, id="tall-blocks"),
    pytest.param((12, 4), 3, id="square-blocks"),
    pytest.param((4, 5), 4, id="single-rows"),
    pytest.param((12, 6), (4, 4, 4), id="equal-tuple"),
    pytest.param((20, 4), (4, 4, 4, 8), id="fused-qkv-of-two-heads-and-whole-values"),
    pytest.param((9, 5), (1, 6, 2), id="wide-and-tall-blocks"),
    pytest.param((9, 2, 3, 3), 3, id="convolution"),
    pytest.param((9, 2, 3, 3), (6, 3), id="convolution-tuple"),
]
LAYOUTS = [(6, 4), (4, 6), (5, 5)]


def sizes_of(rows: int, blocks: int | tuple[int, ...]) -> list[int]:
    return [rows // blocks] * blocks if isinstance(blocks, int) else list(blocks)


def block_gradients(shape: tuple[int, ...], blocks: int | tuple[int, ...], steps: int = 6) -> list[np.ndarray]:
    """Gradients whose every block has full rank, so that its roots are well conditioned."""
    parts = [full_rank((rows, *shape[1:]), steps, seed) for seed, rows in enumerate(sizes_of(shape[0], blocks))]
    return [np.concatenate(step) for step in zip(*parts, strict=True)]


def assert_equals_separate_parameters(
    case: Description,
    whole: nn.Parameter,
    blocks: int | tuple[int, ...],
    gradients: list[np.ndarray | None],
    tolerance: float = 1e-9,
    **keywords: Any,
) -> None:
    sizes = sizes_of(whole.shape[0], blocks)
    parts = [nn.Parameter(part.detach().clone()) for part in whole.split(sizes)]
    optimizers = (
        case.build([{"params": [whole], "row_blocks": blocks}], weight_decay=0.3, **keywords),
        case.build(parts, weight_decay=0.3, **keywords),
    )
    for step, gradient in enumerate(gradients):
        set_gradient(whole, gradient)
        for part, grad in zip(parts, [None] * len(sizes) if gradient is None else whole.grad.split(sizes), strict=True):
            part.grad = None if grad is None else grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        expected = torch.cat(parts).detach().double().numpy()
        assert relative_error(whole, expected) <= tolerance, f"step {step + 1}"


@pytest.mark.parametrize(("shape", "blocks"), SPLITS)
@matrix_optimizers
def test_blocks_equal_separate_parameters(case, shape, blocks):
    assert_equals_separate_parameters(case, parameter(start(shape)), blocks, block_gradients(shape, blocks))


@pytest.mark.parametrize(("shape", "blocks"), SPLITS)
@matrix_optimizers
def test_every_block_follows_the_reference(case, shape, blocks):
    """Against the algorithm, not against our own treatment of separate parameters."""
    param = parameter(start(shape))
    cuts = np.cumsum(sizes_of(shape[0], blocks))[:-1]
    refers = [case.refer(w, weight_decay=0.3) for w in np.split(param.detach().numpy(), cuts)]
    optimizer = case.build([{"params": [param], "row_blocks": blocks}], weight_decay=0.3)
    for gradient in block_gradients(shape, blocks):
        set_gradient(param, gradient)
        optimizer.step()
        for refer, part in zip(refers, np.split(gradient, cuts), strict=True):
            refer.step(part)
        assert relative_error(param, np.concatenate([refer.parameter for refer in refers])) <= 1e-9


@pytest.mark.parametrize("blocks", [2, (2, 4)], ids=str)
@matrix_optimizers
def test_each_keyword_reaches_the_blocks(case, blocks):
    gradients = block_gradients((6, 5), blocks)
    for keyword, value in case.overrides.items():
        if keyword != "weight_decay":
            param = parameter(start((6, 5)))
            # Iterations that are cut short magnify the order of a sum.
            assert_equals_separate_parameters(case, param, blocks, gradients, 1e-6, **{keyword: value})


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
@matrix_optimizers
def test_a_transposed_parameter_is_split_by_its_own_rows(case, shape):
    """Stored column by column, as a transposed view is."""
    blocks = (shape[0] - 2, 2)
    param = nn.Parameter(torch.tensor(start(shape[::-1])).t())
    assert not param.is_contiguous()
    assert_equals_separate_parameters(case, param, blocks, block_gradients(shape, blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@matrix_optimizers
def test_blocks_of_lower_precision_equal_separate_parameters(case, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    gradients = block_gradients((9, 4), (6, 3))
    assert_equals_separate_parameters(case, parameter(start((9, 4)), dtype), (6, 3), gradients, tolerance)


@matrix_optimizers
def test_a_step_without_a_gradient_moves_no_block(case):
    gradients: list[np.ndarray | None] = [*block_gradients((6, 4), 2)]
    gradients[0] = gradients[3] = None
    assert_equals_separate_parameters(case, parameter(start((6, 4))), 2, gradients)


@matrix_optimizers
def test_blocks_are_not_the_whole(case):
    params = [parameter(start((12, 6))) for _ in range(2)]
    optimizer = case.build([{"params": params[:1], "row_blocks": 3}, {"params": params[1:]}])
    for gradient in block_gradients((12, 6), 3):
        for param in params:
            set_gradient(param, gradient)
        optimizer.step()
    assert relative_error(params[0], params[1].detach().numpy()) > 1e-3


@pytest.mark.parametrize("blocks", [1, (6,)], ids=str)
@matrix_optimizers
def test_one_block_is_the_whole(case, blocks):
    params = [parameter(start((6, 4))) for _ in range(2)]
    optimizer = case.build([{"params": params[:1], "row_blocks": blocks}, {"params": params[1:]}])
    for gradient in full_rank((6, 4)):
        for param in params:
            set_gradient(param, gradient)
        optimizer.step()
    assert torch.equal(*params)


@matrix_optimizers
def test_blocks_a_group_of_several_shapes_and_other_groups_do_not_mix(case):
    """Blocks of 4 × 5 come from two parameters of a group, and as a whole from another group and as Adam's."""
    shapes, blocks = [(8, 5), (12, 5), (8, 3), (4, 5), (4, 5)], [4, 4, 4, None, None]
    params = [parameter(start(shape, seed)) for seed, shape in enumerate(shapes)]
    alone = [nn.Parameter(param.detach().clone()) for param in params]
    together = case.build(
        [{"params": params[:3], "row_blocks": 4}, {"params": params[3:4]}, {"params": params[4:], "rule": "adam"}]
    )
    separate = [
        case.build([{"params": [param], **extra}])
        for param, extra in zip(
            alone, [*({"row_blocks": count} for count in blocks[:3]), {}, {"rule": "adam"}], strict=True
        )
    ]
    for step in range(5):
        for index, (mine, other) in enumerate(zip(params, alone, strict=True)):
            gradient = block_gradients(shapes[index], blocks[index] or 1, 5)[step]
            set_gradient(mine, gradient)
            set_gradient(other, gradient)
        for optimizer in (together, *separate):
            optimizer.step()
    for mine, other in zip(params, alone, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


# --- State


def fused(case: Description, params: list[nn.Parameter] | None = None, **keywords: Any) -> torch.optim.Optimizer:
    """Two parameters of equal blocks, one of uneven blocks, one whole, and a bias."""
    shapes = [(12, 4), (12, 4), (14, 4), (4, 4), (4,)]
    params = params or [parameter(start(shape, seed), torch.float32) for seed, shape in enumerate(shapes)]
    groups: list[dict[str, Any]] = [
        {"params": params[:2], "row_blocks": 3},
        {"params": params[2:3], "row_blocks": (3, 3, 8)},
        {"params": params[3:4]},
        {"params": params[4:], "rule": "adam"},
    ]
    return case.build(groups, **keywords)


@matrix_optimizers
def test_a_saved_state_with_blocks_continues_bit_for_bit(case):
    """Saved between two refreshes of the roots, where there are any."""
    keywords = {"precond_frequency": 3} if "precond_frequency" in case.overrides else {}
    whole = fused(case, **keywords)
    run(whole, range(8))
    first = fused(case, **keywords)
    run(first, range(5))
    second = fused(case, copies(first), **keywords)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_identical(first, second)
    run(second, range(5, 8))
    assert_identical(whole, second)


@matrix_optimizers
def test_a_loaded_state_brings_its_blocks(case):
    """As any setting of a group: what was saved is what goes on."""
    first = case.build([{"params": [parameter(start((12, 4)))], "row_blocks": (6, 3, 3)}])
    run(first, range(3))
    second = case.build(copies(first))
    second.load_state_dict(first.state_dict())
    assert tuple(second.param_groups[0]["row_blocks"]) == (6, 3, 3)
    for optimizer in (first, second):
        run(optimizer, range(3, 6))
    assert_identical(first, second)


@matrix_optimizers
def test_the_state_is_tensors_that_share_no_memory(case):
    """So that a checkpoint can hold them by name, without a pickle."""
    optimizer = fused(case)
    run(optimizer, range(2))
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    assert all(isinstance(value, Tensor) for value in tensors)
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors)


@matrix_optimizers
def test_a_deep_copy_with_blocks_continues_the_same(case):
    original = fused(case)
    run(original, range(3))
    clone = copy.deepcopy(original)
    for optimizer in (original, clone):
        run(optimizer, range(3, 6))
    assert_identical(original, clone)


# --- Bad values

MALFORMED = [
    0, -3, True, False, "3", "heads", 2.0, 2.5, float("nan"), (), (12, 0), (18, -6), (True, 11), ("6", "6"), (6.0, 6.0),
    {"rows": 12},
]  # fmt: skip


@pytest.mark.parametrize("blocks", MALFORMED, ids=str)
@matrix_optimizers
def test_what_are_no_blocks_is_refused_with_the_value(case, blocks):
    with pytest.raises(ValueError, match="row_blocks") as error:
        case.build([{"params": [parameter(start((12, 4)))], "row_blocks": blocks}])
    assert repr(blocks) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("blocks", [5, 24, (4, 4), (8, 8), (13,)], ids=str)
@matrix_optimizers
def test_blocks_that_are_not_the_rows_are_refused_with_the_parameters_name(case, blocks):
    with pytest.raises(ValueError, match="row_blocks") as error:
        case.build([{"params": [("h.0.attn.q.weight", parameter(start((12, 4))))], "row_blocks": blocks}])
    assert repr(blocks) in str(error.value)
    assert "h.0.attn.q.weight" in str(error.value)
    assert "\n" not in str(error.value)


@matrix_optimizers
def test_the_parameter_that_does_not_fit_is_the_one_named(case):
    params = [("first.weight", parameter(start((12, 4)))), ("second.weight", parameter(start((10, 4))))]
    optimizer = case.build([("other.weight", parameter(start((3, 4))))])
    with pytest.raises(ValueError, match=r"row_blocks.*second\.weight|second\.weight.*row_blocks") as error:
        optimizer.add_param_group({"params": params, "row_blocks": 4})
    assert "first.weight" not in str(error.value)
    assert len(optimizer.param_groups) == 1


@matrix_optimizers
def test_blocks_of_what_takes_adam_are_refused(case):
    """Nobody would read them."""
    with pytest.raises(ValueError, match="row_blocks"):
        case.build([{"params": [parameter(start((12, 4)))], "rule": "adam", "row_blocks": 3}])


@pytest.mark.parametrize("optimizer", [Asro, AccAsro], ids=lambda optimizer: optimizer.__name__)
def test_blocks_for_an_optimizer_without_matrices_are_refused(optimizer):
    keywords = {"decrement": 0.1, "min_scale": 0.5}
    if optimizer is AccAsro:
        keywords |= {"increment": 0.1, "max_scale": 2.0, "total_steps": 10}
    with pytest.raises(ValueError, match="row_blocks"):
        optimizer([{"params": [parameter(start((12, 4)))], "row_blocks": 3}], lr=0.1, **keywords)


# --- A model


class Attention(nn.Module):
    """Queries and keys of two heads of four rows, and values, as other people's models fuse them."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(8, 24)
        self.head = nn.Linear(8, 4)


class SeparateHeads(nn.Module):
    """The same weights, a layer a head."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, rows, bias=False) for rows in (4, 4, 4, 4, 8))
        self.bias = nn.Parameter(attention.c_attn.bias.detach().clone())
        self.head = copy.deepcopy(attention.head)
        with torch.no_grad():
            for part, weight in zip(self.parts, attention.c_attn.weight.split([4, 4, 4, 4, 8]), strict=True):
                part.weight.copy_(weight)


@pytest.mark.parametrize("name", ["asgo", "dasgo", "muon", "shampoo"])
def test_a_fused_projection_trains_as_one_layer_a_head_does(name):
    """The whole way, through `build_optimizer` and a loss, with weight decay and the biases and the head at Adam."""
    torch.manual_seed(0)
    fused_model = Attention().double()
    separate = SeparateHeads(fused_model).double()
    blocks = {"c_attn.weight": (4, 4, 4, 4, 8)}
    optimizers = (
        build_optimizer(fused_model, name, 8, row_blocks=blocks, lr=0.05, weight_decay=0.3),
        build_optimizer(separate, name, 8, lr=0.05, weight_decay=0.3),
    )
    for _ in range(8):
        x, target = torch.randn(2, 32, 8, dtype=torch.float64)[0], torch.randint(4, (32,))
        projected = (
            fused_model.c_attn(x),
            torch.cat([part(x) for part in separate.parts], -1) + separate.bias,
        )
        for model, optimizer, qkv in zip((fused_model, separate), optimizers, projected, strict=True):
            q, k, v = qkv.split(8, -1)
            loss = nn.functional.cross_entropy(model.head((q * k).tanh() + v), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    together = torch.cat([part.weight for part in separate.parts])
    torch.testing.assert_close(fused_model.c_attn.weight, together, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fused_model.head.weight, separate.head.weight, rtol=1e-6, atol=1e-8)
