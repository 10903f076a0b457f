"""The decoder of parts against implementations that share nothing with it, and what its parts promise."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from models.gpt import next_token_loss
from models.transformer import Rotary, Transformer, TransformerConfig, rotate
from optim import build_optimizer
from optim.groups import parts_of
from pipelines.benchmarks.plain_track3 import PlainTrack3
from pipelines.config import TransformerSettings
from pipelines.resolve import read_preset
from tests.autocast import autocast_as_on

SHAPE: dict[str, Any] = {
    "kind": "transformer", "context_length": 16, "n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 48,
}  # fmt: skip
TRACK3 = {**read_preset("track3")["model"], **SHAPE, "vocab_multiple": 1}
LEARNED: dict[str, Any] = {
    "positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True, "tied_head": True, "attention_scale": 0.3,
    "softcap": 2.0, "softcap_form": "tanh",
}  # fmt: skip
GROUPED: dict[str, Any] = {"n_kv_heads": 2, "mlp": "geglu", "rotary_style": "interleaved", "qk_norm": True}
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "grouped": GROUPED, "learned": LEARNED, "track3": TRACK3}
VOCAB_SIZE = 11
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = TransformerSettings(**{**SHAPE, **changes}).build(VOCAB_SIZE)
    assert isinstance(model, Transformer)
    return model


@torch.no_grad()
def shaken(model: Transformer) -> Transformer:
    """Weights away from zero and one, so that none can be left out."""
    for param in model.parameters():
        param.add_(0.3 * torch.randn_like(param))
    return model


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(1))


def assert_same(ours: Transformer, logits: Tensor, expected: Tensor, gradients: Mapping[str, Tensor]) -> None:
    """Logits, and the gradients of one loss by our names; a name that is missing has none in the other model.

    An entry of a gradient is a sum of terms as large as the largest entries, which may cancel. So its error is relative
    to these: float32's 6e-8 for each of some 100 roundings in a row.
    """
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    next_token_loss(logits, tokens_of(*logits.shape[:2])).backward()
    for name, param in ours.named_parameters():
        if name in gradients:
            atol = max(1e-6, 6e-6 * gradients[name].abs().max().item())
            torch.testing.assert_close(param.grad, gradients[name], rtol=1e-4, atol=atol)


def backward(logits: Tensor) -> None:
    functional.cross_entropy(logits.flatten(0, 1), tokens_of(*logits.shape[:2]).flatten()).backward()


LLAMA = {
    "token_embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm", "attention": "self_attn",
    "query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "feed_forward": "mlp",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "blocks": "model.layers",
}  # fmt: skip


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_logits_and_gradients_are_those_of_hugging_faces_llama(n_kv_heads: int) -> None:
    transformers = importlib.import_module("transformers")
    ours = shaken(make(n_kv_heads=n_kv_heads, rotary_base=100.0, norm_eps=1e-6))
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=n_kv_heads, max_position_embeddings=16, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    names = {name: ".".join(LLAMA.get(part, part) for part in name.split(".")) for name in ours.state_dict()}
    theirs.load_state_dict({names[name]: tensor for name, tensor in ours.state_dict().items()})
    expected = theirs(tokens_of(2, 16)).logits
    backward(expected)
    gradients = {name: theirs.get_parameter(names[name]).grad for name in names}
    assert_same(ours, ours(tokens_of(2, 16)), expected, gradients)


GPT2 = {
    "token_embedding": "wte", "position_embedding": "wpe", "blocks": "h", "norm": "ln_f", "attention_norm": "ln_1",
    "feed_forward_norm": "ln_2", "attention": "attn", "output": "c_proj", "feed_forward": "mlp", "up": "c_fc",
    "down": "c_proj",
}  # fmt: skip


def test_logits_and_gradients_are_those_of_hugging_faces_gpt2() -> None:
    transformers = importlib.import_module("transformers")
    ours = shaken(make(**{**LEARNED, "attention_scale": None, "softcap": 0.0}))
    nn.init.zeros_(ours.get_parameter("head_bias"))  # which GPT-2 does not have
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=48, activation_function="gelu"
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()

    def in_their_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """GPT-2 stores matrices transposed, queries, keys and values in one."""
        found = {}
        for name, tensor in tensors.items():
            other = ".".join(GPT2.get(part, part) for part in name.split("."))
            if ".attn.query." in other:
                parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
                tensor, other = torch.cat(parts), other.replace("query", "c_attn")
            is_linear = other.startswith("h.") and tensor.ndim == 2
            found[other] = tensor.T if is_linear else tensor
        return {name: tensor for name, tensor in found.items() if name in theirs.transformer.state_dict()}

    theirs.transformer.load_state_dict(in_their_layout(dict(ours.named_parameters())))
    expected, logits = theirs(tokens_of(2, 16)).logits, ours(tokens_of(2, 16))
    assert_same(ours, logits, expected, {})
    backward(expected)
    for name, gradient in in_their_layout({name: param.grad for name, param in ours.named_parameters()}).items():
        torch.testing.assert_close(gradient, theirs.transformer.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_logits_and_gradients_are_those_of_track_3() -> None:
    """In plain PyTorch, from its description."""
    ours = shaken(make(**TRACK3))
    assert ours.token_embedding.weight.dtype == torch.bfloat16
    theirs = PlainTrack3(TransformerSettings(**TRACK3), VOCAB_SIZE)
    theirs.load_state_dict({name.replace("head_", "head."): it for name, it in ours.state_dict().items()})
    expected = theirs.logits(tokens_of(2, 16))
    backward(expected)
    gradients = {name.replace("head.bias", "head_bias"): param.grad for name, param in theirs.named_parameters()}
    reference = gradients.pop("token_embedding.weight")
    assert_same(ours, ours(tokens_of(2, 16)), expected, gradients)
    assert gradients.keys() == {name for name, _ in ours.named_parameters()} - {"token_embedding.weight"}
    # Sums of a few terms in bfloat16, each rounded by 2^-8.
    embedding = ours.token_embedding.weight.grad
    assert (embedding.float() - reference.float()).norm() < 2**-6 * reference.float().norm()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_track_3_runs_in_bfloat16_between_a_bfloat16_embedding_and_float32_logits(device: str) -> None:
    """Fake tensors have the dtypes of a GPU's autocast, where normalizations return float32."""
    kinds: list[torch.dtype] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        kinds.append(output.dtype)

    with FakeTensorMode(), torch.device(device), autocast_as_on(device):
        model = make(**TRACK3)
        for each in model.modules():
            if not isinstance(each, (Transformer, nn.ModuleList, Rotary)):
                each.register_forward_hook(note)
        assert model(torch.empty(1, 5, dtype=torch.int64)).dtype == torch.float32
    assert set(kinds) == {torch.bfloat16}


