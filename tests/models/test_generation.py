"""A decoder that keeps keys and values samples the text that it samples without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.gpt import GPT, sample
from tests.models.test_transformer import KINDS, VOCAB_SIZE, make, shaken

PROMPT = torch.tensor([1, 2, 3])


class WithoutCache(nn.Module):
    """The decoder without `new_cache`: every step computes the whole window."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(tokens)  # type: ignore[no-any-return]


def decoder(kind: str) -> nn.Module:
    if kind == "gpt":
        torch.manual_seed(0)
        shape: dict[str, Any] = {"context_length": 16, "n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 48}
        return GPT(vocab_size=VOCAB_SIZE, **shape).double().eval()
    return shaken(make(**KINDS[kind])).double().eval()


def drawn(model: nn.Module, new_tokens: int, context_length: int = 16, **changes: Any) -> list[int]:
    options: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "temperature": 1.5, "top_k": None, **changes}
    generator = torch.Generator().manual_seed(3)
    return sample(
        model, PROMPT, context_length=context_length, new_tokens=new_tokens, generator=generator, **options
    ).tolist()


@pytest.mark.parametrize("new_tokens", [1, 13, 14, 40], ids=["one", "to the end", "beyond", "far beyond"])
@pytest.mark.parametrize("kind", ["gpt", *KINDS])
def test_the_text_is_that_without_a_cache(kind: str, new_tokens: int) -> None:
    """Beyond the context the window slides. In float64, so that rounding never decides a draw."""
    model = decoder(kind)
    text = drawn(model, new_tokens)
    assert len(set(text)) > 2 or new_tokens == 1
    assert text == drawn(WithoutCache(model), new_tokens)


def test_a_context_that_is_shorter_than_the_models_slides_earlier() -> None:
    model = decoder("llama")
    assert drawn(model, 30, context_length=5) == drawn(WithoutCache(model), 30, context_length=5)
    assert drawn(model, 4, context_length=2) == drawn(WithoutCache(model), 4, context_length=2)  # before the first step


@pytest.mark.parametrize("kind", ["gpt", *KINDS])
def test_within_the_context_the_model_gets_every_token_once(kind: str) -> None:
    model = decoder(kind)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape[1]))
    drawn(model, 13)
    assert calls == [3] + [1] * 12
