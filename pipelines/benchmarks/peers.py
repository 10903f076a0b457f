"""The optimizers that a benchmark compares, and how to build each for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from optim import build_optimizer
from optim.groups import matrix_groups
from optim.specs import spec_of
from pipelines.benchmarks.shapes import Matrices
from pipelines.errors import UsageError
from pipelines.imported_optimizers import import_library, import_optimizer
from pipelines.optimizers import OWN_NAMES, import_path_of, parse_value, split_optimizer

OURS = "asgo"
BASELINE = "torch.AdamW:fused=true"
DEFAULT_NAMES = (
    *OWN_NAMES,
    "torch.AdamW:foreach=true",
    "torch.RAdam",
    "torch.Adafactor",
    "torch.SGD:fused=true,momentum=0.9",
    "torch.Muon",
    "pytorch_optimizer.AdamW",
    "pytorch_optimizer.Lion",
    "pytorch_optimizer.Muon",
    "pytorch_optimizer.Shampoo",
    "pytorch_optimizer.SOAP",
    "pytorch_optimizer.Kron",
    "heavyball.AdamW",
    "heavyball.Muon",
    "heavyball.SOAP",
)
"""Optimizers measured by default: from other libraries, the classes that compete with ours.

Without heavyball's PSGD, which compiles for minutes on a CPU.
"""
_PATHS = [import_path_of(split_optimizer(name)[0]) for name in DEFAULT_NAMES]
PEER_LIBRARIES = tuple(dict.fromkeys(path.place for path in _PATHS if path is not None and path.place != "torch"))

_TOTAL_STEPS = 10_000
# Our optimizers without default settings: the authors' settings for a language model, at the first step.
_OUR_KEYWORDS: dict[str, dict[str, Any]] = {
    "asro": {"lr": 1e-3, "decrement": 2e-4, "min_scale": 0.01},
    "accasro": {"lr": 7.5e-5, "increment": 5e-2, "decrement": 2e-4, "max_scale": 13.3, "min_scale": 0.13},
}
# These take a `use_muon` flag in each parameter group, and update the other groups by their own AdamW.
_FLAGGED_MUONS = ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")


@dataclass(frozen=True)
class Choice:
    """An optimizer to measure: the typed `name`, the library, its name there, and keywords of the constructor."""

    name: str
    library: str
    optimizer: str
    keywords: Mapping[str, Any]

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Return the optimizer for all parameters of a model, or two if one cannot update all of them.

        Ours are built by `optim.build_optimizer`. The Muons of torch and pytorch_optimizer get the same matrices as
        ours, if they support their shapes, and AdamW the rest. All other optimizers get every parameter in one group.
        """
        if self.library == OURS:
            keywords = {**_OUR_KEYWORDS.get(self.optimizer, {}), **self.keywords}
            return [build_optimizer(model, self.optimizer, total_steps=_TOTAL_STEPS, **keywords)]
        joint = ":" if self.library.endswith(".py") else "."
        cls = import_optimizer(f"{self.library}{joint}{self.optimizer}")
        if (self.library, self.optimizer) == ("torch", "Muon"):
            matrices, others = _split(model, max_dims=2)
            muon = cls(matrices, **self.keywords)
            return [muon, torch.optim.AdamW(others, fused=True)] if others else [muon]
        if self.library == "pytorch_optimizer" and self.optimizer in _FLAGGED_MUONS:
            matrices, others = _split(model)
            groups = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
            return [cls([group for group in groups if group["params"]], **self.keywords)]
        return [cls(list(model.parameters()), **self.keywords)]


def choose(names: Sequence[str]) -> tuple[list[Choice], list[str]]:
    """Return the optimizers to measure, the baseline first, and a line for each that is left out.

    Without names, these are the default optimizers of installed libraries. Raises `UsageError` for an unknown name or
    keyword, an invalid value, or a missing library.
    """
    choices, left_out = {BASELINE: parse_choice(BASELINE)}, []
    missing = {} if names else _import_problems()  # import a library only if it is needed
    for name in names or DEFAULT_NAMES:
        library = name.partition(".")[0]
        if library in missing:
            continue
        try:
            choices[name] = parse_choice(name)
        except UsageError as error:
            if names or library not in PEER_LIBRARIES:
                raise
            left_out.append(str(error).removeprefix("--optimizer "))  # another version of the library
    left_out += [f"{problem}; its optimizers are left out" for problem in missing.values()]
    return list(choices.values()), left_out


def parse_choice(text: str) -> Choice:
    """Parse `NAME` or `NAME:key=value,key=value`; NAME is one of our optimizers or an import path.

    Raises `UsageError` if the optimizer cannot be built.
    """
    try:
        name, texts = split_optimizer(text)
        path = import_path_of(name)
        if path is None:
            library, optimizer = OURS, spec_of(name).name
        else:
            library, optimizer = path.place, path.name
            import_optimizer(name)
        values = {key: parse_value(each) for key, each in texts.items()}
        keywords = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        choice = Choice(text, library, optimizer, keywords)
        if choice.keywords:
            choice.build(Matrices({"only": (2, 2)}))
    except UsageError:
        raise
    except Exception as error:  # a peer's constructor may raise anything
        raise UsageError(f"--optimizer {text}: {error}") from None
    return choice


def versions(choices: Sequence[Choice]) -> dict[str, str]:
    """Return the version of each peer library among the choices."""
    found = {}
    for library in dict.fromkeys(choice.library for choice in choices if choice.library in PEER_LIBRARIES):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "unknown"
    return found


def _import_problems() -> dict[str, str]:
    """Return why peer libraries cannot be imported, by library."""
    problems = {}
    for library in PEER_LIBRARIES:
        try:
            import_library(library)
        except UsageError as error:
            problems[library] = str(error)
    return problems


def _split(model: nn.Module, max_dims: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Split the parameters into those that our matrix optimizers update by the matrix rule, and all others."""
    groups = matrix_groups(model)
    hidden = {id(param) for group in groups if group.get("rule") != "adam" for _, param in group["params"]}
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for param in model.parameters():
        fits = id(param) in hidden and (max_dims is None or param.ndim <= max_dims)
        (matrices if fits else others).append(param)
    return matrices, others
