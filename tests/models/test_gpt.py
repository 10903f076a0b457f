"""The decoder against one written from the formulas, and what its options promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.gpt import GPT, next_token_loss, sample

SHAPE: dict[str, Any] = {
    "vocab_size": 11, "context_length": 8, "n_layers": 2, "n_heads": 3, "d_model": 12, "d_ff": 24,
}  # fmt: skip


def make(**changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(**{**SHAPE, **changes}).double()


def normalized(x: Tensor, gain: Tensor, bias: Tensor | float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias


def reference_logits(model: GPT, tokens: Tensor) -> Tensor:
    """GPT-2's forward pass (Radford et al., 2019) a sequence and a head at a time; (time,) → (time, vocab_size)."""
    w = {name: param.detach() for name, param in model.named_parameters()}
    w.setdefault("head.weight", w["token_embedding.weight"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        return normalized(x, w[f"{name}.weight"], w.get(f"{name}.bias", 0.0))

    time, d_head = len(tokens), SHAPE["d_model"] // SHAPE["n_heads"]
    x = w["token_embedding.weight"][tokens] + w["position_embedding.weight"][:time]
    later = torch.ones(time, time).triu(1).bool()
    for layer in range(SHAPE["n_layers"]):
        block = f"blocks.{layer}"
        y = norm(x, f"{block}.attention_norm")
        q, k, v = (linear(y, f"{block}.attention.{part}") for part in ("query", "key", "value"))
        heads = []
        for head in range(SHAPE["n_heads"]):
            part = slice(head * d_head, (head + 1) * d_head)
            scores = (q[:, part] @ k[:, part].T / math.sqrt(d_head)).masked_fill(later, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(heads, -1), f"{block}.attention.output")
        y = linear(norm(x, f"{block}.feed_forward_norm"), f"{block}.feed_forward.up")
        gelu = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + linear(gelu, f"{block}.feed_forward.down")
    return linear(norm(x, "norm"), "head")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied_head", [True, False])
def test_logits_agree_with_the_formulas(bias: bool, tied_head: bool) -> None:
    model = make(bias=bias, tied_head=tied_head)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))  # biases and gains away from zero and one
        tokens = torch.randint(SHAPE["vocab_size"], (3, 7))
        logits = model(tokens)
        for row in range(3):
            torch.testing.assert_close(logits[row], reference_logits(model, tokens[row]), rtol=1e-10, atol=1e-10)


def test_a_position_sees_nothing_later() -> None:
    model = make()
    tokens = torch.randint(SHAPE["vocab_size"], (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % SHAPE["vocab_size"]
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5:], after[0, 5:])


