"""`asgo train gpt` and `asgo train imagenet`."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asgo_cli import console, launch, names
from asgo_cli.export import export_command
from asgo_cli.help_text import examples
from asgo_cli.launch import (
    GpusOption,
    Launch,
    MaxRestartsOption,
    NodeRankOption,
    NodesOption,
    ProcessesOption,
    RendezvousOption,
)
from asgo_cli.options import Device
from asgo_cli.progress import TrainingProgress
from asgo_cli.worker import is_restarted
from pipelines.shell import command

if TYPE_CHECKING:
    from pipelines.config import RunConfig
    from pipelines.resolve import Layer

app = typer.Typer(
    help="Train a model with one of the optimizers.",
    epilog=examples(
        "asgo train gpt --preset tiny --data data/text --optimizer asgo", "asgo train imagenet --optimizer accasro"
    ),
    rich_markup_mode=None,
)

_UNITS = {"gpt": "tokens", "imagenet": "images"}
_SHORT_UNITS = {"gpt": "tok", "imagenet": "img"}
_GPT_EXAMPLES = examples(
    "asgo train gpt --preset tiny --data data/text --optimizer asgo",
    "asgo train gpt --resume --out runs/tiny-asgo-s42",
    "asgo train gpt --optimizer accasro --gpus 4",
    "asgo train gpt --preset tiny --data data/text --set schedule.kind=linear",
    "asgo train gpt --preset tiny --print-config    # all keys for --set",
)
_IMAGENET_EXAMPLES = examples(
    "asgo train imagenet --optimizer accasro",
    "asgo train imagenet --model resnet50 --optimizer asgo",
    "asgo train imagenet --optimizer asro --gpus 8 --dry-run",
)


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _preset_option(task: str) -> Any:
    known = names.PRESETS[task]
    return typer.Option(
        metavar="NAME",
        help=f"Settings to begin with: {', '.join(known)}.",
        show_default=known[0],
        autocompletion=names.completing(known),
    )


OptimizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"{', '.join(names.OPTIMIZERS[:-1])} or {names.OPTIMIZERS[-1]}.",
        show_default="the preset's",
        autocompletion=names.completing(names.OPTIMIZERS),
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A classifier of torchvision, such as resnet50.",
        show_default="efficientnet_b1",
        autocompletion=names.completing(names.CLASSIFIERS),
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(metavar="N", help="Processes that decode images.", show_default="one a processor")
]
StepsOption = Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps.", show_default="the preset's")]
LrOption = Annotated[float | None, typer.Option(metavar="X", help="Peak learning rate.", show_default="the preset's")]
SeedOption = Annotated[int | None, typer.Option(metavar="N", help="Seed of weights, data order and dropout.")]
OutOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Run folder.", show_default="runs/PRESET-OPTIMIZER-sSEED")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest good checkpoint; begin if there is none.")
]
ConfigOption = Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Settings laid over the preset.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set one key, such as training.steps=100; may be given several times."
    ),
]
CompileOption = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Compile the model with torch.compile.")
]
ShardOptimizerOption = Annotated[
    bool | None,
    typer.Option(
        "--shard-optimizer/--no-shard-optimizer", help="Divide the optimizer's state and work among the processes."
    ),
]
ShardModelOption = Annotated[
    bool | None,
    typer.Option("--shard-model/--no-shard-model", help="Divide the weights, too: for what does not fit on one GPU."),
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="|".join(names.TRACKERS),
        help="Send the records there, too; may be given twice.",
        autocompletion=names.completing(names.TRACKERS),
    ),
]
PrintConfigOption = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved configuration as TOML and exit.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and exit.")]


@app.command("gpt", epilog=_GPT_EXAMPLES)
def gpt(
    preset: Annotated[str | None, _preset_option("gpt")] = None,
    optimizer: OptimizerOption = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Token shards, made by `asgo data`.", show_default="the preset's"),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Begin with the weights, and the shape, of a local Hugging Face GPT-2 folder."
        ),
    ] = None,
    steps: StepsOption = None,
    lr: LrOption = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Sequences a step, over all processes.")] = None,
    seed: SeedOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    device: Device = None,
    compile_model: CompileOption = None,
    gpus: GpusOption = None,
    processes: ProcessesOption = None,
    nodes: NodesOption = None,
    node_rank: NodeRankOption = None,
    rendezvous: RendezvousOption = None,
    max_restarts: MaxRestartsOption = 0,
    shard_optimizer: ShardOptimizerOption = None,
    shard_model: ShardModelOption = None,
    track: TrackOption = None,
    print_config: PrintConfigOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Pretrain a GPT on token shards.

    Later settings win: the preset, --config, the other options, --set.
    """
    asked = Launch(gpus, processes, nodes, node_rank, rendezvous, max_restarts)
    asked.check(device)
    flags = {
        "--optimizer": ("optimizer.name", optimizer),
        "--data": ("data.folder", None if data is None else str(data)),
        "--init-from": ("init_from", None if init_from is None else str(init_from)),
        "--steps": ("training.steps", steps),
        "--lr": ("optimizer.lr", lr),
        "--batch-size": ("training.batch_size", batch_size),
        "--seed": ("seed", seed),
        "--device": ("runtime.device", asked.device or device),
        "--compile": ("runtime.compile", compile_model),
        "--shard-optimizer": ("runtime.shard_optimizer", shard_optimizer),
        "--shard-model": ("runtime.shard_model", shard_model),
        "--track": ("runtime.track", track),
    }
    settings = _resolve("gpt", preset, config, flags, assignments or [], out if resume else None)
    _carry_out(settings, out, resume, print_config, dry_run, asked)


