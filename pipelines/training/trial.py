"""A trial before the first steps: whether the model compiles, and whether a micro-batch fits into the memory.

Nothing that a step changes may be lost with a step that fails half-way, and a rank that fails alone would leave the
others in a collective. So the run finds out before, without changing anything.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule

from pipelines.errors import AsgoError
from pipelines.training.arithmetic import COMPILER
from pipelines.training.distributed import largest_divisor
from pipelines.training.parallel import gradients_synchronized
from pipelines.training.random_state import random_state, set_random_state
from pipelines.training.run import Run


@contextlib.contextmanager
def fallback(compiles: bool) -> Iterator[None]:
    """Context manager in which `try_out` may switch torch.compile off."""
    if not compiles:  # torch.compile takes seconds to import
        yield
        return
    with torch.compiler.set_stance("default"):
        yield


def try_out(run: Run) -> None:
    """Compute micro-batches of the next step, and change nothing but how the run computes, on all ranks alike.

    If that fails in a compiled model, the run goes on without torch.compile. If memory is short, micro-batches are
    split. Each is said in one line. Does nothing on a CPU without torch.compile. A collective: every rank must call it.

    Raises `AsgoError` if a single row does not fit, or the model is sharded and a micro-batch does not fit.
    """
    can_fail = run.state.clock.device.type == "cuda" or _is_compiled(run)
    if run.state.step == run.config.training.steps or not can_fail:
        return
    run.state.clock.pause()
    run.heartbeat(f"a trial of step {run.state.step + 1}")
    if isinstance(run.task.network, FSDPModule) and _is_compiled(run):
        # Trap: FSDP2 gathers layers in the forward pass. Ranks would wait there for one that has no compiler.
        _adapt(run, _compile_something)
    _adapt(run, _compute_micro_batches)


def _adapt(run: Run, work: Callable[[Run], None]) -> None:
    """Change how the run computes until `work` succeeds on all ranks."""
    ranks = run.state.ranks
    while True:
        failure = _attempt(run, work)
        if ranks.any(failure is not None and failure.of_memory):
            _split_further(run)
        elif ranks.any(failure is not None):
            _fall_back(run, failure)
        else:
            return


@dataclass(frozen=True)
class _Failure:
    of_memory: bool
    reason: str


def _attempt(run: Run, work: Callable[[Run], None]) -> _Failure | None:
    """Do `work` on this rank; return what failed. Keeps no error: its traceback would keep tensors."""
    try:
        with _unchanged(run):
            work(run)
    except torch.OutOfMemoryError as error:
        return _Failure(True, str(error))
    except AsgoError:
        raise
    except Exception as error:
        if not _is_compiled(run):
            raise
        return _Failure(False, " ".join(str(error).split())[:200])  # the first line may be only "inductor raised:"
    return None


def _compile_something(run: Run) -> None:
    torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(64, device=run.state.clock.device))


def _compute_micro_batches(run: Run) -> None:
    """Make forward and backward passes as in training, then a forward pass as in validation."""
    batch = next(iter(run.batches()))
    for _ in range(min(run.passes, 2)):  # the second adds to gradients, so it takes more memory
        # Without collectives, in which a rank could wait for one that failed; FSDP2 has them anyway.
        with gradients_synchronized(run.task.network, isinstance(run.task.network, FSDPModule)):
            torch.autograd.backward(run.state.scaler.scale(run.task.loss(batch) / run.passes))
    run.state.model.eval()
    with torch.no_grad():
        run.task.loss(batch)


@contextlib.contextmanager
def _unchanged(run: Run) -> Iterator[None]:
    """Context manager that restores random numbers, buffers and the training mode, and drops gradients."""
    model, device = run.state.model, run.state.clock.device
    numbers = random_state(device)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        model.train()
        run.state.optimizer.zero_grad()  # not the model's: FSDP2 may have whole weights in it, without gradients
        set_random_state(numbers)
        for buffer, before in buffers:
            buffer.copy_(before)


def _is_compiled(run: Run) -> bool:
    return run.state.arithmetic.get(COMPILER) == "on"


def _fall_back(run: Run, failure: _Failure | None) -> None:
    torch.compiler.set_stance("force_eager")
    run.state.arithmetic[COMPILER] = "off"
    reason = "another process cannot compile" if failure is None else failure.reason
    run.reporter.note(f"the model is not compiled, so training is slower: {reason}")


def _split_further(run: Run) -> None:
    """Split micro-batches into halves, or into the largest equal parts below that."""
    rows = run.rows_at_once
    if rows == 1 or isinstance(run.task.network, FSDPModule):
        advice = "use a smaller model or GPUs with more memory" if rows == 1 else "set training.micro_batch_size lower"
        raise AsgoError(f"out of memory with micro-batches of {rows}; {advice}")
    run.micro_batch_size = largest_divisor(rows, rows // 2)
    run.reporter.note(
        f"out of memory with micro-batches of {rows}: splitting them; training.micro_batch_size={run.micro_batch_size} "
        "does the same without a trial"
    )
    gc.collect()
    if run.state.clock.device.type == "cuda":
        torch.cuda.empty_cache()
    if _is_compiled(run):
        torch.compiler.reset()  # or a few sizes reach torch's limit of graphs, after which it stops to compile
