"""Logs as other programs write them, with given losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Losses = Mapping[int, float]
TRAIN = {step: 6.0 - step / 50 for step in range(0, 101, 5)}
CODE = '''"""A training script, which prints itself."""
print0(f"step:{step}/{train_steps} val_loss:{val_loss:.5f} train_time:{training_time:.3f}s", console=True)
# step:7/100 val_loss:1.00000 train_time:1.000s
'''


def write(path: Path, text: str) -> Path:
    """The file, in a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def long_csv(path: Path, val: Losses) -> None:
    """A row a split."""
    rows = [f"{step},train,{loss!r}" for step, loss in TRAIN.items()] + [f"{s},val,{loss!r}" for s, loss in val.items()]
    write(path.with_suffix(".csv"), "\n".join(["step,split,loss", *rows, ""]))


def wide_csv(path: Path, val: Losses) -> None:
    """A column a split, with empty cells, as W&B exports the history of a run."""
    rows = [f"{9 * n},{s},{loss!r},{val.get(s, '')},0.1" for n, (s, loss) in enumerate(TRAIN.items())]
    write(path.with_suffix(".csv"), "\n".join(['"_step","trainer/global_step","train/loss","val/loss","lr"', *rows]))


def spreadsheet_csv(path: Path, val: Losses) -> None:
    """As a spreadsheet writes it where numbers have commas."""
    rows = [f"{step};{loss!r};{val.get(step, '')}".replace(".", ",") for step, loss in TRAIN.items()]
    write(path.with_suffix(".csv"), "\ufeff" + "\r\n".join(["Iteration;Train loss;Val loss", *rows, ""]))


def nanogpt(path: Path, val: Losses) -> None:
    """The lines of nanoGPT."""
    lines = ["Overriding: max_iters = 100", "number of parameters: 10.65M"]
    for step, loss in TRAIN.items():
        if step in val:
            lines += [f"step {step}: train loss {loss:.4f}, val loss {val[step]:.4f}", "saving checkpoint to out"]
        lines.append(f"iter {step}: loss {loss:.4f}, time 20.00ms, mfu 3.21%")
    write(path.with_suffix(".log"), "\n".join([*lines, ""]))


def modded_nanogpt(path: Path, val: Losses) -> None:
    """The code, and the lines of modded-nanogpt below it."""
    lines = [CODE + "=" * 100, "Running PyTorch 2.10.0+cu128 compiled for CUDA 12.8"]
    for step, loss in val.items():
        time = f"train_time:{step * 0.15:.3f}s step_avg:150.00ms"
        lines += [f"step:{step}/100 val_loss:{loss:.5f} {time}", f"step:{step + 1}/100 {time}"]
    write(path.with_suffix(".txt"), "\n".join([*lines[:-1], ""]))


def llm_c(path: Path, val: Losses) -> None:
    """The file `main.log` of llm.c."""
    lines = [f"s:{step} trl:{loss:.4f} lr:0.000600 norm:1.20" for step, loss in TRAIN.items()]
    write(path / "main.log", "\n".join([f"s:{step} tel:{loss:.4f}" for step, loss in val.items()] + [*lines, ""]))


def hugging_face(path: Path, val: Losses) -> None:
    """An output folder of the Trainer with two checkpoints."""
    for saved in (50, 100):
        history: list[dict[str, Any]] = [
            {"epoch": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "loss": loss, "step": step}
            for step, loss in TRAIN.items()
            if 0 < step <= saved
        ]
        history += [{"eval_loss": loss, "eval_runtime": 1.0, "step": s} for s, loss in val.items() if s <= saved]
        history.append({"train_loss": 99.0, "train_runtime": 10.0, "step": saved})
        state = {"global_step": saved, "max_steps": 100, "log_history": history}
        write(path / f"checkpoint-{saved}" / "trainer_state.json", json.dumps(state))


def tensorboard(path: Path, val: Losses) -> None:
    """A folder of event files."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(path) as writer:
        for tag, losses in (("Loss/train", TRAIN), ("Loss/valid", val)):
            for step, loss in losses.items():
                writer.add_scalar(tag, loss, step)


def nanochat(path: Path, val: Losses) -> None:
    """The lines of nanochat, which validates in bits per byte."""
    lines = ["Total batch size 524,288 => gradient accumulation steps: 1"]
    for step, loss in TRAIN.items():
        if step in val:
            lines.append(f"Step {step:05d} | Validation bpb: {val[step]:.6f}")
        if step < 100:
            lines.append(
                f"step {step:05d}/00100 ({step:.2f}%) | loss: {loss:.6f} | lrm: 1.00 | dt: 80.00ms | "
                f"tok/sec: 1,024,000 | bf16_mfu: 45.10 | epoch: 1 | total time: {step / 60:.2f}m | eta: 1.0m"
            )
    write(path.with_suffix(".log"), "\n".join([*lines, ""]))


WRITERS: dict[str, Callable[[Path, Losses], None]] = {
    each.__name__: each
    for each in (
        long_csv, wide_csv, spreadsheet_csv, nanogpt, modded_nanogpt, llm_c, hugging_face, tensorboard, nanochat
    )
}  # fmt: skip
"""The formats."""


def losses_to(final: float) -> dict[int, float]:
    """Validation losses of 100 steps."""
    return {0: 6.0, 50: 4.5, 100: final}