@app.command("imagenet", epilog=_IMAGENET_EXAMPLES)
def imagenet(
    preset: Annotated[str | None, _preset_option("imagenet")] = None,
    optimizer: OptimizerOption = None,
    model: ModelOption = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images, made by `asgo data imagenet`.", show_default="the preset's"),
    ] = None,
    steps: StepsOption = None,
    lr: LrOption = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Images a step, over all processes.")] = None,
    workers: WorkersOption = None,
    seed: SeedOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    device: Device = None,
    compile_model: CompileOption = None,
    gpus: GpusOption = None,
    processes: ProcessesOption = None,
    nodes: NodesOption = None,
    node_rank: NodeRankOption = None,
    rendezvous: RendezvousOption = None,
    max_restarts: MaxRestartsOption = 0,
    shard_optimizer: ShardOptimizerOption = None,
    shard_model: ShardModelOption = None,
    track: TrackOption = None,
    print_config: PrintConfigOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train a classifier on ImageNet.

    Later settings win: the preset, --config, the other options, --set.
    """
    asked = Launch(gpus, processes, nodes, node_rank, rendezvous, max_restarts)
    asked.check(device)
    flags = {
        "--optimizer": ("optimizer.name", optimizer),
        "--model": ("model.name", model),
        "--data": ("data.folder", None if data is None else str(data)),
        "--steps": ("training.steps", steps),
        "--lr": ("optimizer.lr", lr),
        "--batch-size": ("training.batch_size", batch_size),
        "--workers": ("runtime.workers", workers),
        "--seed": ("seed", seed),
        "--device": ("runtime.device", asked.device or device),
        "--compile": ("runtime.compile", compile_model),
        "--shard-optimizer": ("runtime.shard_optimizer", shard_optimizer),
        "--shard-model": ("runtime.shard_model", shard_model),
        "--track": ("runtime.track", track),
    }
    settings = _resolve("imagenet", preset, config, flags, assignments or [], out if resume else None)
    _carry_out(settings, out, resume, print_config, dry_run, asked)


def _carry_out(
    settings: RunConfig, out: Path | None, resume: bool, print_config: bool, dry_run: bool, asked: Launch
) -> None:
    folder = out or Path("runs") / f"{settings.preset}-{settings.optimizer.name}-s{settings.seed}"
    if print_config:
        _print_config(settings)
        return
    asked.check(settings.runtime.device)
    asked.check_machine()
    if dry_run:
        _show_plan(settings, folder, asked)
    elif asked:
        raise typer.Exit(launch.start(asked, sys.argv[1:]))
    else:
        _train(settings, folder, resume or is_restarted())


def _resolve(
    task: str,
    preset: str | None,
    config: Path | None,
    flags: dict[str, tuple[str, Any]],
    assignments: list[str],
    resumed: Path | None,
) -> RunConfig:
    from pipelines.gpt2.initial_model import resolve_with_initial_model
    from pipelines.resolve import Layer, assignment_layer, file_layer, preset_layer, saved_layer

    continues = resumed is not None and preset is None and config is None
    base = saved_layer(resumed, flags["--optimizer"][1]) if resumed is not None and continues else None
    files = [file_layer(config)] if config is not None else []
    named = preset or next(
        (layer.values["preset"] for layer in files if "preset" in layer.values), names.PRESETS[task][0]
    )
    layers: list[Layer] = [base or preset_layer(task, str(named)), *files]
    layers += [Layer(flag, {key: value}) for flag, (key, value) in flags.items() if value is not None]
    return resolve_with_initial_model([*layers, assignment_layer(assignments)])


def _print_config(settings: RunConfig) -> None:
    import tomli_w

    typer.echo(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)), nl=False)


def _warn_of_warmup(settings: RunConfig) -> None:
    """A warm-up that takes the whole run never comes to the peak."""
    from pipelines.training.schedule import lr_factor, warmup_steps

    steps = settings.training.steps
    warmup = warmup_steps(settings.schedule, steps)
    if warmup >= steps:
        highest = lr_factor(settings.schedule, steps - 1, steps)
        console.warn(
            f"the warm-up takes {warmup:,} steps and the run has {steps:,}: the learning rate rises to {highest:.0%} of"
            " its peak; set schedule.warmup_steps or schedule.warmup_fraction lower"
        )


def _show_plan(settings: RunConfig, folder: Path, asked: Launch) -> None:
    from pipelines.training.train import plan

    _warn_of_warmup(settings)
    planned = plan(settings, asked.size)
    training, unit = settings.training, _UNITS[settings.task]
    facts = [
        ("run folder", str(folder)),
        ("model", f"{planned.model}, {planned.parameters:,} parameters"),
        ("optimizer", f"{settings.optimizer.name}, lr {settings.optimizer.lr:g}, {settings.schedule.kind}"),
        ("data", settings.data.folder),
        ("step", f"{planned.tokens_per_step:,} {unit}, accumulated over {planned.micro_batches} micro-batches"),
        ("steps", f"{training.steps:,}"),
        (unit, f"{training.steps * planned.tokens_per_step:,} ({planned.epochs:.2f} epochs)"),
        ("device", f"{planned.device}, {planned.precision}"),
    ]
    if asked:
        facts.append(("processes", asked.description))
    console.show_facts(facts)
    if asked:
        typer.echo(launch.torchrun_command(asked, [argument for argument in sys.argv[1:] if argument != "--dry-run"]))
    console.say("dry run: nothing was written")


def _train(settings: RunConfig, folder: Path, resume: bool) -> None:
    from pipelines.training.train import train

    _warn_of_warmup(settings)
    warnings.showwarning = lambda message, *_: console.warn(str(message))
    # What a library prints is words, too, and must not end the run where stdout is a broken pipe.
    with (
        contextlib.redirect_stdout(sys.stderr),
        TrainingProgress(settings.optimizer.name, _SHORT_UNITS[settings.task]) as progress,
    ):
        rows = train(settings, folder, progress, resume=resume)
    first, *_, last = [row for row in rows if row["split"] == "val"]
    accuracy = f", top-1 {first['accuracy']:.1%} → {last['accuracy']:.1%}" if "accuracy" in last else ""
    console.say(
        f"done: validation loss {first['loss']:.4f} → {last['loss']:.4f}{accuracy} "
        f"in {settings.training.steps:,} steps; {folder}"
    )
    has_model = settings.task == "gpt" and any((folder / "checkpoints").iterdir())
    generate = [command("asgo", "generate", folder, "--prompt", "TEXT")] if has_model else []
    console.suggest_next(export_command(folder), *generate)
