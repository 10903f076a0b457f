"""Run training from a configuration: build everything, begin or resume the run folder, call `fit`."""

from __future__ import annotations

import contextlib
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optim import build_optimizer
from optim.groups import parts_of
from optim.sharded import ShardedOptimizer
from optim.specs import PARTS
from pipelines.compiler_cache import use_private_compiler_cache
from pipelines.config import ImportedOptimizerSettings, RunConfig, differences
from pipelines.errors import AsgoError, Diverged, UsageError
from pipelines.imported_optimizers import check_part_keywords, named_constructor, source_of
from pipelines.shadow_settings import errors_of_shadow, line_of_shadow, shadow_configs
from pipelines.shell import command
from pipelines.stopping import stop_on_signals
from pipelines.tasks import task_of
from pipelines.training.arithmetic import agree_on_arithmetic, differences_in_arithmetic
from pipelines.training.average import WeightAverage
from pipelines.training.branch import Parent, find_parent, require_same_branch
from pipelines.training.checkpoint import Checkpoint, newest_checkpoint, prune, remove_leftovers, restore
from pipelines.training.checkpoint_writer import CheckpointWriter
from pipelines.training.clock import StepClock
from pipelines.training.device import compiles, describe_device, pick_device, pick_precision
from pipelines.training.distributed import ALONE, Ranks, local_batch, process_group, seed_of_rank
from pipelines.training.imported import ImportedOptimizer, rehearse
from pipelines.training.layer_statistics import LayerStatistics
from pipelines.training.lineage import BranchPoint
from pipelines.training.loop import fit, save
from pipelines.training.metrics import Row
from pipelines.training.parallel import compile_model, wrap_in_ddp
from pipelines.training.random_state import restored_random_state
from pipelines.training.reporter import Reporter
from pipelines.training.run import Run
from pipelines.training.run_folder import Divergence, RunFolder, refuse_existing
from pipelines.training.schedule import ScheduledValue, Scheduler
from pipelines.training.shadows import Shadows, new_shadows
from pipelines.training.state import TrainState
from pipelines.training.task import Task
from pipelines.training.trackers import require_trackers, tracked
from pipelines.training.trial import fallback, try_out
from pipelines.training.watchdog import Watchdog

_NO_HEAD = (
    "optimizer.parts.head has no effect: with model.tied_head=true, the head has the weight of the embedding; "
    "optimizer.parts.embedding sets both"
)


@dataclass(frozen=True)
class PlannedPart:
    """Parameters of a part of the model with equal settings of the optimizer."""

    name: str
    parameters: int
    settings: str


@dataclass(frozen=True)
class Plan:
    """Summary of a run for `--dry-run`."""

    parameters: int
    parts: tuple[PlannedPart, ...]
    model: str
    tokens_per_step: int
    micro_batches: int
    epochs: float
    device: str
    precision: str
    schedule: list[ScheduledValue]


def plan(config: RunConfig, processes: int = 1) -> Plan:
    """Open the data and build the model of a run of `processes` processes; returns its summary. Writes nothing.

    Raises `UsageError` if the batch does not divide equally among the processes, a tracker is not installed, or the
    optimizer has no value that is scheduled.
    """
    require_trackers(config.runtime.track)
    device = pick_device(config.runtime)
    local = local_batch(config.training, Ranks(size=processes))
    task = task_of(config).build(config, torch.device("cpu"), ALONE)
    task.close()
    training, optimizer = config.training, new_optimizer(task.model, config)
    for shadow in shadow_configs(config).values():
        with errors_of_shadow():
            new_optimizer(task.model, shadow)
    return Plan(
        parameters=sum(param.numel() for param in task.model.parameters()),
        parts=_planned_parts(task.model, optimizer),
        model=config.model.title,
        tokens_per_step=training.batch_size * task.tokens_per_sample,
        micro_batches=len(local.micro_batches),
        epochs=task.epoch_at(training.steps),
        device=describe_device(device),
        precision=str(pick_precision(training, device)).removeprefix("torch."),
        schedule=Scheduler(config.schedule, training.steps, optimizer).values,
    )


def _rehearse(model: nn.Module, config: RunConfig, device: torch.device, note: Callable[[str], None]) -> None:
    """Check whether a run with an optimizer of another library can be resumed; raises like `rehearse`."""
    if isinstance(config.optimizer, ImportedOptimizerSettings):
        optimizer = new_optimizer(model, config)
        scheduler = Scheduler(config.schedule, config.training.steps, optimizer)
        problem = rehearse(config.optimizer, optimizer, scheduler.keys, device)
        if problem is not None:
            note(problem)


