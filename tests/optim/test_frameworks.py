"""Each optimizer trains inside a plain loop, inside the Hugging Face `Trainer` and inside Lightning, to the same end.

The two frameworks take seconds to import: they are imported where a test needs them, and here alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from optim import build_optimizer

STEPS, BATCH, VOCABULARY, LENGTH = 12, 8, 16, 12
SETTINGS: dict[str, dict[str, Any]] = {
    "asgo": {"lr": 0.02},
    "dasgo": {"lr": 0.02},
    "muon": {"lr": 0.02},
    "shampoo": {"lr": 0.02},
    "asro": {"lr": 0.02, "decrement": 0.01, "min_scale": 0.1},
    "accasro": {"lr": 0.02, "increment": 0.05, "decrement": 0.01, "max_scale": 4.0, "min_scale": 0.1},
}
every_name = pytest.mark.parametrize("name", SETTINGS)
# Lightning's own: a call that PyTorch has deprecated, and a run resumed into the folder of its checkpoints.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """No framework asks the network for anything; they read this when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setenv(variable, "1")
        yield


def counting_up(seed: int = 0) -> Tensor:
    """Sequences (STEPS · BATCH, LENGTH) of tokens in which each is one more than the last: soon learned."""
    first = torch.randint(VOCABULARY, (STEPS * BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return (first + torch.arange(LENGTH)) % VOCABULARY


def optimizer_and_schedule(model: nn.Module, name: str) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """A warm-up of three steps, then a fall to a tenth."""
    optimizer = build_optimizer(model, name, STEPS, **SETTINGS[name])
    return optimizer, LambdaLR(optimizer, lambda step: min((step + 1) / 3, 1.0 - 0.9 * step / STEPS))


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    """To the last bit: the same operations in the same order."""
    for (key, mine), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, other), key


# --- A plain loop


class TinyDecoder(nn.Module):
    """Embedding, one hidden layer, head: all kinds of parameters that the rules tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.hidden = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, VOCABULARY)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of each next token; `tokens` (batch, time)."""
        logits = self.head(self.norm(torch.tanh(self.hidden(self.embedding(tokens[:, :-1])))))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def tiny_decoder() -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder()


def plain_loop(model: nn.Module, name: str, loss_of: Any) -> list[float]:
    """Train through the data once, in order; returns the losses."""
    optimizer, schedule = optimizer_and_schedule(model, name)
    losses = []
    for tokens in counting_up().split(BATCH):
        optimizer.zero_grad()
        loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@every_name
def test_a_plain_loop(name: str) -> None:
    model = tiny_decoder()
    losses = plain_loop(model, name, model.loss)
    assert losses[-1] < 0.75 * losses[0]


# --- The Hugging Face Trainer


@pytest.fixture(scope="module")
def transformers() -> Any:
    return importlib.import_module("transformers")


def tiny_gpt2(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def example(tokens: Tensor) -> dict[str, Tensor]:
    """Inputs and labels of a sequence or a batch (..., LENGTH); nothing is predicted for the first token."""
    labels = tokens.clone()
    labels[..., 0] = -100
    return {"input_ids": tokens, "labels": labels}


def hf_trainer(transformers: Any, model: nn.Module, name: str, folder: Path, **arguments: Any) -> Any:
    """A trainer that goes through the data once, in order, as the plain loop does."""
    settings = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, **arguments}
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, max_grad_norm=0.0, use_cpu=True,
            train_sampling_strategy="sequential", **settings,
        ),
        train_dataset=[example(tokens) for tokens in counting_up()],
        optimizers=optimizer_and_schedule(model, name),
    )  # fmt: skip


@every_name
def test_the_hugging_face_trainer(name: str, transformers: Any, tmp_path: Path) -> None:
    model, expected = tiny_gpt2(transformers), tiny_gpt2(transformers)
    trainer = hf_trainer(transformers, model, name, tmp_path)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS
    assert losses[-1] < 0.75 * losses[0]
    predicted = torch.tensor(BATCH * (LENGTH - 1))  # by which the trainer divides a sum, where a mean rounds otherwise
    plain_loop(expected, name, lambda tokens: expected(**example(tokens), num_items_in_batch=predicted).loss)
    assert_same_weights(model, expected)


@pytest.mark.parametrize("name", ["asgo", "accasro"])
def test_the_hugging_face_trainer_resumes_from_its_checkpoint(name: str, transformers: Any, tmp_path: Path) -> None:
    whole, resumed = tiny_gpt2(transformers), tiny_gpt2(transformers)
    hf_trainer(transformers, whole, name, tmp_path, save_strategy="steps", save_steps=STEPS // 2).train()
    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    trainer = hf_trainer(transformers, resumed, name, tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == STEPS
    assert all(torch.equal(mine, other) for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True))


# --- Lightning


@pytest.fixture(scope="module")
def lightning() -> Any:
    return importlib.import_module("pytorch_lightning")


@pytest.fixture
def lightning_task(lightning: Any) -> Iterator[Any]:
    """Makes the tiny decoder as a `LightningModule` with one of our optimizers and a schedule."""

    class Task(lightning.LightningModule):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.model, self.losses = name, tiny_decoder(), []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = self.model.loss(batch[0])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer, schedule = optimizer_and_schedule(self.model, self.name)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Task


def lightning_fit(
    lightning: Any, task: Any, folder: Path, epochs: int = 1, resume: Path | None = None, **settings: Any
) -> None:
    """Take STEPS steps on the CPU, without logger, bar and summary."""
    defaults = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    keywords = {**defaults, "enable_checkpointing": False, "default_root_dir": folder, **settings}
    trainer = lightning.Trainer(max_epochs=epochs, **keywords)
    batches = DataLoader(TensorDataset(counting_up()[: STEPS * BATCH // epochs]), batch_size=BATCH)
    trainer.fit(task, batches, ckpt_path=resume)
    assert trainer.global_step == STEPS


@every_name
def test_lightning(name: str, lightning: Any, lightning_task: Any, tmp_path: Path) -> None:
    task, expected = lightning_task(name), tiny_decoder()
    lightning_fit(lightning, task, tmp_path)
    losses = plain_loop(expected, name, expected.loss)
    assert task.losses == losses
    assert_same_weights(task.model, expected)


@pytest.mark.parametrize("name", ["shampoo", "asro"])
def test_lightning_resumes_from_its_checkpoint(name: str, lightning: Any, lightning_task: Any, tmp_path: Path) -> None:
    whole, resumed = lightning_task(name), lightning_task(name)
    for task, checkpoint in ((whole, None), (resumed, tmp_path / f"step={STEPS // 2}.ckpt")):
        saving = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
        lightning_fit(lightning, task, tmp_path, 2, checkpoint, enable_checkpointing=True, callbacks=[saving])
    assert resumed.losses == whole.losses[STEPS // 2 :]
    assert all(torch.equal(mine, other) for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True))
