"""An exported GPT is the same function in Hugging Face's transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.gpt import GPT
from pipelines.config import GPTRunConfig, RunConfig, RuntimeSettings
from pipelines.data.tokenizers import build_tokenizer
from pipelines.errors import AsgoError, UsageError
from pipelines.exchange.export import export_model
from pipelines.generation import generate
from pipelines.training.checkpoint import open_checkpoint
from pipelines.training.gpt_task import build_decoder
from pipelines.training.run_folder import checkpoint_folders
from pipelines.training.train import train
from tests.conftest import SilentReporter

Make = Callable[..., RunConfig]

ROUGH = {"optimizer__name": "adam", "optimizer__lr": 0.05}
"""Moves every weight far from where it began."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"model__n_layers": 2},
    "without biases": {"model__bias": False},
    "own head, odd width within, padded": {
        "model__tied_head": False, "model__d_ff": 40, "model__vocab_multiple": 64, "model__dropout": 0.1,
    },
    "tied and padded": {"model__vocab_multiple": 64},
    "tanh": {"model__gelu": "tanh"},
    "averaged": {"training__ema_decay": 0.5},
}  # fmt: skip


def model_of(run: Path) -> tuple[GPT, int]:
    """The model of a run's last checkpoint, and the size of its vocabulary without padding."""
    checkpoint = open_checkpoint(checkpoint_folders(run / "checkpoints")[-1])
    config = checkpoint.config()
    assert isinstance(config, GPTRunConfig)
    vocab_size = build_tokenizer(checkpoint.state["data"]["tokenizer"]).vocab_size
    model = build_decoder(config.model, vocab_size)
    averaged = config.training.ema_decay is not None
    tensors = load_file(checkpoint.folder / ("average.safetensors" if averaged else "model.safetensors"))
    model.load_state_dict(tensors, strict=False)
    return model.eval(), vocab_size


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_logits_are_ours(
    changes: dict[str, Any], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(small_config(**ROUGH, **changes), tmp_path / "run", reporter)
    exported = export_model(tmp_path / "run", "hf", tmp_path / "out")
    assert exported.averaged == ("training__ema_decay" in changes)
    theirs, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert not any(notes.values()), notes
    assert theirs.config.tie_word_embeddings == changes.get("model__tied_head", True)
    ours, vocab_size = model_of(tmp_path / "run")
    tokens = torch.randint(vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    # In float64 one kind of GELU is told from the other, too.
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        with torch.no_grad():
            expected, logits = ours.to(dtype)(tokens)[..., :vocab_size], theirs.eval().to(dtype)(tokens).logits
        assert expected.std() > 0.3, "else the comparison would say little"
        assert logits.shape == expected.shape, "without the padding"
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def test_it_writes_what_asgo_generate_writes(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    until = {"training__steps": 100, "evaluation__every": 100, "checkpoint__every": 100}
    config = small_config(optimizer__name="adam", optimizer__lr=0.01, schedule__warmup_fraction=0.0, **until)
    train(config, tmp_path / "run", reporter)
    export_model(tmp_path / "run", "hf", tmp_path / "out")
    expected = generate(
        tmp_path / "run", "the cat", new_tokens=8, temperature=0, top_k=None, seed=0,
        runtime=RuntimeSettings(device="cpu"),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer(tokenizer.bos_token + "the cat", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(written[0, 1:]) == expected
    assert len(set(expected.removeprefix("the cat"))) > 1, "else it would say little"


def test_the_folder_holds_no_pickle_and_whoever_reads_one_file_may_read_all(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(small_config(), tmp_path / "run", reporter)
    (tmp_path / "out").mkdir()
    export_model(tmp_path / "run", "hf", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1, "that of any new file"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == config["vocab_size"] - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_damaged_checkpoint_is_passed_over_and_named(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    train(small_config(), tmp_path / "run", reporter)
    older, newest = checkpoint_folders(tmp_path / "run/checkpoints")
    damaged = newest / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    exported = export_model(tmp_path / "run", "hf", tmp_path / "out")
    assert exported.checkpoint == older
    assert [f"skipped {damaged}: truncated" in line for line in exported.skipped] == [True]
    with pytest.raises(AsgoError, match=r"model\.safetensors: truncated"):
        export_model(newest, "hf", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_full_disk_leaves_nothing(
    small_config: Make, tmp_path: Path, reporter: SilentReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_config(), tmp_path / "run", reporter)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(AsgoError, match="out: could not be written: No space left on device"):
        export_model(tmp_path / "run", "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_in_use_is_not_touched(small_config: Make, tmp_path: Path, reporter: SilentReporter) -> None:
    train(small_config(), tmp_path / "run", reporter)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine", encoding="utf-8")
    for out in (tmp_path / "out", tmp_path / "out/notes.txt"):
        with pytest.raises(UsageError, match="already exists; choose another --out"):
            export_model(tmp_path / "run", "hf", out)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