def _planned_parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[PlannedPart, ...]:
    """Return what the optimizer does with each part of the model."""
    part_of, params = parts_of(model), dict(model.named_parameters())
    names = {id(params[name]): part for name, part in part_of.items()}
    counts: dict[tuple[str, str], int] = {}
    for group in optimizer.param_groups:
        rule = [group["rule"]] if "rule" in group else []
        shown = [f"{key} {group[key]:g}" for key in ("lr", "weight_decay") if isinstance(group.get(key), int | float)]
        for param in group["params"]:
            key = names[id(param)], ", ".join([*rule, *shown])
            counts[key] = counts.get(key, 0) + param.numel()
    ordered = sorted(counts.items(), key=lambda item: PARTS.index(item[0][0]))
    return tuple(PlannedPart(part, count, settings) for (part, settings), count in ordered)


def train(
    config: RunConfig, out: Path, reporter: Reporter, *, resume: bool = False, branch: BranchPoint | None = None
) -> list[Row]:
    """Train in the folder `out`, from the start or from its newest valid checkpoint; returns all rows of metrics.

    A new run starts with random or initial weights, or at the checkpoint `branch` of another run.
    Call it on every rank. Only rank 0 reports and writes the folder.

    Raises:
        UsageError: the folder holds a run and `resume` is false, or its configuration or data differ; or the run cannot
            branch there.
        RunInterrupted: a signal stopped the run; it is saved.
        AsgoError: the run failed; see `fit`.
    """
    device = pick_device(config.runtime)
    # On CUDA, our optimizers compile their updates; those of other libraries may anywhere.
    if compiles(config.runtime, device) or device.type == "cuda" or config.optimizer.is_imported:
        use_private_compiler_cache()
    with process_group(device, config.runtime.timeout_s) as ranks, _watched(ranks, config, reporter) as beat:
        folder = RunFolder(out)
        resume = ranks.any(resume)  # rank 0 may be on a machine that was started without --resume
        ranks.on_rank_0(lambda: require_trackers(config.runtime.track))
        continues = ranks.on_rank_0(lambda: _continues(folder, config, resume, branch))
        parent = find_parent(folder, branch, continues, config, ranks, reporter.note)
        torch.manual_seed(config.seed)
        with contextlib.closing(task_of(config).build(config, device, ranks)) as task, contextlib.closing(folder):
            _rehearse(task.model, config, device, reporter.note)
            for shadow in shadow_configs(config).values():
                with errors_of_shadow():
                    _rehearse(task.model, shadow, device, lambda line: reporter.note(line_of_shadow(line)))
            ranks.on_rank_0(lambda: _claim(folder, continues))
            return _train(task, config, folder, device, reporter, ranks, beat, continues, parent)


@contextlib.contextmanager
def _watched(ranks: Ranks, config: RunConfig, reporter: Reporter) -> Iterator[Callable[[str], None]]:
    """Context manager that yields a heartbeat callback. The watchdog ends a stalled run and names the slowest rank."""
    if ranks.store is None:
        yield lambda doing: None
        return
    timeout_s = config.runtime.timeout_s
    with Watchdog(ranks.store, ranks.rank, ranks.size, timeout_s, socket.gethostname(), reporter.hung) as watchdog:
        yield watchdog.beat


def _continues(folder: RunFolder, config: RunConfig, resume: bool, branch: BranchPoint | None) -> bool:
    """Return whether to resume the run in the folder. Raises `UsageError` if that is not possible or not requested."""
    if resume and folder.exists():
        require_same_branch(folder, branch)
        saved = folder.config()
        _require_same_config(folder.path, saved, config, _how_to_train_further(folder.path, saved, config))
        _require_data(folder.path, Path(config.data.folder))
        if config.optimizer.is_imported:
            folder.require_source(source_of(config.optimizer.name))
        return True
    refuse_existing(folder)
    if branch is not None:
        _require_data(branch.run, Path(config.data.folder))
    return False


def _claim(folder: RunFolder, continues: bool) -> None:
    """Lock the folder. Raises `UsageError` if another process trains there, or has begun a run since."""
    folder.lock()
    if not continues:
        refuse_existing(folder)  # a run may have begun and ended since the first check
        return
    folder.checkpoints.mkdir(exist_ok=True)
    remove_leftovers(folder.checkpoints)


