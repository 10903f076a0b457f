"""`asgo train gpt`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asgo_cli import console
from asgo_cli.options import Device
from asgo_cli.progress import TrainingProgress

if TYPE_CHECKING:
    from pipelines.config import RunConfig
    from pipelines.resolve import Layer

app = typer.Typer(help="Train a model with one of the optimizers.", rich_markup_mode=None)

_DEFAULT_PRESET = "asro-gpt"
_EXAMPLES = (
    "Examples: `asgo train gpt --preset tiny --data data/text --optimizer asgo`; "
    "`asgo train gpt --resume --out runs/tiny-asgo-s42`; `--set schedule.kind=linear` sets any key of `--print-config`."
)


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("gpt", epilog=_EXAMPLES)
def gpt(
    preset: Annotated[
        str | None, typer.Option(help="Settings to begin with: asro-gpt (the default), asgo-gpt2, asgo-nanogpt, tiny.")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="asgo, dasgo, muon, shampoo, asro, accasro, adam, adamw, amsgrad, radam, rmsprop, adagrad, "
            "sgd-momentum or sgd-nesterov."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of token shards, made by `asgo data`.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step, over all processes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order and dropout.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/PRESET-OPTIMIZER-sSEED if absent.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest good checkpoint; begin if there is none.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file laid over the preset.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key, such as training.steps=100.")
    ] = None,
    device: Device = None,
    compile_model: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the model with torch.compile.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration as TOML and exit.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and exit.")] = False,
) -> None:
    """Pretrain a GPT on token shards. Later settings win: preset, --config, flags, --set."""
    flags = {
        "--optimizer": ("optimizer.name", optimizer),
        "--data": ("data.folder", None if data is None else str(data)),
        "--steps": ("training.steps", steps),
        "--lr": ("optimizer.lr", lr),
        "--batch-size": ("training.batch_size", batch_size),
        "--seed": ("seed", seed),
        "--device": ("runtime.device", device),
        "--compile": ("runtime.compile", compile_model),
    }
    settings = _resolve(preset, config, flags, assignments or [], out if resume else None)
    folder = out or Path("runs") / f"{settings.preset}-{settings.optimizer.name}-s{settings.seed}"
    if print_config:
        _print_config(settings)
    elif dry_run:
        _show_plan(settings, folder)
    else:
        _train(settings, folder, resume)


def _resolve(
    preset: str | None,
    config: Path | None,
    flags: dict[str, tuple[str, Any]],
    assignments: list[str],
    resumed: Path | None,
) -> RunConfig:
    from pipelines.resolve import Layer, assignment_layer, file_layer, preset_layer, resolve, saved_layer

    continues = resumed is not None and preset is None and config is None
    base = saved_layer(resumed, flags["--optimizer"][1]) if resumed is not None and continues else None
    files = [file_layer(config)] if config is not None else []
    named = preset or next((layer.values["preset"] for layer in files if "preset" in layer.values), _DEFAULT_PRESET)
    layers: list[Layer] = [base or preset_layer("gpt", str(named)), *files]
    layers += [Layer(flag, {key: value}) for flag, (key, value) in flags.items() if value is not None]
    return resolve([*layers, assignment_layer(assignments)])


def _print_config(settings: RunConfig) -> None:
    import tomli_w

    typer.echo(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)), nl=False)


def _show_plan(settings: RunConfig, folder: Path) -> None:
    from pipelines.training.train import plan

    planned = plan(settings)
    training = settings.training
    facts = [
        ("run folder", str(folder)),
        ("model", f"GPT, {planned.parameters:,} parameters"),
        ("optimizer", f"{settings.optimizer.name}, lr {settings.optimizer.lr:g}, {settings.schedule.kind}"),
        ("data", settings.data.folder),
        ("step", f"{planned.tokens_per_step:,} tokens, accumulated over {planned.micro_batches} micro-batches"),
        ("steps", f"{training.steps:,}"),
        ("tokens", f"{training.steps * planned.tokens_per_step:,} ({planned.epochs:.2f} epochs)"),
        ("device", f"{planned.device}, {planned.precision}"),
    ]
    console.show_facts(facts)
    console.say("dry run: nothing was written")


def _train(settings: RunConfig, folder: Path, resume: bool) -> None:
    from pipelines.training.train import train

    warnings.showwarning = lambda message, *_: console.warn(str(message))
    with TrainingProgress(settings.optimizer.name) as progress:
        rows = train(settings, folder, progress, resume=resume)
    losses = [row["loss"] for row in rows if row["split"] == "val"]
    console.say(
        f"done: validation loss {losses[0]:.4f} → {losses[-1]:.4f} in {settings.training.steps:,} steps; {folder}"
    )
    console.suggest_next(
        f"asgo export-metrics {folder} --out {folder.name}.csv", f"asgo generate {folder} --prompt TEXT"
    )
