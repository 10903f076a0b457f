"""The training loop: evaluate → save → stop? → accumulate gradients → clip → schedule → optimizer step → log."""

from __future__ import annotations

import contextlib
import math
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipelines import shell
from pipelines.config import RunConfig
from pipelines.errors import AsgoError, Diverged, RunInterrupted
from pipelines.training.checkpoint import last_good, take_snapshot
from pipelines.training.metrics import Counts, Row
from pipelines.training.parallel import gradients_synchronized
from pipelines.training.run import Run
from pipelines.training.schedule import factor_at
from pipelines.training.trial import try_out

_NAMES_SHOWN = 5
_GRACE_S = 30
"""Seconds from the SIGTERM that the launcher (asgo or torchrun) forwards to its SIGKILL."""


def fit(run: Run) -> None:
    """Train until the last step. Call `try_out` before.

    Raises:
        RunInterrupted: a signal asked to stop; the run is saved.
        Diverged: a loss or gradient is not finite (the weights are those before it).
        AsgoError: writing failed.
    """
    config, state = run.config, run.state
    first_step = state.step
    while True:
        if state.step == first_step + 1:
            try_out(run)  # again: now the optimizer's state takes memory, too
        run.heartbeat(f"step {state.step}")
        if _due(state.step, config.evaluation.every, config) and not state.validated():
            evaluate(run)
        stops = run.should_stop()
        if stops or (state.step > 0 and _due(state.step, config.checkpoint.every, config)):
            save(run)
        if stops:
            raise _interrupted(run)
        if state.step == config.training.steps:
            run.writer.wait()
            return
        run.writer.check()
        state.clock.run()
        try:
            figures = train_step(run)
        except Diverged:
            record_step(run)
            raise
        record_step(run)
        state.step += 1
        if _due(state.step, config.metrics.every, config):
            log(run, figures)


def evaluate(run: Run) -> None:
    """Record the validation metrics, unless a signal stops the validation."""
    run.state.clock.pause()
    record_step(run)

    def should_stop() -> bool:
        run.heartbeat(f"the validation at step {run.state.step}")
        return run.should_stop()

    with run.state.evaluation_weights():
        metrics = run.task.evaluate(should_stop)
    if metrics is None:
        return
    if not math.isfinite(metrics["loss"]):
        raise Diverged(
            run.state.step, f"step {run.state.step}: the validation loss is {metrics['loss']}; {_last_good(run)}"
        )
    row = Row(**_counts(run), split="val", **metrics)  # type: ignore[typeddict-item]
    _record(run, row)
    run.reporter.validated(row)


def save(run: Run) -> None:
    """Start writing a checkpoint, unless the newest one is of this step and has all rows."""
    run.state.clock.pause()
    record_step(run)
    now = (run.state.step, len(run.state.rows))
    if now == run.saved:
        return
    run.heartbeat(f"the checkpoint at step {run.state.step}")
    snapshot = take_snapshot(run.state, run.config, run.task.description(), _counts(run))
    if snapshot is not None:
        run.writer.write(snapshot)
        _warn_of_slow_saves(run)
    run.saved = now


def _warn_of_slow_saves(run: Run) -> None:
    """Warn once if a checkpoint takes longer than the launcher's grace period."""
    seconds = run.writer.seconds
    if run.state.ranks.joined and seconds > _GRACE_S and not run.warned_of_slow_saves:
        run.warned_of_slow_saves = True
        run.reporter.note(
            f"a checkpoint takes {seconds:.0f} s to write, but the launcher kills processes {_GRACE_S} s after it "
            "forwards a SIGTERM: a run stopped that way resumes from the checkpoint before; use a faster disk"
        )


def _interrupted(run: Run) -> RunInterrupted:
    """The exception for a run that a signal stopped; waits until its checkpoint is on disk."""
    run.writer.wait()
    command = shell.command("asgo", "train", run.config.task, "--resume", "--out", run.folder.path)
    command += ", and --gpus or --processes as you like" if run.state.ranks.joined else ""
    signal = run.stop.signal_name or "a signal to another process"
    return RunInterrupted(f"{signal} at step {run.state.step}: saved; continue with: {command}")


def train_step(run: Run) -> dict[str, float]:
    """Update the weights from one global batch; returns the metrics of the step that need no clock."""
    state = run.state
    loss = accumulate_gradients(run)
    grad_norm = _clip(run)
    sums = state.ranks.sum(torch.cat([loss.view(1), run.task.training_counts().to(loss)]))
    state.scheduler.apply(state.step)
    # The only wait for a GPU in a step. It cannot come a step later: it decides whether the weights change.
    norm_value, loss_sum, *counts = torch.cat([grad_norm.view(1), sums]).tolist()
    loss_value = loss_sum / state.ranks.size
    _refuse_not_finite(run, loss_value, norm_value)
    metrics = {"loss": loss_value, "lr": _learning_rate(run), **run.task.training_metrics(counts)}
    if math.isfinite(norm_value):
        metrics["grad_norm"] = norm_value
    with run.around_step(state.step + 1), state.clock.optimizer(), state.around_step(run.config.seed):
        state.scaler.step(state.optimizer)
        state.scaler.update()
    if state.average is not None:
        state.average.update()
    state.optimizer.zero_grad()
    return metrics


