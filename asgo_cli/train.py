"""`asgo train gpt`, `asgo train images` and `asgo train imagenet`."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asgo_cli import console, launch, names
from asgo_cli.export import export_command
from asgo_cli.help_text import examples
from asgo_cli.launch import LAUNCH_OPTIONS, Launch
from asgo_cli.options import Device
from asgo_cli.progress import TrainingProgress
from asgo_cli.slurm import SlurmJobs, SlurmOption, submit_training
from asgo_cli.worker import is_restarted
from pipelines.errors import UsageError
from pipelines.optimizers import short_name_of
from pipelines.shell import command
from pipelines.tasks import COMMANDS, task_of
from pipelines.tasks.description import TaskDescription

if TYPE_CHECKING:
    from pipelines.config import RunConfig
    from pipelines.resolve import Layer
    from pipelines.training.lineage import BranchPoint

app = typer.Typer(
    help="Train a model with one of the optimizers.",
    epilog=examples(
        "asgo train gpt --preset tiny --data data/text --optimizer asgo",
        "asgo train images --data data/mine --model resnet18 --optimizer asgo",
    ),
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


OptimizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"{', '.join(names.OPTIMIZERS)}; or an import path: module.Class or ./FILE.py:Class.",
        show_default="the preset's",
        autocompletion=names.completing(names.OPTIMIZERS),
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"{', '.join(names.OWN_CLASSIFIERS)}, or any classifier of torchvision, such as resnet50.",
        show_default="the preset's",
        autocompletion=names.completing(names.CLASSIFIERS),
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(metavar="N", help="Processes that decode images.", show_default="one per core")
]
InitFromOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Local Hugging Face GPT-2 or Llama folder: weights and shape to begin with."),
]
StepsOption = Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps.", show_default="the preset's")]
LrOption = Annotated[float | None, typer.Option(metavar="X", help="Peak learning rate.", show_default="the preset's")]
SeedOption = Annotated[int | None, typer.Option(metavar="N", help="Seed of weights, data order and dropout.")]
BranchOption = Annotated[
    str | None,
    typer.Option(
        metavar="RUN[@STEP]",
        help="Begin at a checkpoint of another run, with its settings; the newest one without STEP.",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Run folder.", show_default="runs/PRESET-OPTIMIZER-sSEED")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Resume from the newest valid checkpoint, or start a new run.")
]
ConfigOption = Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Settings that override the preset's.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set one key, such as training.steps=100; may be given several times."
    ),
]
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile", help="Compile the model with torch.compile.", show_default="on a CUDA device only"
    ),
]
ShardOptimizerOption = Annotated[
    bool | None,
    typer.Option(
        "--shard-optimizer/--no-shard-optimizer", help="Shard the optimizer's state and work over the processes."
    ),
]
ShardModelOption = Annotated[
    bool | None,
    typer.Option(
        "--shard-model/--no-shard-model",
        help="Shard the weights too (FSDP2), for a model that does not fit on one GPU.",
    ),
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="|".join(names.TRACKERS),
        help="Log metrics there too; may be given twice.",
        autocompletion=names.completing(names.TRACKERS),
    ),
]
PrintConfigOption = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved configuration as TOML and exit.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and exit.")]
PlotOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="With --dry-run: draw the schedule (.png, .pdf or .svg)."),
]
_TASK_OPTIONS = frozenset().union(*(task.options for task in COMMANDS))


@dataclass(frozen=True)
class _Option:
    """An option of a command and the dotted configuration key that it sets, if any."""

    name: str
    annotation: Any
    key: str | None = None
    default: Any = None

    @property
    def flag(self) -> str:
        """The option as the user types it, such as --batch-size."""
        return f"--{self.name.replace('_', '-')}"


def _options_of(task: TaskDescription) -> list[_Option]:
    """Return the options of `asgo train TASK`, in the order of its help page."""
    preset = typer.Option(
        metavar="NAME",
        help=f"Settings to begin with: {', '.join(task.presets)}.",
        show_default=task.presets[0],
        autocompletion=names.completing(task.presets),
    )
    data = typer.Option(metavar="FOLDER", help=f"{task.data}.", show_default="the preset's")
    batch_size = typer.Option(metavar="N", help=f"{task.samples} per step, over all processes.")
    options = [
        _Option("preset", Annotated[str | None, preset]),
        _Option("optimizer", OptimizerOption, "optimizer.name"),
        _Option("model", ModelOption, "model.name"),
        _Option("data", Annotated[Path | None, data], "data.folder"),
        _Option("init_from", InitFromOption, "init_from"),
        _Option("steps", StepsOption, "training.steps"),
        _Option("lr", LrOption, "optimizer.lr"),
        _Option("batch_size", Annotated[int | None, batch_size], "training.batch_size"),
        _Option("workers", WorkersOption, "runtime.workers"),
        _Option("seed", SeedOption, "seed"),
        _Option("branch", BranchOption),
        _Option("out", OutOption),
        _Option("resume", ResumeOption, default=False),
        _Option("config", ConfigOption),
        _Option("set", SetOption),
        _Option("device", Device, "runtime.device"),
        _Option("compile", CompileOption, "runtime.compile"),
        *(_Option(name, annotation, default=getattr(Launch(), name)) for name, annotation in LAUNCH_OPTIONS.items()),
        _Option("slurm", SlurmOption),
        _Option("shard_optimizer", ShardOptimizerOption, "runtime.shard_optimizer"),
        _Option("shard_model", ShardModelOption, "runtime.shard_model"),
        _Option("track", TrackOption, "runtime.track"),
        _Option("print_config", PrintConfigOption, default=False),
        _Option("dry_run", DryRunOption, default=False),
        _Option("plot", PlotOption),
    ]
    return [option for option in options if option.name not in _TASK_OPTIONS or option.name in task.options]


def _add_command(task: TaskDescription) -> None:
    """Add the command `asgo train TASK`. Typer reads the options from the signature that is built here."""
    options = _options_of(task)

    def train(**given: Any) -> None:
        asked = Launch(**{name: given[name] for name in LAUNCH_OPTIONS})
        jobs = None if given["slurm"] is None else SlurmJobs.of(given["slurm"], asked)
        if jobs is not None:
            asked, given["resume"] = jobs.launch, True
        asked.check(given["device"])
        if given["plot"] is not None and not given["dry_run"]:
            raise UsageError("--plot: draws the schedule without training; add --dry-run")
        given["device"] = asked.device or given["device"]
        flags = {option.flag: (option.key, given[option.name]) for option in options if option.key is not None}
        resumed = given["out"] if given["resume"] else None
        branch = _branch_point(given["branch"], given["preset"], given["out"])
        settings = _resolve(task, given["preset"], given["config"], flags, given["set"] or [], resumed, branch)
        modes = {name: given[name] for name in ("resume", "print_config", "dry_run", "plot")}
        _carry_out(settings, given["out"], asked, branch=branch, jobs=jobs, **modes)

    train.__doc__ = f"{task.summary}\n\nLater settings win: the preset, --config, the other options, --set."
    train.__annotations__ = {option.name: option.annotation for option in options}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(option.name, keyword, default=option.default, annotation=option.annotation)
        for option in options
    ]
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(task.command or task.name, epilog=examples(*task.examples))(train)


for _task in COMMANDS:
    _add_command(_task)


def _branch_point(text: str | None, preset: str | None, out: Path | None) -> BranchPoint | None:
    if text is None:
        return None
    from pipelines.training.lineage import BranchPoint

    if out is None:
        raise UsageError("--branch: needs --out FOLDER for the new run")
    if preset is not None:
        raise UsageError("--branch: the new run has the settings of the other one; leave --preset out")
    return BranchPoint.parse(text)


def _carry_out(
    settings: RunConfig,
    out: Path | None,
    asked: Launch,
    *,
    branch: BranchPoint | None,
    jobs: SlurmJobs | None,
    resume: bool,
    print_config: bool,
    dry_run: bool,
    plot: Path | None,
) -> None:
    name = short_name_of(settings.optimizer.name)
    folder = out or Path("runs") / f"{settings.preset}-{name}-s{settings.seed}"
    if print_config:
        _print_config(settings)
        return
    asked.check(settings.runtime.device)
    if jobs is not None:
        submit_training(jobs, settings, folder, dry_run)
        return
    asked.check_machine()
    warnings.showwarning = lambda message, *_: console.warn(str(message))
    if dry_run:
        _show_plan(settings, folder, branch, plot, asked)
    elif asked:
        from asgo_cli.supervisor import start

        raise typer.Exit(start(asked, sys.argv[1:]))
    else:
        _train(settings, folder, resume or is_restarted(), branch)


def _resolve(
    task: TaskDescription,
    preset: str | None,
    config: Path | None,
    flags: dict[str, tuple[str, Any]],
    assignments: list[str],
    resumed: Path | None,
    branch: BranchPoint | None,
) -> RunConfig:
    from pipelines.resolve import Layer, assignment_layer, branch_layer, file_layer, preset_layer, saved_layer
    from pipelines.steps import resolve_run

    continues = resumed is not None and (branch is not None or (preset is None and config is None))
    base = saved_layer(resumed, flags["--optimizer"][1]) if resumed is not None and continues else None
    layers: list[Layer] = [file_layer(config)] if config is not None else []
    named = preset or next((layer.values["preset"] for layer in layers if "preset" in layer.values), task.presets[0])
    for flag, (key, value) in flags.items():
        if value is not None:
            layers.append(Layer(flag, {key: str(value) if isinstance(value, Path) else value}))
    layers.append(assignment_layer(assignments))
    if base is None:
        base = branch_layer(task.name, branch.run, layers) if branch else preset_layer(task.name, str(named))
    return resolve_run([base, *layers])


def _print_config(settings: RunConfig) -> None:
    import tomli_w

    typer.echo(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)), nl=False)


def _warn_of_warmup(settings: RunConfig) -> None:
    """Warn if the warm-up takes the whole run: the learning rate never reaches its peak."""
    from pipelines.training.schedule import factor_at, warmup_steps

    steps = settings.training.steps
    warmup = warmup_steps(settings.schedule, steps)
    if warmup >= steps:
        highest = factor_at(settings.schedule, steps - 1, steps)
        console.warn(
            f"the warm-up takes {warmup:,} steps and the run has {steps:,}: the learning rate reaches only"
            f" {highest:.0%} of its peak; lower schedule.warmup_steps or schedule.warmup_fraction"
        )


def _show_plan(settings: RunConfig, folder: Path, branch: BranchPoint | None, plot: Path | None, asked: Launch) -> None:
    from pipelines.training.branch import open_parent
    from pipelines.training.run_folder import RunFolder
    from pipelines.training.train import plan

    if plot is not None:
        from pipelines.analysis.schedule_figure import check_figure_path, draw_schedule

        check_figure_path(plot)
    _warn_of_warmup(settings)
    planned = plan(settings, asked.size)
    training, unit = settings.training, task_of(settings).unit
    facts = [
        ("run folder", str(folder)),
        ("model", f"{planned.model}, {planned.parameters:,} parameters"),
        ("optimizer", f"{settings.optimizer.name}, lr {settings.optimizer.lr:g}, {settings.schedule.kind}"),
        *((f"  {part.name}", f"{part.parameters:,} parameters, {part.settings}") for part in planned.parts),
        *([("shadows", ", ".join(settings.shadows.optimizers))] if settings.shadows.optimizers else []),
        ("data", settings.data.folder),
        ("step", f"{planned.tokens_per_step:,} {unit}, accumulated over {planned.micro_batches} micro-batches"),
        ("steps", f"{training.steps:,}"),
        (unit, f"{training.steps * planned.tokens_per_step:,} ({planned.epochs:.2f} epochs)"),
        ("device", f"{planned.device}, {planned.precision}"),
    ]
    if branch is not None and not RunFolder(folder).exists():
        parent = open_parent(branch, settings, console.say).checkpoint
        facts.append(("branch", f"from {branch.run} at step {parent.step:,}"))
    if asked:
        facts.append(("processes", asked.description))
    console.show_facts(facts)
    if asked:
        arguments = launch.without_options(sys.argv[1:], "--plot", without_value=["--dry-run"])
        typer.echo(launch.torchrun_command(asked, arguments))
    if plot is None:
        console.say("dry run: nothing was written")
        return
    draw_schedule(planned.schedule, plot)
    console.say(f"{plot}: the schedule; dry run: nothing else was written")


def _train(settings: RunConfig, folder: Path, resume: bool, branch: BranchPoint | None) -> None:
    from pipelines.training.train import train

    _warn_of_warmup(settings)
    # Prints of libraries go to stderr: on stdout, a broken pipe would end the run.
    with (
        contextlib.redirect_stdout(sys.stderr),
        TrainingProgress(settings.optimizer.name, task_of(settings).short_unit) as progress,
    ):
        rows = train(settings, folder, progress, resume=resume, branch=branch)
    first, *_, last = [row for row in rows if row["split"] == "val"]
    accuracy = f", top-1 {first['accuracy']:.1%} → {last['accuracy']:.1%}" if "accuracy" in last else ""
    console.say(
        f"done: validation loss {first['loss']:.4f} → {last['loss']:.4f}{accuracy} "
        f"in {settings.training.steps:,} steps; {folder}"
    )
    has_model = task_of(settings).writes_text and any((folder / "checkpoints").iterdir())
    generate = [command("asgo", "generate", folder, "--prompt", "TEXT")] if has_model else []
    console.suggest_next(export_command(folder), *generate)
