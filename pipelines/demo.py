"""`asgo demo`: data, three training runs, export and figures in three minutes, on Python's standard library."""

from __future__ import annotations

import io
import statistics
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.functions import FUNCTIONS
from pipelines.analysis.export import records, write_csv
from pipelines.analysis.loss_figure import LossCurve, draw_losses
from pipelines.analysis.optimizer_settings import default_settings
from pipelines.analysis.trajectories import run_trajectories
from pipelines.analysis.trajectory_figure import draw_trajectories
from pipelines.config import RunConfig
from pipelines.data.text_to_shards import prepare_text
from pipelines.errors import AsgoError
from pipelines.resolve import Layer, preset_layer, resolve
from pipelines.storage import write_output
from pipelines.training.metrics import SPLITS, Row, Split
from pipelines.training.reporter import Reporter
from pipelines.training.train import train

OPTIMIZERS = ("accasro", "asgo", "adamw")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class DemoRun:
    """Result of training with one optimizer."""

    optimizer: str
    folder: Path
    rows: list[Row]

    def losses(self, split: Split) -> list[float]:
        """Return the recorded losses, in nats per byte."""
        return [row["loss"] for row in self.rows if row["split"] == split]

    def median(self, metric: Literal["throughput", "optimizer_ms"]) -> float:
        """Return the median of a metric over the training rows."""
        return statistics.median(row[metric] for row in self.rows if row["split"] == "train")

    def curve(self) -> LossCurve:
        """Return the losses for `draw_losses`."""
        train_steps, val_steps = ([row["step"] for row in self.rows if row["split"] == split] for split in SPLITS)
        return LossCurve(self.optimizer, train_steps, self.losses("train"), val_steps, self.losses("val"))


def run_demo(out: Path, report: Callable[[str], AbstractContextManager[Reporter]]) -> list[DemoRun]:
    """Prepare data, train with three optimizers from one seed, export metrics and draw figures, in the folder `out`.

    Keeps finished parts: a second call completes an interrupted one. `report` returns the reporter for the name of a
    run.
    """
    data = out / "data"
    if not data.exists():
        prepare_text(library_sources(), data, tokenizer="bytes", val_fraction=0.02)
    runs = []
    for name in OPTIMIZERS:
        folder = out / "runs" / name
        with report(name) as reporter:
            runs.append(DemoRun(name, folder, train(demo_config(name, data), folder, reporter, resume=True)))
    _export(out / "runs", out / "metrics.csv")
    draw_losses([run.curve() for run in runs], out / "losses.png")
    rosenbrock = FUNCTIONS["rosenbrock"]
    draw_trajectories([run_trajectories(rosenbrock, default_settings())], out / "rosenbrock.png")
    return runs


def demo_config(optimizer: str, data: Path) -> RunConfig:
    """Return the configuration: the preset `tiny` with an optimizer, on the demo's data."""
    choice = Layer("demo", {"optimizer.name": optimizer, "data.folder": str(data)})
    return resolve([preset_layer("gpt", "tiny"), choice])


def library_sources() -> list[Path]:
    """Return the UTF-8 Python files of the running interpreter's standard library, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in library.rglob("*.py") if not _NOT_LIBRARY.intersection(path.relative_to(library).parts)
    )
    readable = [path for path in files if _is_text(path)]
    if not readable:
        raise AsgoError(f"{library}: this Python has no sources of its standard library; use another Python")
    return readable


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError):
        return False


def _export(runs: Path, out: Path) -> None:
    text = io.StringIO()
    write_csv(records(runs).rows, text)
    write_output(out, text.getvalue().encode())
