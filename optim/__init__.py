"""The optimizers of the ASGO and Asro papers, and their peers, for any PyTorch training loop."""

from .accasro import AccAsro
from .asgo import ASGO
from .asro import Asro
from .dasgo import DASGO
from .muon import Muon
from .registry import OPTIMIZER_NAMES, build_optimizer, optimizer_class
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
