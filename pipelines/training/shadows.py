"""Shadow optimizers: what other optimizers would do with the gradients of a run. They do not change the run.

A shadow has its own state. At every step it receives the run's weights and gradients, makes its step on a copy, and the
copy is dropped. So its state is that of an optimizer that saw all these gradients, but on the path that the run's own
optimizer took.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.shadow_settings import shadow_configs
from pipelines.training.clock import Interval, seconds_in
from pipelines.training.device import synchronize
from pipelines.training.random_state import random_state, restored_random_state, set_random_state
from pipelines.training.run import Run
from pipelines.training.run_folder import RunFolder
from pipelines.training.shadow_file import RUN, Direction, Header, LayerUpdate, LossChange, Record, step_cost
from pipelines.training.state import Shadow, TrainState
from pipelines.training.task import Batch

LENGTHS = (0.5, 1.0, 2.0)
"""Lengths of the steps along each direction, as multiples of the run's step."""
_MOST_SINGULAR_VALUES = 32

Update = list[Tensor]
"""Change of each parameter that has a gradient."""


def new_shadows(
    model: nn.Module, config: RunConfig, new_state: Callable[[nn.Module, RunConfig], TrainState]
) -> dict[str, Shadow]:
    """Return the run's shadows by name. All share one copy of the weights.

    Raises `UsageError` for an optimizer that has other weights in training than in evaluation.
    """
    if not config.shadows.optimizers:
        return {}
    copies = [param.detach().clone() for param in model.parameters()]
    shadows = {}
    for name, its_config in shadow_configs(config).items():
        state = new_state(_copy_of(model, copies), its_config)
        if state.imported is not None and state.imported.has_modes:
            raise UsageError(
                f"shadows.optimizers: {name} trains with other weights than it evaluates with, so it has no step from "
                "the weights of the run; leave it out"
            )
        shadows[name] = Shadow(its_config, state)
    return shadows