def _train(
    task: Task,
    config: RunConfig,
    folder: RunFolder,
    device: torch.device,
    reporter: Reporter,
    ranks: Ranks,
    beat: Callable[[str], None],
    continues: bool,
    parent: Parent | None,
) -> list[Row]:
    finished = ranks.on_rank_0(lambda: _record_without_checkpoints(folder, config, reporter)) if continues else None
    if finished is not None:
        return finished
    resumes = continues and parent is None
    own = _find_checkpoint(folder, config, task, reporter, ranks) if resumes else None
    for line in parent.notes(config, task.description()["fingerprint"]) if parent is not None else ():
        reporter.note(line)
    checkpoint = own if parent is None else parent.checkpoint
    state = _initial_state(task, config, device, reporter, ranks, checkpoint)
    if ranks.is_first:
        if not continues:
            source = source_of(config.optimizer.name) if config.optimizer.is_imported else None
            lineage = () if parent is None else parent.lineage
            folder.begin(config, task.description(), describe_device(device), lineage, source)
        folder.continue_from(state.rows)
        folder.statistics.keep_until(state.step)
        folder.shadows.keep_until(state.step)
        reporter.begin(state.step, config.training.steps)
    if compiles(config.runtime, device):
        compile_model(task.model)
    task.network = wrap_in_ddp(task.model, ranks)
    statistics, shadows = LayerStatistics(state, config, folder), Shadows(state, config, folder)
    try:
        with (
            fallback(compiles(config.runtime, device)),
            stop_on_signals() as stop,
            tracked(reporter, config, folder.path, state.rows, ranks) as tracked_reporter,  # closes when all is saved
            CheckpointWriter(folder, config.checkpoint.keep) as writer,
        ):
            saved = (state.step, len(state.rows)) if own is not None else None
            run = Run(task, config, folder, state, tracked_reporter, stop, writer, beat, saved)
            run.around_step = partial(_measured, run, statistics, shadows)
            if parent is not None:
                save(run)
                writer.wait()  # from here on, the branch does not need its parent
            try_out(run)
            _note_other_arithmetic(checkpoint, run)
            fit(run)
        if ranks.is_first:
            folder.finish()
    except Diverged as error:
        if ranks.is_first:
            folder.record_divergence(Divergence(error.step, str(error)))
        raise
    finally:
        task.network = task.model  # the DDP wrapper would keep the process group, which ends soon
        for line in [*task.notes(), *statistics.notes(), *shadows.notes()]:
            reporter.note(line)
    return state.rows


@contextlib.contextmanager
def _measured(run: Run, statistics: LayerStatistics, shadows: Shadows, step: int) -> Iterator[None]:
    """Context manager around an optimizer step."""
    with shadows.of_step(run, step), statistics.of_step(step):
        yield


def _initial_state(
    task: Task,
    config: RunConfig,
    device: torch.device,
    reporter: Reporter,
    ranks: Ranks,
    checkpoint: Checkpoint | None,
) -> TrainState:
    """Return the state of a checkpoint, or without one that before the first step."""
    if checkpoint is None:
        for line in task.load_initial_weights():
            reporter.note(line)
    state = fresh_state(task.model, config, device, ranks)
    with restored_random_state(device), errors_of_shadow():
        state.shadows = new_shadows(task.model, config, lambda model, shadow: fresh_state(model, shadow, device, ranks))
    state.arithmetic = agree_on_arithmetic(state.optimizer, config.runtime, device, ranks, reporter.note)
    if checkpoint is not None:
        restore(checkpoint, state, config)
        late = ", ".join(name for name, shadow in state.shadows.items() if not shadow.updates)
        if late and state.step:
            reporter.note(f"shadow optimizers without a saved state begin at step {state.step}: {late}")
    return state


def _note_other_arithmetic(checkpoint: Checkpoint | None, run: Run) -> None:
    """Say what the run computes with now and did not before the checkpoint."""
    before = {} if checkpoint is None else checkpoint.state.get("arithmetic", {})
    warning = differences_in_arithmetic(before, run.state.arithmetic)
    if checkpoint is not None and warning:
        run.reporter.note(f"{checkpoint.folder}: {warning}")


