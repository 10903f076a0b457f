"""`asgo bench`: optimizers, training and data preparation, compared with other libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from asgo_cli import bench_data, bench_train, console
from asgo_cli.help_text import examples
from asgo_cli.names import CLASSIFIERS, OPTIMIZERS, OWN_OPTIMIZERS, completing
from asgo_cli.options import Device
from asgo_cli.progress import TurnsProgress
from pipelines.shell import command

if TYPE_CHECKING:
    from pipelines.benchmarks.optimizers import Report
    from pipelines.benchmarks.turns import Measurement

app = typer.Typer(
    help="Measure speed and compare it with other libraries.",
    epilog=examples("asgo bench optimizers --model gpt2", "asgo bench train"),
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# As in pipelines.benchmarks.shapes, which cannot be imported here: it would import torch.
MODEL_NAMES = ("gpt2-layer", "gpt2", "asro-gpt", "nanogpt", "tiny")
OPTIMIZERS_EXAMPLES = examples(
    "asgo bench optimizers",
    "asgo bench optimizers --model gpt2 --optimizer asgo --optimizer torch.Muon",
    "asgo bench optimizers --optimizer asgo:root_method=polar_express",
    "asgo bench optimizers --optimizer heavyball.SOAP --json > bench.json",
)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())  # noqa: T201


@app.command("optimizers", epilog=OPTIMIZERS_EXAMPLES)
def optimizers(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"Model whose parameters are updated: {', '.join(MODEL_NAMES)}, or a classifier of torchvision such "
            "as efficientnet_b1. gpt2-layer is the six weight matrices of one layer of GPT-2.",
            autocompletion=completing((*MODEL_NAMES, *CLASSIFIERS)),
        ),
    ] = "gpt2-layer",
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:key=value,...]",
            help=f"{', '.join(OWN_OPTIMIZERS)}; or an import path: torch.CLASS, heavyball.CLASS, ./FILE.py:CLASS; "
            "with keywords of the constructor; may be given several times. Default: ours, and some of torch, "
            "pytorch_optimizer and heavyball, if installed.",
            autocompletion=completing(OPTIMIZERS),
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of each optimizer after the first.")] = 10,
    budget: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Stop an optimizer after this much time in its steps."),
    ] = 20.0,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads.", show_default="torch's own choice")
    ] = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, each step's time too, as JSON.")] = False,
) -> None:
    """Measure the step time and the state size of each optimizer.

    In each round every optimizer takes one step with the same gradients; times are medians over the rounds. The
    baseline is the fused AdamW of torch. On a whole model, our matrix optimizers and the Muons of torch and
    pytorch_optimizer update the hidden matrices, and Adam or AdamW updates the rest; all other optimizers update
    everything. gpt2-layer consists of matrices only, and each optimizer updates all of them.
    """
    from pipelines.benchmarks.optimizers import BenchSettings, bench_optimizers
    from pipelines.config import RuntimeSettings

    settings = BenchSettings(model, optimizer or (), repeats, budget, threads, RuntimeSettings(device=device or "auto"))
    progress = TurnsProgress()
    with progress.bar:
        report = bench_optimizers(settings, progress)
    if as_json:
        console.show_json(report.as_json())
    else:
        _show(report)
    console.suggest_next(*_next_commands(model, optimizer or [], as_json))


def _show(report: Report) -> None:
    muon, has_peak = report.torch_muon, report.device_type == "cuda"
    console.show_table(
        [
            "",
            "step\nms",
            "±\n%",
            "×\nAdamW",
            *["×\nMuon"] * (muon is not None),
            "first\nms",
            "state\nbytes",
            *["peak\nMB"] * has_peak,
            "error",
            "n",
        ],
        [_row(report, each, has_peak) for each in report.measurements],
        title=f"{report.model}, {report.parameters:,} parameters; {report.device}; torch {report.torch_version}",
    )
    console.say(
        "step: median of n; ±: half the interquartile range; × AdamW: time relative to torch's fused AdamW, median "
        "over the rounds; first: the first step and all compilation; state: bytes per parameter; error: of the update, "
        f"relative to float64, after {report.error_steps} steps where G Gᵀ has condition "
        f"{report.error_condition:,.0f}, empty without a reference"
    )
    if any(each.only_sample_s is not None for each in report.measurements):
        console.say("n = 1*: the budget allowed only the first step")
    for each in report.measurements:
        if each.failed:
            console.warn(f"{each.name} failed: {each.failed}")


def _row(report: Report, each: Measurement, has_peak: bool) -> list[str]:
    state = None if each.state_bytes is None else each.state_bytes / report.parameters
    peak = None if each.peak_bytes is None else each.peak_bytes / 1e6
    return [
        each.name,
        "failed" if each.failed else console.figure(each.median_s, 1e3),
        "" if each.spread is None else f"{100 * each.spread:.0f}",
        console.figure(each.ratio_to(report.baseline)),
        *([] if report.torch_muon is None else [console.figure(each.ratio_to(report.torch_muon))]),
        console.figure(each.first_step_s, 1e3),
        console.figure(state),
        *[console.figure(peak)] * has_peak,
        "" if each.error is None else f"{each.error:.0e}",
        "" if each.failed else f"{len(each.samples)}" if each.samples else "1*",
    ]


def _next_commands(model: str, names: list[str], as_json: bool) -> list[str]:
    chosen = [word for name in names for word in ("--optimizer", name)]
    other = "gpt2" if model == "gpt2-layer" else "gpt2-layer"
    commands = [command("asgo", "bench", "optimizers", "--model", other, *chosen)]
    if not as_json:
        commands.append(command("asgo", "bench", "optimizers", "--model", model, *chosen, "--json") + " > bench.json")
    return commands


app.command("train", epilog=bench_train.EXAMPLES)(bench_train.train)
app.command("data", epilog=bench_data.DATA_EXAMPLES)(bench_data.data)
app.command("loader", epilog=bench_data.LOADER_EXAMPLES)(bench_data.loader)
app.command("archives", epilog=bench_data.ARCHIVES_EXAMPLES)(bench_data.archives)