def _copy_of(model: nn.Module, copies: Sequence[Tensor]) -> nn.Module:
    """Return the same modules with other parameters, on which only an optimizer works."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for param, values in zip(model.parameters(), copies, strict=True):
        memo[id(param)] = nn.Parameter(values, requires_grad=param.requires_grad)
    return copy.deepcopy(model, memo)


class Shadows:
    """Makes the steps of a run's shadows, and records what they would have done.

    Records the steps that are multiples of `shadows.every`, and the last. Such a step needs memory for the weights and
    for the update of each shadow. All ranks work alike, rank 0 writes.
    """

    def __init__(self, state: TrainState, config: RunConfig, folder: RunFolder) -> None:
        self._state = state
        self._shadows = state.shadows
        self._every = config.shadows.every
        self._last_step = config.training.steps
        self._optimizer = config.optimizer.name
        self._seed = config.seed
        self._folder = folder
        self._began_s = state.clock.elapsed_s
        self._intervals: dict[str, list[Interval]] = {name: [] for name in self._shadows}
        self._steps = 0
        self._step_s = dict.fromkeys(self._shadows, 0.0)
        self._all_steps = 0
        self._cost_s = 0.0

    @contextlib.contextmanager
    def of_step(self, run: Run, step: int) -> Iterator[None]:
        """Context manager around `optimizer.step()` that makes step `step` of the run; records it if it is due.

        Raises `AsgoError` if a shadow of another library raises, if writing fails, or the run's folder was removed.
        """
        if not self._shadows:
            yield
            return
        due = step % self._every == 0 or step == self._last_step
        with self._state.clock.excluded():
            updates = self._make_steps(due)
            before = [param.detach().clone() for param in self._params().values()] if due else []
        yield
        if due:
            run.heartbeat(f"the shadow optimizers at step {step}")
            self._record(run, step, before, updates)

    def notes(self) -> list[str]:
        """Return a line for the user with the time that shadows took."""
        if not self._all_steps and not self._steps:
            return []
        synchronize(self._state.clock.device)
        self._read_times()
        training_s = self._state.clock.elapsed_s - self._began_s
        each = ", ".join(f"{name} {step_cost(1e3 * s / self._all_steps)}" for name, s in self._step_s.items())
        total_s = sum(self._step_s.values()) + self._cost_s
        return [
            f"shadow optimizers took {total_s:.1f} s, in addition to {training_s:.1f} s of training steps: {each}, "
            f"measurements {self._cost_s:.1f} s"
        ]

    def _params(self) -> dict[str, Tensor]:
        """Return the parameters that have a gradient; frozen ones have none."""
        return {name: param for name, param in self._state.model.named_parameters() if param.grad is not None}

    @torch.no_grad()
    def _make_steps(self, due: bool) -> dict[str, Update]:
        """Make a step of each shadow; returns their updates if they are to be measured."""
        if self._state.scaler.is_enabled() and not self._is_finite():
            return {}  # the run skips the step, too
        updates = {}
        weights = [param.detach() for param in self._state.model.parameters()]
        clock, self._steps = self._state.clock, self._steps + 1
        for name, shadow in self._shadows.items():
            begin = clock.stamp()
            own = list(shadow.state.model.parameters())
            torch._foreach_copy_([param.detach() for param in own], weights)
            self._make_step(shadow)
            self._intervals[name].append((begin, clock.stamp()))
            if due:
                moved = dict(shadow.state.model.named_parameters())
                updates[name] = [moved[key].detach() - param.detach() for key, param in self._params().items()]
        return updates

    def _make_step(self, shadow: Shadow) -> None:
        state = shadow.state
        state.step = self._state.step
        for own, param in zip(state.model.parameters(), self._state.model.parameters(), strict=True):
            # Optimizers of other libraries may change gradients in place; ours and PyTorch's do not.
            own.grad = param.grad.clone() if param.grad is not None and state.imported is not None else param.grad
        state.scheduler.apply(state.step)
        with state.around_step(self._seed):
            state.optimizer.step()
        for own in state.model.parameters():
            own.grad = None
        shadow.updates += 1

    def _is_finite(self) -> bool:
        norms = torch._foreach_norm([param.grad for param in self._params().values() if param.grad is not None])
        return bool(torch.stack(norms).isfinite().all())

    def _record(self, run: Run, step: int, before: Update, updates: dict[str, Update]) -> None:
        clock = self._state.clock
        clock.pause()
        begin_s = time.perf_counter()
        if updates:
            step_ms = self._read_times()
            names = list(self._params())
            own = [param.detach() - start for param, start in zip(self._params().values(), before, strict=True)]
            directions = {RUN: own, **updates}
            changes = self._loss_changes(run, before, directions)
            records = {
                name: self._direction(name, step, step_ms.get(name, 0.0), names, own, update, changes[name])
                for name, update in directions.items()
            }
            synchronize(clock.device)
            cost_s = time.perf_counter() - begin_s
            if self._state.ranks.is_first:
                self._folder.require_ours()
                self._folder.shadows.append(self._header(), Record(step=step, cost_ms=1e3 * cost_s, directions=records))
            self._cost_s += cost_s
        clock.run()

    def _read_times(self) -> dict[str, float]:
        """Return the mean time of each shadow's step since the last call, in milliseconds. The device must be done."""
        steps, self._steps = self._steps, 0
        means = {}
        for name, intervals in self._intervals.items():
            seconds = seconds_in(intervals)
            self._step_s[name] += seconds
            means[name] = 1e3 * seconds / max(steps, 1)
            intervals.clear()
        self._all_steps += steps
        return means

    def _direction(
        self,
        name: str,
        step: int,
        step_ms: float,
        layers: Sequence[str],
        own: Update,
        update: Update,
        changes: tuple[LossChange, LossChange],
    ) -> Direction:
        products = torch.stack([_products(a, b) for a, b in zip(update, own, strict=True)]).tolist()
        return Direction(
            updates=step if name == RUN else self._shadows[name].updates,
            step_ms=step_ms,
            norm=math.sqrt(sum(square for square, _, _ in products)),
            cosine=_cosine(*map(sum, zip(*products, strict=True))),
            same_batch=changes[0],
            held_out=changes[1],
            layers={
                layer: LayerUpdate(
                    norm=math.sqrt(of_layer[0]), cosine=_cosine(*of_layer), singular_values=_singular_values(tensor)
                )
                for layer, tensor, of_layer in zip(layers, update, products, strict=True)
            },
        )

    @torch.no_grad()
    def _loss_changes(
        self, run: Run, before: Update, directions: dict[str, Update]
    ) -> dict[str, tuple[LossChange, LossChange]]:
        """Return the changes of the loss on the batch of this step, and on that of the next one, by direction."""
        params = [param.detach() for param in self._params().values()]
        after = [param.clone() for param in params]
        norms = {name: _norm(update) for name, update in directions.items()}
        with _unchanged(run):
            same, next_one = (self._changes_on(run, ahead, params, before, directions, norms) for ahead in (0, 1))
        torch._foreach_copy_(params, after)
        return {name: (same[name], next_one[name]) for name in directions}

    def _changes_on(
        self,
        run: Run,
        ahead: int,
        params: Update,
        before: Update,
        directions: dict[str, Update],
        norms: dict[str, float],
    ) -> dict[str, LossChange]:
        batches = list(run.batches(ahead))
        numbers = random_state(self._state.clock.device)

        def loss_at(update: Update, factor: float) -> float:
            torch._foreach_copy_(params, before)
            if not math.isfinite(factor):
                return math.nan
            if factor:
                torch._foreach_add_(params, update, alpha=factor)
            set_random_state(numbers)  # the same dropout for all
            return _mean_loss(run, batches)

        start = loss_at([], 0.0)
        changes = {}
        for name, update in directions.items():
            factors = [_ratio(length * norms[RUN], norms[name]) for length in LENGTHS]
            at_lengths = [loss_at(update, factor) - start for factor in factors]
            # The run's own step is that of length 1.
            own = at_lengths[LENGTHS.index(1.0)] if name == RUN else loss_at(update, 1.0) - start
            changes[name] = LossChange(at_lengths=at_lengths, own=own)
        return changes

    def _header(self) -> Header:
        shapes = {name: list(param.shape) for name, param in self._state.model.named_parameters()}
        return Header(optimizer=self._optimizer, shapes=shapes, lengths=list(LENGTHS))


