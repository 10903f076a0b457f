"""Begin a run at a checkpoint of another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig, differences
from pipelines.errors import AsgoError, UsageError
from pipelines.imported_optimizers import source_of
from pipelines.storage import refuse_file, sha256_of
from pipelines.training.checkpoint import STATE, Checkpoint, find_checkpoint, keeps_optimizer_state, open_checkpoint
from pipelines.training.distributed import Ranks
from pipelines.training.lineage import Ancestor, BranchPoint
from pipelines.training.run_folder import RunFolder, checkpoint_folders, checkpoint_name, step_of

Note = Callable[[str], None]

_FIXED = ("task", "model.", "training.batch_size", "initial_weights_sha256")
"""Keys, or prefixes, that a branch cannot change. The position in the data is step × batch size."""
_FREE = ("model.dropout", "model.z_loss", "model.channels_last")
"""Exceptions: they change neither the weights nor the function that is evaluated."""


@dataclass(frozen=True)
class Parent:
    """The checkpoint at which a branch begins, and the lineage of the branch, oldest first."""

    checkpoint: Checkpoint
    lineage: tuple[Ancestor, ...]
    optimizer_sha256: str | None = None
    """Of the code of the parent's optimizer, if it is imported."""

    def notes(self, config: RunConfig, fingerprint: str) -> Iterator[str]:
        """Yield a line for what the branch does not take from its parent. `fingerprint` is that of its data."""
        step, before = self.checkpoint.step, self.checkpoint.config()
        yield f"branching from {self.checkpoint.folder}"
        if not keeps_optimizer_state(before, config):
            other = "other settings" if before.optimizer.name == config.optimizer.name else before.optimizer.name
            yield f"{config.optimizer.name} begins at step {step} with a new state (before: {other})"
        elif config.optimizer.is_imported and source_of(config.optimizer.name).sha256 != self.optimizer_sha256:
            yield f"from step {step} on, {config.optimizer.name} has other code than in the parent; its state is kept"
        order = getattr(config.data, "order", "shuffled")  # images are always shuffled
        if order != getattr(before.data, "order", "shuffled"):
            yield f"from step {step} on, the order of the data is {order}"
        if config.seed != before.seed:
            seeded = "data order and random numbers" if order == "shuffled" else "random numbers"
            yield f"from step {step} on, {seeded} are those of seed {config.seed}"
        if fingerprint != self.checkpoint.state["data"]["fingerprint"]:
            yield f"from step {step} on, the data is {config.data.folder}, which the parent was not trained on"
        if config.training.ema_decay is not None and before.training.ema_decay is None:
            yield f"the moving average begins with the weights of step {step}"


def open_parent(point: BranchPoint, config: RunConfig, note: Note) -> Parent:
    """Find and verify the checkpoint at which a branch with this configuration begins.

    Raises:
        UsageError: there is no such run or checkpoint, or a branch cannot have this configuration.
        AsgoError: the checkpoint is damaged.
    """
    checkpoint = _checkpoint(point, note)
    _require_possible(point, checkpoint, config)
    ancestor = Ancestor(
        run=str(point.run),
        step=checkpoint.step,
        sha256=sha256_of(checkpoint.folder / STATE),
        optimizer=checkpoint.config().optimizer.name,
    )
    run = RunFolder(point.run)
    return Parent(checkpoint, (*run.lineage(), ancestor), run.optimizer_source().get("sha256"))


def _checkpoint(point: BranchPoint, note: Note) -> Checkpoint:
    refuse_file(point.run)
    run = RunFolder(point.run)
    if not run.exists():
        raise UsageError(f"--branch {point}: {point.run} holds no run")
    if point.step is None:
        checkpoint, skipped = find_checkpoint(point.run)
        for line in skipped:
            note(line)
        return checkpoint
    folder = run.checkpoints / checkpoint_name(point.step)
    if not folder.is_dir():
        steps = [str(step_of(folder)) for folder in checkpoint_folders(run.checkpoints)]
        raise UsageError(f"--branch {point}: no such checkpoint; the run has those of steps {', '.join(steps) or '-'}")
    return open_checkpoint(folder)


def _require_possible(point: BranchPoint, checkpoint: Checkpoint, config: RunConfig) -> None:
    changed = differences(checkpoint.config(), config)
    fixed = [line for line in changed if line.startswith(_FIXED) and not line.startswith(_FREE)]
    problems = [f"--branch {point}: a branch cannot change this: {line}" for line in fixed]
    if config.training.steps <= checkpoint.step:
        problems.append(
            f"--branch {point}: the branch begins at step {checkpoint.step}, so training.steps={config.training.steps} "
            "leaves nothing to train; give more --steps, or an earlier step as RUN@STEP"
        )
    if problems:
        raise UsageError("\n".join(problems))


def find_parent(
    folder: RunFolder, point: BranchPoint | None, continues: bool, config: RunConfig, ranks: Ranks, note: Note
) -> Parent | None:
    """Return where a branch begins, on every rank; None if the run is none, or has begun. A collective.

    Rank 0 finds the checkpoint. A branch that was killed before its first own checkpoint begins again.
    """

    def find() -> dict[str, Any] | None:
        wanted = _interrupted(folder) if continues else point
        if wanted is None:
            return None
        parent = open_parent(wanted, config, note)
        if continues and [*parent.lineage] != folder.lineage():
            raise AsgoError(f"{folder.path}: {wanted} has changed since this branch began; choose another --out")
        lineage = [ancestor.model_dump() for ancestor in parent.lineage]
        found = {"folder": str(parent.checkpoint.folder), "state": parent.checkpoint.state, "lineage": lineage}
        return {**found, "optimizer_sha256": parent.optimizer_sha256}

    found = ranks.on_rank_0(find)
    if found is None:
        return None
    lineage = tuple(map(Ancestor.model_validate, found["lineage"]))
    return Parent(Checkpoint(Path(found["folder"]), found["state"]), lineage, found["optimizer_sha256"])


def _interrupted(folder: RunFolder) -> BranchPoint | None:
    """Return where an existing branch begins if it has no checkpoint of its own yet."""
    lineage = folder.lineage()
    if not lineage or folder.was_saved() or checkpoint_folders(folder.checkpoints):
        return None
    return BranchPoint(Path(lineage[-1].run), lineage[-1].step)


def require_same_branch(folder: RunFolder, point: BranchPoint | None) -> None:
    """Raise `UsageError` if an existing run is not a branch from `point`."""
    lineage = folder.lineage()
    if point is not None and not (lineage and point.is_of(lineage[-1])):
        begun = f"branched from {lineage[-1]}" if lineage else "is not a branch"
        raise UsageError(f"{folder.path}: holds a run that {begun}, not from {point}; choose another --out")
