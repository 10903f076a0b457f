"""`batch_dims`: experts in one parameter of shape (E, m, n), each a matrix of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .cases import Description, full_rank, matrix_optimizers, relative_error, set_gradient
from .steps import assert_identical, copies, run

SPLITS = [
    ((3, 4, 6), 1, None), ((3, 6, 4), 1, None), ((2, 5, 5), 1, None), ((2, 3, 4, 6), 2, None),
    ((2, 4, 3, 2, 2), 1, None), ((3, 4, 6), 1, 2), ((3, 4, 6), 1, (1, 3)), ((2, 3, 4, 6), 2, 2),
]  # fmt: skip


def experts(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def each_expert(tensor: Tensor, batch_dims: int) -> list[Tensor]:
    return list(tensor.flatten(0, batch_dims - 1))


@pytest.mark.parametrize(("shape", "batch_dims", "row_blocks"), SPLITS, ids=str)
@matrix_optimizers
def test_experts_equal_separate_parameters(
    case: Description, shape: tuple[int, ...], batch_dims: int, row_blocks: Any
) -> None:
    whole = experts(shape)
    parts = [nn.Parameter(part.detach().clone()) for part in each_expert(whole, batch_dims)]
    together = case.build([{"params": [whole], "batch_dims": batch_dims, "row_blocks": row_blocks}], weight_decay=0.3)
    apart = case.build([{"params": parts, "row_blocks": row_blocks}], weight_decay=0.3)
    gradients = zip(*(full_rank(tuple(part.shape), 5, seed) for seed, part in enumerate(parts)), strict=True)
    for step in gradients:
        for part, gradient in zip(parts, step, strict=True):
            set_gradient(part, gradient)
        whole.grad = torch.stack([part.grad for part in parts]).view(shape)
        together.step()
        apart.step()
        expected = torch.stack(list(parts)).view(shape).detach().numpy()
        # Both take the same operations on the same matrices, but for the order in which stacks sum.
        assert relative_error(whole, expected) < 1e-9


@matrix_optimizers
def test_experts_are_saved_and_resumed(case: Description) -> None:
    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return case.build([{"params": params[:1], "batch_dims": 1}, {"params": params[1:]}])

    first = build([experts((3, 4, 6)), experts((4, 6))])
    run(first, range(3))
    second = build(copies(first))
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["batch_dims"] == 1
    for optimizer in (first, second):
        run(optimizer, [3])
    assert_identical(first, second)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"batch_dims": 2}, r"'experts' of shape \(3, 4, 6\) is not a matrix with batch_dims=2"),
        ({"batch_dims": -1}, "batch_dims: -1"),
        ({"batch_dims": True}, "batch_dims: True"),
        ({"batch_dims": 1, "row_blocks": 3}, r"row_blocks: 3 does not divide the 4 rows of parameter 'experts'"),
        ({"batch_dims": 1, "rule": "adam"}, "'batch_dims' requires rule='matrix'"),
    ],
    ids=str,
)
@matrix_optimizers
def test_batch_dimensions_that_do_not_fit_are_refused(case: Description, group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.build([{"params": [("experts", experts((3, 4, 6)))], **group}])
