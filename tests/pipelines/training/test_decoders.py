"""A decoder is one module and one class of settings: one that is added trains, resumes and generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from pipelines import config
from pipelines.config import DecoderSettings, RuntimeSettings, load_run_config
from pipelines.errors import UsageError
from pipelines.exchange.export import export_model
from pipelines.generation import generate
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.training.train import plan, train
from tests.conftest import SMALL, SilentReporter


class Bigram(nn.Module):
    """Logits from the last token alone."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) → (batch, time, vocab_size)."""
        return self.table(tokens)  # type: ignore[no-any-return]


class BigramSettings(DecoderSettings):
    """Nothing but a table."""

    kind: Literal["bigram"]

    @property
    def title(self) -> str:
        return "bigram"

    def parameters(self, vocab_size: int) -> int:
        return vocab_size**2

    def build(self, vocab_size: int) -> nn.Module:
        return Bigram(vocab_size)


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.DECODERS, "bigram", BigramSettings)


def settings(token_folder: Path, **changes: Any) -> dict[str, Any]:
    """A small run with it; the shape of a GPT, which the preset gives, is taken away."""
    values = preset_layer("gpt", "tiny").values | SMALL | {"data.folder": str(token_folder), **changes}
    kept = {key: value for key, value in values.items() if not key.startswith("model.")}
    return kept | {"model.kind": "bigram", "model.context_length": 16}


def test_an_added_decoder_trains_resumes_and_generates(
    token_folder: Path, tmp_path: Path, reporter: SilentReporter
) -> None:
    run_config = resolve([Layer("test", settings(token_folder, **{"checkpoint.keep": 9}))])
    assert plan(run_config).model == "bigram"
    rows = train(run_config, tmp_path / "run", reporter)
    assert rows[-1]["loss"] < rows[0]["loss"]
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert load_run_config(saved) == run_config
    text = generate(
        tmp_path / "run",
        "the ",
        new_tokens=5,
        temperature=1.0,
        top_k=None,
        seed=1,
        runtime=RuntimeSettings(device="cpu"),
    )
    assert len(text) == len("the ") + 5
    assert train(run_config, tmp_path / "run", reporter, resume=True) == rows
    with pytest.raises(UsageError, match="--format hf does not support decoders of kind bigram"):
        export_model(tmp_path / "run", "hf", tmp_path / "out")


def test_an_unknown_decoder_is_named_with_those_that_there_are(token_folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown decoder 'trigram'; known: gpt, transformer, bigram"):
        resolve([Layer("test", settings(token_folder) | {"model.kind": "trigram"})])


@pytest.mark.parametrize("kind", [["gpt"], 3, None])
def test_a_kind_that_is_no_name_is_one_line(kind: object, token_folder: Path) -> None:
    with pytest.raises(UsageError) as error:
        resolve([preset_layer("gpt", "tiny"), Layer("my.toml", {"model.kind": kind})])
    assert str(error.value) == f"my.toml: model.kind: unknown decoder {kind!r}; known: gpt, transformer, bigram"
    layers = [preset_layer("gpt", "llama-tiny"), Layer("my.toml", {"model.kind": kind})]
    with pytest.raises(UsageError, match=r"^--set: model\.kind = 'gpt': the model of preset llama-tiny"):
        resolve([*layers, Layer("--set", {"model.kind": "gpt"})])


def test_a_configuration_without_a_kind_is_a_gpt(token_folder: Path) -> None:
    """As those of older runs."""
    run_config = resolve([preset_layer("gpt", "tiny"), Layer("test", {**SMALL, "data.folder": str(token_folder)})])
    values = run_config.model_dump(mode="json")
    assert values["model"].pop("kind") == "gpt"
    assert load_run_config(values) == run_config
    assert torch.nn.Module in type(run_config.model.build(11)).__mro__


def test_keys_of_a_preset_with_another_decoder_are_one_line_that_says_what_to_do() -> None:
    """The user has typed none of them; what the user has typed is named as ever."""
    asked = {"model.kind": "gpt", "model.softcap": 3.0}
    with pytest.raises(UsageError) as error:
        resolve([preset_layer("gpt", "llama-tiny"), Layer("--set", asked)])
    line, own = str(error.value).splitlines()
    assert line == (
        "--set: model.kind = 'gpt': the model of preset llama-tiny is a 'transformer', with keys that a 'gpt' does not "
        "have: n_kv_heads; choose a --preset with a 'gpt' (asgo-gpt2, asgo-nanogpt, asro-gpt, tiny) and set "
        "model.context_length, model.n_layers, model.n_heads, model.d_model, model.d_ff there"
    )
    assert own.startswith("--set: model.softcap: unknown key; known: kind, context_length")


def test_a_kind_that_is_given_twice_and_a_misspelled_key_are_named_as_ever() -> None:
    preset, file = preset_layer("gpt", "llama-tiny"), Layer("my.toml", {"model.kind": "gpt", "model.gelo": "tanh"})
    with pytest.raises(UsageError) as error:
        resolve([preset, file, Layer("--set", {"model.kind": "gpt"})])
    line, own = str(error.value).splitlines()
    assert line.startswith("--set: model.kind = 'gpt': the model of preset llama-tiny is a 'transformer', with keys")
    assert own == "my.toml: model.gelo: unknown key; did you mean 'gelu'?"
    with pytest.raises(UsageError, match=r"^my\.toml: model\.gelo: unknown key; did you mean 'gelu'\?$"):
        resolve([preset_layer("gpt", "tiny"), file, Layer("--set", {"model.kind": "gpt"})])


def test_a_run_keeps_its_decoder() -> None:
    saved = preset_layer("gpt", "llama-tiny").values
    with pytest.raises(UsageError, match=r"^--set: .* the model of run/config\.json is .*: n_kv_heads; leave it out$"):
        resolve([Layer("run/config.json", saved), Layer("--set", {"model.kind": "gpt"})])


def test_a_decoder_without_a_preset_needs_one() -> None:
    words = (
        r"is a 'gpt', with keys that a 'bigram' does not have: n_layers, [^\n]*; no preset has a 'bigram'; write one$"
    )
    with pytest.raises(UsageError, match=words):
        resolve([preset_layer("gpt", "tiny"), Layer("--set", {"model.kind": "bigram"})])
