"""Made gradients."""

from __future__ import annotations

import pytest
import torch

from pipelines.benchmarks.gradients import GradientSource, conditioned_gradients

SHAPES = [(48, 64), (64, 3, 4, 4), (7,), ()]


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]


def lent(source: GradientSource) -> list[torch.Tensor]:
    """A copy of what the source lends now."""
    params = parameters()
    source.lend(params)
    return [param.grad.clone() for param in params if param.grad is not None]


def test_gradients_are_the_same_for_all_in_a_round_and_new_in_the_next() -> None:
    sources = [GradientSource(parameters(), seed=3) for _ in range(2)]
    rounds = []
    for _ in range(2):
        for source in sources:
            source.renew()
        mine, other = (lent(source) for source in sources)
        assert all(map(torch.equal, mine, other))
        rounds.append(mine)
    assert [gradient.shape for gradient in rounds[0]] == [torch.Size(shape) for shape in SHAPES]
    assert not any(map(torch.equal, *rounds))


def test_what_an_optimizer_writes_into_its_gradients_stays_with_it() -> None:
    source = GradientSource(parameters(), seed=0)
    source.renew()
    before = lent(source)
    spoiled = parameters()
    source.lend(spoiled)
    for param in spoiled:
        assert param.grad is not None
        param.grad.fill_(torch.nan)
    assert all(map(torch.equal, before, lent(source)))


@pytest.mark.parametrize("index", [0, 1], ids=["matrix", "kernel"])
def test_a_matrix_has_a_signal_of_low_rank_and_noise(index: int) -> None:
    source = GradientSource(parameters(), seed=0)
    source.renew()
    values = torch.linalg.svdvals(lent(source)[index].flatten(1))
    rank = 3  # a sixteenth of 48
    assert values[rank - 1] > 2 * values[rank]
    assert values[-1] > 1e-5  # the noise fills the rest


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20)], ids=str)
def test_conditioned_gradients_have_the_condition_alone_and_averaged(shape: tuple[int, int]) -> None:
    gradients = conditioned_gradients(shape, 1e4, steps=3, seed=1)
    squares = [g @ g.mT if shape[0] <= shape[1] else g.mT @ g for g in gradients]
    for square in (*squares, sum(squares[1:], squares[0])):
        assert torch.linalg.cond(square).item() == pytest.approx(1e4, rel=1e-6)
    assert {tuple(gradient.shape) for gradient in gradients} == {shape}
    assert not gradients[0].allclose(gradients[1])
