"""That plain PyTorch trains the same model. `tests/models` compares track 3's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.gpt import GPT, next_token_loss
from pipelines.benchmarks.plain_gpt import PlainGPT
from pipelines.benchmarks.plain_llama import PlainLlama
from pipelines.benchmarks.plain_track3 import PlainTrack3
from pipelines.benchmarks.plain_trainer import PlainTrainer, plain_model
from pipelines.config import GPTRunConfig, GPTSettings, TransformerSettings
from pipelines.data.batches import open_token_data
from pipelines.errors import UsageError
from pipelines.resolve import preset_layer, preset_names, read_preset, resolve
from pipelines.training.gpt_task import build_decoder
from tests.autocast import autocast_as_on
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


SIZE: dict[str, Any] = {"context_length": 12, "n_layers": 2, "n_heads": 4, "d_model": 64, "d_ff": 256}


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "tied_head": True, "norm_eps": 0.1, "rotary_base": 7.0}])
def test_the_loss_and_its_gradient_are_those_of_a_llama_in_asgo(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shape = TransformerSettings(kind="transformer", **{**SIZE, **changes})
    model, plain = build_decoder(shape, VOCABULARY), PlainLlama(shape, VOCABULARY)
    plain.load_state_dict(model.state_dict())
    inputs, targets = torch.randint(VOCABULARY, (2, 3, 12))
    loss, own = plain(inputs, targets), next_token_loss(model(inputs), targets)
    torch.testing.assert_close(loss, own)
    loss.backward()
    own.backward()
    for name, param in plain.named_parameters():
        torch.testing.assert_close(param.grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


PLAIN = {"track3": PlainTrack3, "track3-small": PlainTrack3, "llama-130m": PlainLlama, "llama-tiny": PlainLlama}


@pytest.mark.parametrize("preset", preset_names("gpt"))
def test_every_preset_has_a_plain_model_that_begins_with_the_same_spread(preset: str) -> None:
    torch.manual_seed(0)
    small = {**read_preset(preset)["model"], **SIZE, "dropout": 0, "vocab_multiple": 1}
    shape = type(resolve([preset_layer("gpt", preset)]).model)(**small)
    model, plain = build_decoder(shape, 512), plain_model(shape, 512)
    assert type(plain) is PLAIN.get(preset, PlainGPT)
    expected = plain_weights(model) if isinstance(model, GPT) else model.state_dict()
    assert sum(map(torch.numel, plain.parameters())) == sum(map(torch.numel, model.parameters()))
    for name, param in plain.named_parameters():
        own = expected[name.replace("head.bias", "head_bias")]
        assert (param.dtype, param.shape) == (own.dtype, own.shape)
        assert param.float().std().item() == pytest.approx(own.float().std().item(), rel=0.1, abs=1e-9), name


def test_parts_without_a_plain_model_are_named() -> None:
    shape = TransformerSettings(kind="transformer", **SIZE, mlp="gelu", qk_norm=True)
    with pytest.raises(UsageError, match=r"^there is no plain model with model\.qk_norm=True, model\.mlp=gelu$"):
        plain_model(shape, VOCABULARY)


@pytest.mark.parametrize("preset", ["track3-small", "llama-tiny"])
def test_a_plain_model_compiles_to_one_graph_and_never_waits_for_a_gpu(preset: str) -> None:
    """Fake tensors have no numbers, so whatever would read one on the host raises.

    The residual stream has the dtype of the embedding, bfloat16 in track 3.
    """
    shape = TransformerSettings(**{**read_preset(preset)["model"], **SIZE})
    kinds: list[torch.dtype] = []
    with FakeTensorMode(), torch.device("cuda"), autocast_as_on("cuda"):
        tokens = torch.empty(2, 12, dtype=torch.int64)
        plain = plain_model(shape, VOCABULARY)
        for block in plain.get_submodule("blocks"):
            block.register_forward_hook(lambda _module, _given, output: kinds.append(output.dtype))
        loss = plain(tokens, tokens)
    assert (loss.dtype, loss.device.type) == (torch.float32, "cuda")
    assert kinds == [getattr(torch, shape.embedding_dtype)] * 2
    torch.manual_seed(0)
    plain, tokens = plain_model(shape, VOCABULARY), torch.randint(VOCABULARY, (2, 12))
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, tokens), plain(tokens, tokens))


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
