"""That plain PyTorch trains the same model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.gpt import GPT, next_token_loss
from pipelines.benchmarks.plain_gpt import PlainGPT, PlainTrainer
from pipelines.config import GPTRunConfig, GPTSettings
from pipelines.data.batches import open_token_data
from pipelines.training.gpt_task import build_decoder
from tests.pipelines.training.double_precision import double_precision

VOCABULARY = 50


def plain_weights(model: GPT) -> dict[str, torch.Tensor]:
    """The weights of a GPT under the names of `PlainGPT`."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".query." in name:
            parts = [model.state_dict()[name.replace("query", part)] for part in ("query", "key", "value")]
            weights[name.replace("query", "query_key_value")] = torch.cat(parts)
        elif ".key." not in name and ".value." not in name:
            weights[name.replace("feed_forward.", "")] = tensor
    return weights


def settings(**changes: Any) -> GPTSettings:
    return GPTSettings(**{"context_length": 12, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 40, **changes})


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"tied_head": False}])
def test_the_loss_and_its_gradient_are_those_of_the_same_weights_in_asgo(changes: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = build_decoder(settings(**changes), VOCABULARY).double()
    plain = PlainGPT(settings(**changes), VOCABULARY).double()
    plain.load_state_dict(plain_weights(model))
    inputs, targets = torch.randint(VOCABULARY, (2, 3, 12))
    with double_precision():
        loss, own = plain(inputs, targets), next_token_loss(model(inputs), targets)
    assert loss.item() == pytest.approx(own.item(), rel=1e-12)
    loss.backward()
    own.backward()
    gradients = copy.deepcopy(model)
    for param, other in zip(gradients.parameters(), model.parameters(), strict=True):
        param.data = other.grad  # type: ignore[assignment]
    expected = plain_weights(gradients)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(param.grad, expected[name], rtol=1e-10, atol=1e-14)


def test_the_weights_begin_with_the_spread_of_those_in_asgo() -> None:
    torch.manual_seed(0)
    shape = settings(d_model=64, d_ff=256)
    expected = plain_weights(build_decoder(shape, 500))
    for name, param in PlainGPT(shape, 500).named_parameters():
        assert param.std().item() == pytest.approx(expected[name].std().item(), rel=0.1, abs=1e-9), name


@pytest.mark.parametrize("max_grad_norm", [None, 1e-2])
def test_accumulated_micro_batches_are_one_batch_with_a_clipped_gradient(
    small_config: Callable[..., GPTRunConfig], token_folder: Path, max_grad_norm: float | None
) -> None:
    data = open_token_data(token_folder)
    moved = []
    for rows in (8, 2):
        changes = {} if max_grad_norm is None else {"training__max_grad_norm": max_grad_norm}
        config = small_config(training__batch_size=8, training__micro_batch_size=rows, **changes)
        config = config.model_copy(
            update={"training": config.training.model_copy(update={"max_grad_norm": max_grad_norm})}
        )
        torch.manual_seed(0)
        trainer = PlainTrainer(config, data.train[0].read(), data.vocab_size, torch.device("cpu"), torch.float32)
        trainer._model.double()  # in which rounding cannot hide a wrong factor
        params = list(trainer._model.parameters())
        trainer.optimizer = torch.optim.SGD(params, lr=1.0)  # shows the gradient's size, unlike AdamW
        before = [param.detach().clone() for param in params]
        trainer.step()
        moved.append(torch.cat([(old - new).detach().flatten() for old, new in zip(before, params, strict=True)]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-10, atol=1e-12)
    if max_grad_norm is None:
        assert moved[0].norm() > 0.1
    else:
        assert moved[0].norm().item() == pytest.approx(max_grad_norm, rel=1e-3)
