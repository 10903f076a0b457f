"""Measure what a training step does to each layer. The time does not count as training; results do not change."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import cast

import torch
from torch import Tensor

from optim.inspection import preconditioner_spectra, scale_distributions, scale_edges
from pipelines.config import RunConfig
from pipelines.training.device import synchronize
from pipelines.training.run_folder import RunFolder
from pipelines.training.state import TrainState
from pipelines.training.statistics_file import Header, Layer, Preconditioner, Record, Scale


class LayerStatistics:
    """Measures the steps that are multiples of `statistics.every`, and the last, and appends them to the run's file.

    A measured step needs memory for a copy of the weights. Only rank 0 measures: all ranks have the same weights,
    gradients and state.
    """

    def __init__(self, state: TrainState, config: RunConfig, folder: RunFolder) -> None:
        self._state = state
        self._every = config.statistics.every if state.ranks.is_first else None
        self._last_step = config.training.steps
        self._folder = folder
        self._began_s = state.clock.elapsed_s
        self._cost_s = 0.0

    @contextlib.contextmanager
    def of_step(self, step: int) -> Iterator[None]:
        """Context manager around `optimizer.step()` that makes step `step` of the run; records it if it is due.

        Raises `AsgoError` if writing fails or the run's folder was removed.
        """
        if self._every is None or (step % self._every and step != self._last_step):
            yield
            return
        cost_before_s = self._cost_s
        with self._off_the_clock():
            # Frozen parameters have no gradient.
            params = {n: p for n, p in self._state.model.named_parameters() if p.grad is not None}
            before = [param.detach().clone() for param in params.values()]
            grad_norms = _norms([cast(Tensor, param.grad) for param in params.values()])
        yield
        with self._off_the_clock():
            layers = self._layers(params, before, grad_norms)
        cost_ms = 1e3 * (self._cost_s - cost_before_s)
        self._folder.require_ours()
        self._folder.statistics.append(self._header(), Record(step=step, cost_ms=cost_ms, layers=layers))

    def notes(self) -> list[str]:
        """Return a line for the user with the time that the measurements took."""
        if self._cost_s == 0.0:
            return []
        training_s = self._state.clock.elapsed_s - self._began_s
        return [f"layer statistics took {self._cost_s:.1f} s, in addition to {training_s:.1f} s of training steps"]

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        clock = self._state.clock
        clock.pause()
        begin_s = time.perf_counter()
        yield
        synchronize(clock.device)
        self._cost_s += time.perf_counter() - begin_s
        clock.run()

    def _layers(self, params: Mapping[str, Tensor], before: list[Tensor], grad_norms: Tensor) -> dict[str, Layer]:
        weight_norms = _norms(before)
        torch._foreach_sub_(before, [param.detach() for param in params.values()])
        norms = torch.stack([grad_norms, weight_norms, _norms(before)]).mT.tolist()
        scales = scale_distributions(self._state.optimizer)
        spectra = preconditioner_spectra(self._state.optimizer)
        layers = {}
        for (name, param), (grad_norm, weight_norm, update_norm) in zip(params.items(), norms, strict=True):
            layer = layers[name] = Layer(
                grad_norm=grad_norm,
                weight_norm=weight_norm,
                update_norm=update_norm,
                update_to_weight=update_norm / weight_norm if weight_norm else None,
            )
            if param in scales:
                layer["scale"] = cast(Scale, asdict(scales[param]))
            if param in spectra:
                layer["preconditioners"] = {k: cast(Preconditioner, asdict(s)) for k, s in spectra[param].items()}
        return layers

    def _header(self) -> Header:
        shapes = {name: list(param.shape) for name, param in self._state.model.named_parameters()}
        return Header(shapes=shapes, scale_edges=scale_edges(self._state.optimizer))


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return Euclidean norms, shape (len(tensors),), on the device; accumulated in float64 if the device has it.

    Trap: on a CPU, the float32 norm of an embedding with 40 million elements has an error of 0.25 %.
    """
    precision = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    return torch.stack(list(torch._foreach_norm(tensors, 2, dtype=precision)))