def fresh_state(model: nn.Module, config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> TrainState:
    """Return the state before the first step: a model and a new optimizer.

    Raises `UsageError` if the optimizer refuses its settings, or has no value that is scheduled.
    """
    optimizer = new_optimizer(model, config)
    if ranks.joined and (config.runtime.shard_optimizer or config.runtime.shard_model):
        optimizer = ShardedOptimizer(optimizer)
    scheduler = Scheduler(config.schedule, config.training.steps, optimizer)
    scaled = pick_precision(config.training, device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    decay = config.training.ema_decay
    average = None if decay is None else WeightAverage(model, decay)
    if ranks.rank:
        torch.manual_seed(seed_of_rank(config.seed, ranks.rank))  # after initialization, ranks draw different numbers
    imported = None
    if config.optimizer.is_imported:
        imported = ImportedOptimizer(optimizer, dict(model.named_parameters()), scheduler.keys)
    return TrainState(model, optimizer, scheduler, scaler, StepClock(device), ranks, average, imported)


def new_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Return a new optimizer for a model, split into the parts that settings or schedule name.

    Raises `UsageError` if it refuses the settings.
    """
    name, keywords = config.optimizer.name, config.optimizer_keywords()
    parts: dict[str, Any] = {part: {} for part in config.schedule.named_parts}
    parts |= keywords.get("parts", {})
    if getattr(config.model, "tied_head", False) and parts.pop("head", None):  # a preset may have an untied head
        warnings.warn(_NO_HEAD, stacklevel=1)  # of this line, so that Python shows it once
    keywords["parts"] = parts
    if not config.optimizer.is_imported:
        try:
            return build_optimizer(model, name, config.training.steps, **keywords)
        except ValueError as error:
            raise UsageError(f"--optimizer {name}: {error}") from None
    try:
        optimizer = build_optimizer(model, named_constructor(name), config.training.steps, **keywords)
        check_part_keywords(optimizer, config.optimizer_keywords().get("parts", {}))
    except ValueError as error:
        raise UsageError(f"--optimizer {name}: {error}") from None
    return optimizer


def _require_same_config(place: Path, saved: RunConfig, config: RunConfig, advice: Sequence[str] = ()) -> None:
    changed = differences(saved, config)
    if changed:
        lines = [f"{place}: cannot be resumed with another configuration: {line}" for line in changed]
        raise UsageError("\n".join([*lines, *advice]))


def _how_to_train_further(run: Path, saved: RunConfig, config: RunConfig) -> list[str]:
    """Return advice if more steps are asked for: the whole schedule depends on them, so the run cannot be resumed."""
    if config.training.steps <= saved.training.steps:
        return []
    branch = command("asgo", "train", saved.task, "--branch", run, "--steps", config.training.steps, "--out", "ANOTHER")
    return [f"{run}: the schedule depends on the number of steps; to train further, begin a new run there: {branch}"]


def _require_data(run: Path, data: Path) -> None:
    if not data.exists():
        missing = "does not exist" if data.is_absolute() else f"does not exist in this directory, {Path.cwd()}"
        raise UsageError(f"{run}: its data folder, {data}, {missing}; give its path with --data FOLDER")


def _record_without_checkpoints(folder: RunFolder, config: RunConfig, reporter: Reporter) -> list[Row] | None:
    """Return the metrics of a finished run whose checkpoints were removed; None for any other run.

    Raises `AsgoError` if the run is not finished: it cannot be resumed, and must not start again without a request.
    """
    if not folder.lost_checkpoints():
        return None
    rows = folder.rows()
    if not rows:
        return None
    if not folder.ends_at(config.training.steps):
        raise AsgoError(
            f"{folder.path}: cannot be resumed from step {rows[-1]['step']}: its checkpoints were removed; nothing was "
            "changed; train again in another --out"
        )
    reporter.note(f"{folder.path}: already finished; its checkpoints were removed; train again in another --out")
    return rows


def _find_checkpoint(
    folder: RunFolder, config: RunConfig, task: Task, reporter: Reporter, ranks: Ranks
) -> Checkpoint | None:
    """Return the newest valid checkpoint, on every rank; rank 0 finds it."""

    def find() -> dict[str, Any] | None:
        checkpoint = _newest_of_this_run(folder, config, task, reporter)
        return None if checkpoint is None else {"name": checkpoint.folder.name, "state": checkpoint.state}

    found = ranks.on_rank_0(find)
    return None if found is None else Checkpoint(folder.checkpoints / found["name"], found["state"])


def _newest_of_this_run(folder: RunFolder, config: RunConfig, task: Task, reporter: Reporter) -> Checkpoint | None:
    checkpoint, skipped = newest_checkpoint(folder.checkpoints)
    for line in skipped:
        reporter.note(line)
    if checkpoint is None and skipped:
        raise AsgoError(f"{folder.path}: no valid checkpoint; nothing was changed; train again in another --out")
    if checkpoint is None:
        reporter.note(f"{folder.path}: no checkpoint yet: starting from step 0")
        return None
    _require_same_config(checkpoint.folder, checkpoint.config(), config)
    if checkpoint.state["data"]["fingerprint"] != task.description()["fingerprint"]:
        raise UsageError(f"{folder.path}: was trained on other data than --data has now; give it the same data")
    prune(folder.checkpoints, checkpoint.step, config.checkpoint.keep)  # a kill may have prevented it
    folder.mark_saved()
    reporter.note(f"resuming from {checkpoint.folder}")
    return checkpoint