def _learning_rate(run: Run) -> float:
    """Return `optimizer.lr` under the general schedule; parts of the model may have other rates."""
    config = run.config
    step = run.state.step
    return config.optimizer.lr * factor_at(config.schedule, step, config.training.steps)


def accumulate_gradients(run: Run) -> Tensor:
    """Run forward and backward passes of this rank's micro-batches; returns their mean loss, shape ().

    Gradients are then those of the global batch: they are reduced over ranks once, in the last backward pass.
    """
    total = torch.zeros((), device=run.state.clock.device)
    for number, batch in enumerate(run.batches(), 1):
        with gradients_synchronized(run.task.network, number == run.passes):
            loss = run.task.loss(batch) / run.passes
            torch.autograd.backward(run.state.scaler.scale(loss))
        total += loss.detach()
    return total


def log(run: Run, metrics: dict[str, float]) -> None:
    """Record the metrics of the step; on a GPU, `record_step` does that after the next one.

    Its times are known when the GPU has made the step. To wait for that would leave the GPU without work.
    """
    row = Row(**_counts(run), split="train", **metrics)  # type: ignore[typeddict-item]
    run.unrecorded = row, run.state.clock.end_lap()
    if run.state.clock.device.type != "cuda":
        record_step(run)


def record_step(run: Run) -> None:
    """Record the metrics that wait for it, if any. The device must have made their step."""
    if run.unrecorded is None:
        return
    row, finished = run.unrecorded
    run.unrecorded = None
    lap = run.state.clock.read(finished)
    row["step_ms"], row["optimizer_ms"], row["elapsed_s"] = lap.step_ms, lap.optimizer_ms, lap.elapsed_s
    row["throughput"] = run.config.training.batch_size * run.task.tokens_per_sample / (lap.step_ms / 1e3)
    _record(run, row)
    run.reporter.trained(row)


def _due(step: int, every: int, config: RunConfig) -> bool:
    return step % every == 0 or step == config.training.steps


def _clip(run: Run) -> Tensor:
    """Clip the gradient norm to `max_grad_norm`, if set; returns the norm before clipping, shape ()."""
    state, max_norm = run.state, run.config.training.max_grad_norm
    state.scaler.unscale_(state.optimizer)
    params = [param for param in state.model.parameters() if param.grad is not None]
    norm = _total_norm([param.grad for param in params if param.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients, shape ()."""
    if grads[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(grads)
    # Trap: on a CPU, torch accumulates a tensor in few float32 sums; the norm of 40 million elements was 0.3 % too
    # small. Row by row the error is 1e-6, at the same speed.
    rows = [torch.linalg.vector_norm(grad, dim=tuple(range(1, grad.ndim))) if grad.ndim > 1 else grad for grad in grads]
    return cast(Tensor, torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(row) for row in rows])))


def _refuse_not_finite(run: Run, loss: float, grad_norm: float) -> None:
    """Raise `Diverged` before the weights change. The scaler skips gradients that overflow under a loss scale."""
    scaler = run.state.scaler
    if math.isfinite(loss) and (math.isfinite(grad_norm) or (scaler.is_enabled() and scaler.get_scale() >= 1.0)):
        return
    lr = _learning_rate(run)
    names = [
        name
        for name, param in run.state.model.named_parameters()
        if param.grad is not None and not param.grad.isfinite().all()
    ]
    shown = ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))
    raise Diverged(
        run.state.step + 1,
        f"step {run.state.step + 1}: the loss is {loss}, its gradient's norm {grad_norm}, at learning rate {lr:g}; "
        f"gradients that are not finite: {shown or 'none'}; the weights were not changed; {_last_good(run)}; "
        "try a lower --lr",
    )


def _last_good(run: Run) -> str:
    with contextlib.suppress(AsgoError):  # the divergence is the first error
        run.writer.wait()
    return last_good(run.folder.checkpoints)


def _counts(run: Run) -> Counts:
    samples = run.state.step * run.config.training.batch_size
    return Counts(
        step=run.state.step,
        tokens=samples * run.task.tokens_per_sample,
        samples=samples,
        epoch=run.task.epoch_at(run.state.step),
        elapsed_s=run.state.clock.elapsed_s,
    )


def _record(run: Run, row: Row) -> None:
    run.state.rows.append(row)
    if not run.state.ranks.is_first:
        return
    try:
        run.folder.append(row)
    except OSError as error:
        raise AsgoError(f"{run.folder.metrics_path}: {error.strerror}; {_last_good(run)}") from error
