"""Models whose parameters the benchmarked optimizers update. Only the shapes matter: nothing is trained."""

from __future__ import annotations

import difflib
import importlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from pipelines.config import GPTSettings
from pipelines.errors import UsageError
from pipelines.resolve import read_preset
from pipelines.training.gpt_task import build_decoder

GPT2_LAYER = {
    "query": (768, 768),
    "key": (768, 768),
    "value": (768, 768),
    "output": (768, 768),
    "up": (3072, 768),
    "down": (768, 3072),
}
# The preset of the model, and the vocabulary of its data: GPT-2's; 65 characters and an end of text; bytes and an end
# of text.
_PRESETS = {"gpt2": ("asgo-gpt2", 50_257), "asro-gpt": ("asro-gpt", 50_257), "nanogpt": ("asgo-nanogpt", 66)}
_PRESETS["tiny"] = ("tiny", 257)
MODEL_NAMES = ("gpt2-layer", *_PRESETS)
"""The names that do not need torchvision."""


class Matrices(nn.Module):
    """Weight matrices of the given names and shapes, normal with standard deviation 0.02.

    `optim.build_optimizer` gives all of them the matrix rule: each name ends in `weight`, and there is no output head.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(f"{name}_weight", nn.Parameter(0.02 * torch.randn(shape)))


def build_model(name: str) -> nn.Module:
    """Return a model on the CPU in float32: one of `MODEL_NAMES`, or a classifier of torchvision.

    Raises `UsageError` for other names.
    """
    if name == "gpt2-layer":
        return Matrices(GPT2_LAYER)
    if name in _PRESETS:
        preset, vocab_size = _PRESETS[name]
        return build_decoder(GPTSettings.model_validate(read_preset(preset)["model"]), vocab_size)
    return _vision_model(name)


def shape_counts(model: nn.Module) -> list[tuple[tuple[int, ...], int]]:
    """Return each parameter shape and the number of parameters with it, in the order of the model."""
    return list(Counter(tuple(param.shape) for param in model.parameters()).items())


def _vision_model(name: str) -> nn.Module:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError:
        raise UsageError(
            f"--model {name}: not one of {', '.join(MODEL_NAMES)}; classifiers need torchvision, which is not installed"
        ) from None
    classifiers: list[str] = models.list_models(module=models)
    if name not in classifiers:
        nearest = difflib.get_close_matches(name, [*MODEL_NAMES, *classifiers], n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "use a classifier of torchvision, such as resnet50, or"
        raise UsageError(f"--model: unknown model {name!r}; {hint} one of {', '.join(MODEL_NAMES)}")
    model: nn.Module = models.get_model(name, weights=None)
    return model
