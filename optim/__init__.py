"""The optimizers of the ASGO and Asro papers, and related ones, for any PyTorch training loop.

Classes and functions are imported on first use, so `optim.specs` can be imported without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .specs import OPTIMIZER_NAMES

if TYPE_CHECKING:
    from .accasro import AccAsro
    from .asgo import ASGO
    from .asro import Asro
    from .dasgo import DASGO
    from .muon import Muon
    from .registry import build_optimizer, optimizer_class
    from .shampoo import Shampoo
    from .sharded import ShardedOptimizer

__all__ = [
    "ASGO",
    "DASGO",
    "OPTIMIZER_NAMES",
    "AccAsro",
    "Asro",
    "Muon",
    "Shampoo",
    "ShardedOptimizer",
    "build_optimizer",
    "optimizer_class",
]

_MODULES = {"ShardedOptimizer": "sharded", "build_optimizer": "registry", "optimizer_class": "registry"}
"""Modules of the names that are not defined in a module of the same name in lower case."""


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` or a submodule on first access, so `import optim; optim.native` works."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in __all__:
        value = getattr(import_module(f".{_MODULES.get(name, name.lower())}", __name__), name)
    else:
        full_name = f"{__name__}.{name}"
        try:
            value = import_module(full_name)
        except ModuleNotFoundError as error:
            if error.name != full_name:
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
