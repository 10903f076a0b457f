"""Load the initial weights of a run from the folder `init_from`."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from pipelines.config import GPTRunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.hf.initial_model import InitialModel, open_initial_model, refuse_contradictions
from pipelines.tensors import Tensors, copy_into, model_tensors

_POSITIONS = "position_embedding.weight"


def load_initial_weights(model: nn.Module, config: GPTRunConfig) -> None:
    """Load the weights of `init_from`, if it is set, into the model, whole or sharded.

    Every rank reads the files. Raises `UsageError` if the weights do not fit the configuration, and `AsgoError` if they
    are damaged or not finite.
    """
    if config.init_from is None:
        return
    initial = open_initial_model(Path(config.init_from))
    refuse_contradictions(config, initial)
    settings = config.model
    tensors = initial.architecture.from_weights(_read(initial), settings.n_layers, settings.tied_head)
    if _POSITIONS in tensors:
        tensors[_POSITIONS] = tensors[_POSITIONS][: settings.context_length]
    if not settings.bias:
        tensors = _without_biases(tensors, config.init_from)
    copy_into(model_tensors(model), tensors, config.init_from)


def _read(initial: InitialModel) -> Tensors:
    """Return the weights in float32, without buffers, by names without prefix."""
    found: Tensors = {}
    for path in initial.weights:
        try:
            tensors = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise AsgoError(f"{path}: damaged: {error}") from None
        weights = {name: it.float() for name, it in tensors.items() if not name.endswith(initial.architecture.BUFFERS)}
        for name, tensor in weights.items():
            bad = tensor.numel() - int(tensor.isfinite().sum())
            if bad:
                raise AsgoError(f"{path}: {name}: {bad:,} of {tensor.numel():,} weights are NaN or infinite in float32")
        found |= {name.removeprefix(initial.architecture.PREFIX): tensor for name, tensor in weights.items()}
    return found


def _without_biases(tensors: Tensors, folder: str) -> Tensors:
    biases = [name for name in tensors if name.endswith(".bias")]
    if any(tensors[name].any() for name in biases):
        raise UsageError(f"model.bias is False, but {folder} has biases that are not zero: leave it out")
    return {name: tensor for name, tensor in tensors.items() if name not in biases}