def test_loss_is_the_mean_cross_entropy_in_nats() -> None:
    assert next_token_loss(torch.zeros(2, 3, 50), torch.zeros(2, 3, dtype=torch.int64)) == pytest.approx(math.log(50))


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        # GPT-2 small: 124,439,808 with 1,024 positions; 768 positions fewer, 47 symbols of padding more.
        ({"vocab_size": 50304, "context_length": 256, "n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072},
         124_439_808 - 768 * 768 + 47 * 768),
        # nanoGPT on characters: 10.6 M in the blocks.
        ({"vocab_size": 66, "context_length": 256, "n_layers": 6, "n_heads": 6, "d_model": 384, "d_ff": 1536,
          "bias": False},
         6 * 12 * 384**2 + 13 * 384 + (66 + 256) * 384),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_known_ones(settings: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = GPT(**settings)
    assert sum(param.numel() for param in model.parameters()) == parameters


def test_initialization_scales_what_writes_to_the_residual_stream() -> None:
    torch.manual_seed(0)
    model = GPT(**{**SHAPE, "d_model": 192, "d_ff": 768, "n_layers": 8})
    for name, param in model.named_parameters():
        if name.endswith((".output.weight", ".down.weight")):
            assert param.std().item() == pytest.approx(0.02 / 4, rel=0.05), name
        elif name.endswith(".weight") and param.ndim == 2 and param.numel() > 10_000:
            assert param.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("norm.weight"):
            assert (param == 1).all(), name
        elif name.endswith("bias"):
            assert (param == 0).all(), name


def test_dropout_acts_in_training_only() -> None:
    model = make(dropout=0.5)
    tokens = torch.randint(SHAPE["vocab_size"], (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="n_heads=5 does not divide d_model=12"):
        make(n_heads=5)


def test_row_blocks_are_the_heads_of_every_query_and_key() -> None:
    model = make()
    assert model.attention_row_blocks() == {
        "blocks.0.attention.query.weight": 3,
        "blocks.0.attention.key.weight": 3,
        "blocks.1.attention.query.weight": 3,
        "blocks.1.attention.key.weight": 3,
    }
    assert list(model.attention_row_blocks()) == [
        name for name, _ in model.named_parameters() if name.endswith(("query.weight", "key.weight"))
    ]


def test_a_row_block_is_one_head_and_no_other() -> None:
    """Zeros in the rows of a block change what its head puts out, and nothing else."""
    model = make(bias=False)
    attention, blocks = model.blocks[0].attention, model.attention_row_blocks()
    x = torch.randn(1, 5, SHAPE["d_model"], dtype=torch.float64)
    with torch.no_grad():
        attention.output.weight.copy_(torch.eye(SHAPE["d_model"]))
        before = attention(x)
        for name in ("blocks.0.attention.query.weight", "blocks.0.attention.key.weight"):
            for rows in torch.arange(SHAPE["d_model"]).chunk(blocks[name]):
                weight = model.get_parameter(name)
                kept = weight.clone()
                weight[rows] = 0
                moved = (attention(x) - before).abs().amax((0, 1)) > 1e-9
                weight.copy_(kept)
                assert moved.nonzero().flatten().tolist() == rows.tolist()


def draw(model: GPT, seed: int = 0, **changes: Any) -> list[int]:
    options: dict[str, Any] = {
        "context_length": model.context_length,
        "new_tokens": 30,
        "vocab_size": 11,
        "temperature": 1.0,
        "top_k": None,
        **changes,
    }
    generator = torch.Generator().manual_seed(seed)
    return sample(model.eval(), torch.tensor([1, 2]), generator=generator, **options).tolist()


def test_sampling_repeats_with_its_seed_and_stays_in_the_vocabulary() -> None:
    model = make()
    assert draw(model) == draw(model)
    assert draw(model) != draw(model, seed=1)
    assert draw(model)[:2] == [1, 2]
    assert len(draw(model)) == 32
    assert max(draw(model, vocab_size=3, new_tokens=100)) == 2


def test_temperature_zero_and_the_likeliest_one_are_greedy() -> None:
    model = make()
    greedy = draw(model, temperature=0)
    assert greedy == draw(model, top_k=1) == draw(model, top_k=1, seed=5)
    with torch.no_grad():
        assert greedy[2] == model(torch.tensor([[1, 2]]))[0, -1].argmax()


def test_sampling_follows_the_models_probabilities() -> None:
    """1,000 draws of one token against the softmax of the temperature-scaled, cut logits."""
    model = make()
    with torch.no_grad():
        model.token_embedding.weight.mul_(40)
        logits = model.eval()(torch.tensor([[1, 2]]))[0, -1] / 0.7
    kept = logits >= logits.topk(4).values[-1]
    expected = logits.masked_fill(~kept, -math.inf).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"context_length": model.context_length, "vocab_size": 11, "temperature": 0.7, "top_k": 4}
    draws = [sample(model, torch.tensor([1, 2]), new_tokens=1, generator=generator, **options)[-1] for _ in range(1000)]
    seen = torch.bincount(torch.stack(draws), minlength=11) / 1000
    assert (seen[~kept] == 0).all()
    torch.testing.assert_close(seen.double(), expected, rtol=0, atol=0.06)