def test_interleaved_pairs_are_complex_numbers_that_turn() -> None:
    """RoFormer, section 3.2.2: pair i of position t is multiplied by exp(i t base^(-2i/d))."""
    model = make(rotary_style="interleaved", rotary_base=50.0)
    x = torch.randn(2, 3, 16, 8)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    angles = torch.arange(16)[:, None] * 50.0 ** -(torch.arange(4) / 4)
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    torch.testing.assert_close(rotate(x, model.rotary(0, 16), "interleaved"), expected)


def test_a_fraction_of_the_pairs_turns_and_the_others_stay() -> None:
    half, whole = (make(rotary_fraction=fraction).rotary for fraction in (0.5, 1.0))
    assert (half.cos[:, 2:] == 1).all()
    assert (half.sin[:, 2:] == 0).all()
    angles = torch.atan2(half.sin[1], half.cos[1])
    torch.testing.assert_close(angles[:2], torch.tensor([1.0, 0.01]))
    assert not torch.equal(half.sin[:, :2], whole.sin[:, :2])


def test_softcap_bounds_logits_and_leaves_small_ones() -> None:
    head = shaken(make())
    with torch.no_grad():
        head.head.weight.mul_(100)
        z = head(tokens_of(1, 16))
        for form, bounded in (("sqrt", 15 * z / (z**2 + 225).sqrt()), ("tanh", 15 * (z / 15).tanh())):
            capped = shaken(make(softcap=15.0, softcap_form=form))
            capped.head.weight.mul_(100)
            torch.testing.assert_close(capped(tokens_of(1, 16)), bounded)
    assert z.abs().max() > 20 > 15 >= bounded.abs().max()