@contextlib.contextmanager
def _unchanged(run: Run) -> Iterator[None]:
    """Context manager that restores random numbers and buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in run.state.model.buffers()]
    with restored_random_state(run.state.clock.device):
        yield
    for buffer, values in buffers:
        buffer.copy_(values)


def _mean_loss(run: Run, batches: Sequence[Batch]) -> float:
    """Return the mean loss of micro-batches, over all ranks."""
    losses = torch.stack([run.task.loss(batch) for batch in batches])
    return float(run.state.ranks.mean(losses.mean()))


def _precise(tensor: Tensor) -> Tensor:
    """Return the tensor in float64. MPS does not have it: there, on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _products(update: Tensor, own: Tensor) -> Tensor:
    """Return the squared norms of both, and their inner product between them; shape (3,): update, product, own."""
    a, b = _precise(update).flatten(), _precise(own).flatten()
    return torch.stack([a @ a, a @ b, b @ b])


def _cosine(square: float, product: float, own_square: float) -> float | None:
    norms = math.sqrt(square) * math.sqrt(own_square)
    return product / norms if norms and math.isfinite(norms) else None


def _norm(update: Update) -> float:
    return math.sqrt(sum(torch.stack([_precise(tensor).square().sum() for tensor in update]).tolist()))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _singular_values(update: Tensor) -> list[float]:
    """Return singular values of a matrix, descending, thinned evenly; none for a vector, or if one is not finite.

    A convolution's kernel, shape (out, in, ...), is a matrix with `out` rows. From the smaller Gram matrix in float64:
    values below 1e-8 of the largest are rounding errors.
    """
    if update.ndim < 2:
        return []
    matrix = _precise(update).flatten(1)
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    if not bool(gram.isfinite().all()):
        return []
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    places = torch.linspace(0, len(values) - 1, min(len(values), _MOST_SINGULAR_VALUES)).round().long()
    return [float(value) for value in values.cpu()[places]]
