"""The optimizers of the ASGO and Asro papers, and their peers, for any PyTorch training loop."""

from optim.accasro import AccAsro
from optim.asgo import ASGO
from optim.asro import Asro
from optim.dasgo import DASGO
from optim.muon import Muon
from optim.registry import OPTIMIZER_NAMES, build_optimizer, optimizer_class
from optim.shampoo import Shampoo
from optim.sharded import ShardedOptimizer

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