def test_z_loss_is_the_mean_square_of_the_log_of_the_denominator() -> None:
    logits, targets = torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64)
    denominators = logits.exp().sum(-1)
    expected = next_token_loss(logits, targets) + 0.1 * (denominators.log() ** 2).mean()
    torch.testing.assert_close(next_token_loss(logits, targets, 0.1), expected)


@every_kind
def test_a_position_sees_nothing_later(kind: str) -> None:
    model = shaken(make(**KINDS[kind]))
    tokens = tokens_of(1, 16)
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % VOCAB_SIZE
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[0, :9], after[0, :9])
    assert not torch.allclose(before[0, 9:], after[0, 9:])


@every_kind
def test_the_settings_count_the_matrices(kind: str) -> None:
    settings = TransformerSettings(**{**SHAPE, **KINDS[kind]})
    matrices = [param for param in settings.build(VOCAB_SIZE).parameters() if param.ndim == 2]
    assert settings.parameters(VOCAB_SIZE) == sum(param.numel() for param in matrices)


@every_kind
def test_the_parts_of_the_model_are_right(kind: str) -> None:
    model = make(**KINDS[kind])
    for name, part in parts_of(model).items():
        expected = "matrices" if name.startswith("blocks.") else "head"
        expected = "embedding" if "embedding." in name else expected
        assert part == (expected if model.get_parameter(name).ndim == 2 else "vectors"), name
    heads = model.attention_row_blocks()
    assert set(heads.values()) == {4, model.config.n_kv_heads}
    build_optimizer(model, "muon", 5, by_heads=True)
    for name, count in heads.items():
        assert len(model.get_parameter(name)) == count * model.config.d_head


@every_kind
def test_the_model_compiles_to_one_graph(kind: str) -> None:
    model = shaken(make(**KINDS[kind]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens_of(2, 16)), model(tokens_of(2, 16)))


@every_kind
def test_the_loss_never_waits_for_the_gpu(kind: str) -> None:
    """Fake tensors have no numbers, so whatever would read one on the host raises."""
    with FakeTensorMode(), torch.device("cuda"):
        model = make(**KINDS[kind])
        tokens = torch.empty(2, 16, dtype=torch.int64)
        assert next_token_loss(model(tokens), tokens, 1e-4).device.type == "cuda"


def test_saved_tensors_are_the_parameters() -> None:
    """Tables of positions are made again."""
    model = make(**TRACK3)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("init", "embedding", "hidden", "residual", "head"),
    [
        ("gpt2", 0.02, 0.02, 0.02 / math.sqrt(16), 0.02),
        ("track3", 1.0, math.sqrt(0.33 / 128), 0.0, 0.0),
        ("width-scaled", 1.0, 1 / math.sqrt(128), 1 / math.sqrt(128 * 16), 1 / 128),
    ],
)
def test_initializations(init: str, embedding: float, hidden: float, residual: float, head: float) -> None:
    torch.manual_seed(0)
    size = {"d_model": 128, "d_ff": 256, "n_layers": 8, "bias": True, "init": init}
    model = TransformerSettings(**{**SHAPE, **size}).build(500)
    for name, param in model.named_parameters():
        if param.ndim == 1:
            assert (param == (0 if name.endswith("bias") else 1)).all(), name
            continue
        expected = {"token_embedding.weight": embedding, "head.weight": head}.get(name, hidden)
        if name.endswith((".output.weight", ".down.weight")):
            expected = residual * (math.sqrt(0.5) if init == "width-scaled" and "down" in name else 1)
        elif init != "gpt2" and name.endswith("down.weight"):
            expected = hidden * math.sqrt(0.5)
        assert param.std().item() == pytest.approx(expected, rel=0.05), name


def test_dropout_acts_in_training_only() -> None:
    model = make(dropout=0.5)
    assert not torch.equal(model(tokens_of(1, 16)), model(tokens_of(1, 16)))
    model.eval()
    assert torch.equal(model(tokens_of(1, 16)), model(tokens_of(1, 16)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 5}, "n_heads=5 does not divide d_model=32"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 does not divide n_heads=4"),
        ({"n_heads": 32}, "rotary positions need an even head size, not d_model / n_heads = 1"),
    ],
)
def test_impossible_heads_are_refused(changes: dict[str, Any], words: str) -> None:
    values = {**make().config.__dict__, **changes}
    values["n_kv_heads"] = changes.get("n_kv_heads", values["n_heads"])
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**values)
