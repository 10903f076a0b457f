"""`asgo bench train`: whole training steps, compared with plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from asgo_cli import console
from asgo_cli.help_text import examples
from asgo_cli.names import OPTIMIZERS, completing
from asgo_cli.options import Device
from asgo_cli.progress import TurnsProgress
from pipelines.shell import command
from pipelines.tasks import TASKS

if TYPE_CHECKING:
    from pipelines.benchmarks.training import TrainingMeasurement, TrainingReport

# As in pipelines.benchmarks.training_workload, which cannot be imported here: it would import torch.
MODEL_NAMES = ("gpt2", "asro-gpt", "nanogpt", "tiny")
EXAMPLES = examples(
    "asgo bench train",
    "asgo bench train --model gpt2 --optimizer asgo --optimizer adamw",
    "asgo bench train --preset track3 --optimizer muon",
    "asgo bench train --optimizer asgo:precond_frequency=5 --json > bench.json",
)

ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Model to train: {', '.join(MODEL_NAMES)}.",
        show_default="gpt2, which is GPT-2 124 M, on a CUDA device; tiny elsewhere",
        autocompletion=completing(MODEL_NAMES),
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"The model and settings of a preset instead: {', '.join(TASKS['gpt'].presets)}.",
        autocompletion=completing(TASKS["gpt"].presets),
    ),
]
OptimizersOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:key=value,...]",
        help="An optimizer of `asgo train gpt`, with settings of its own; may be given several times.",
        show_default="adamw, accasro, muon, asgo",
        autocompletion=completing(OPTIMIZERS),
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Sequences per step.", show_default="0.5 M tokens, 8,192 on a CPU"),
]
MicroBatchSizeOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Sequences per forward pass.", show_default="what fits the memory"),
]
PrecisionOption = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(help="Precision of the forward pass; auto: bf16 on a GPU that supports it."),
]
CompileOption = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Use torch.compile.", show_default="on a CUDA device only"),
]


def train(
    model: ModelOption = None,
    preset: PresetOption = None,
    optimizer: OptimizersOption = None,
    batch_size: BatchSizeOption = None,
    micro_batch_size: MicroBatchSizeOption = None,
    context: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens per sequence.", show_default="the model's")
    ] = None,
    precision: PrecisionOption = "auto",
    compiled: CompileOption = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of each optimizer after the first.")] = 10,
    budget: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Stop an optimizer after this much time in its steps.")
    ] = 20.0,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, each step's time too, as JSON.")] = False,
) -> None:
    """Measure training steps by optimizer, and of plain PyTorch.

    A step is forward, backward, accumulation, clipping and optimizer, as in `asgo train gpt`, on random tokens. In each
    round every optimizer takes one step; times are medians over the rounds. The baseline is the same model in plain
    PyTorch, written like nanoGPT, Hugging Face's Llama, or track 3's script, with fused AdamW.
    """
    from pipelines.benchmarks.training import bench_training
    from pipelines.benchmarks.training_workload import DEFAULT_OPTIMIZERS, TrainingBenchSettings

    settings = TrainingBenchSettings(
        model=model,
        preset=preset,
        optimizers=optimizer or DEFAULT_OPTIMIZERS,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        context_length=context,
        precision=precision,
        compile=compiled,
        device=device or "auto",
        repeats=repeats,
        budget_s=budget,
    )
    progress = TurnsProgress()
    with progress.bar:
        report = bench_training(settings, progress)
    if as_json:
        console.show_json(report.as_json())
    else:
        _show(report)
    chosen = [word for name in optimizer or [] for word in ("--optimizer", name)]
    if preset is None:
        console.suggest_next(command("asgo", "bench", "optimizers", "--model", report.work.model, *chosen))
    else:
        console.suggest_next(command("asgo", "train", "gpt", "--preset", preset, "--print-config"))


def _show(report: TrainingReport) -> None:
    has_peak, has_utilization = report.device_type == "cuda", report.peak_flops is not None
    console.show_table(
        [
            "",
            "tokens/s",
            "step\nms",
            "±\n%",
            "×\nplain",
            "optimizer\n%",
            *["MFU\n%"] * has_utilization,
            *["peak\nGB"] * has_peak,
            "micro-\nbatch",
            "n",
        ],
        [_row(report, each) for each in report.measurements],
        title=_title(report),
    )
    console.say(
        "step: median of n; ±: half the interquartile range; × plain: tokens/s relative to plain PyTorch, median over "
        "the rounds; optimizer: its part of the step"
    )
    if report.peak_flops is not None:
        console.say(
            f"MFU: model FLOP utilization, 6 N + 12 L d T = {report.work.flops_per_token / 1e6:,.0f} MFLOP a token, of "
            f"{report.peak_flops / 1e12:,.0f} TFLOP/s (dense bf16); N: all parameters except position "
            "embeddings and, where the head has its own weight, token embeddings"
        )
    if report.is_cpu_size:
        console.say("a size for CPUs; on a CUDA device: GPT-2 124 M, 0.5 M tokens a step, bf16, compiled")
    if any(each.only_sample_s is not None for each in report.measurements):
        console.say("n = 1*: the budget allowed only the first step")
    for each in report.measurements:
        if each.failed:
            console.warn(f"{each.name} failed: {each.failed}")


def _title(report: TrainingReport) -> str:
    work = report.work
    return (
        f"{work.model}, {work.parameters / 1e6:,.1f} M parameters: {work.layers} layers, {work.heads} heads, "
        f"d {work.d_model}, context {work.context_length:,}, vocabulary {work.vocab_size:,}; "
        f"{work.tokens_per_step:,} tokens a step; {work.precision}{', compiled' * work.compiled}; "
        f"{report.device}; torch {report.torch_version}"
    )


def _row(report: TrainingReport, each: TrainingMeasurement) -> list[str]:
    share, utilization, peak = each.optimizer_share, report.utilization(each), each.peak_bytes
    return [
        each.name,
        "failed" if each.failed else console.figure(report.tokens_per_s(each)),
        console.figure(each.median_s, 1e3),
        "" if each.spread is None else f"{100 * each.spread:.0f}",
        console.figure(report.speed(each)),
        console.figure(share, 100),
        *([] if report.peak_flops is None else [console.figure(utilization, 100)]),
        *([console.figure(None if peak is None else peak / 1e9)] if report.device_type == "cuda" else []),
        f"{each.micro_batch_size}" if each.micro_batch_size else "",
        "" if each.failed else f"{len(each.samples)}" if each.samples else "1*",
    ]
