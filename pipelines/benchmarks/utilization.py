"""Model FLOP utilization: FLOP per second of the model over the device's peak."""

from __future__ import annotations

import re

from torch import nn

from models.gpt import GPT
from models.transformer import Transformer
from pipelines.config import GPTSettings, TransformerSettings

_PEAKS = (
    (r"GB[23]00", 2_500e12),
    (r"B[23]00", 2_250e12),
    (r"H200 NVL", 836e12),
    (r"GH200|H200", 989e12),
    (r"H[18]00 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H[18]00", 989e12),
    (r"H20", 148e12),
    (r"A[18]00", 312e12),
    (r"A40", 150e12),
    (r"A30", 165e12),
    (r"A10", 125e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"RTX PRO 6000 Blackwell Workstation", 504e12),
    (r"RTX 6000 Ada", 364e12),
    (r"RTX A6000", 155e12),
    (r"RTX A5000", 111e12),
    (r"RTX 5090$", 209.5e12),
    (r"RTX 4090$", 165e12),
    (r"RTX 3090$", 71e12),
)
# Names of GPU slices (MIG, vGPU) and of GPUs with reduced power contain the full GPU's name.
_LESS_THAN_ITS_NAME = re.compile(r"\bMIG\b|Laptop|Max-Q|-\d+[ABCQ]$")


def peak_flops(device: str) -> float | None:
    """Return the peak FLOP per second of a GPU by its CUDA name, or None if it is not in the table.

    For dense bfloat16 products with float32 accumulation, from NVIDIA's data sheets, which often
    give twice as much, for sparse matrices.
    """
    if _LESS_THAN_ITS_NAME.search(device):
        return None
    return next((peak for name, peak in _PEAKS if re.search(rf"\b(?:{name})(?!\w)", device)), None)


def flops_per_token(model: GPT | Transformer, settings: GPTSettings | TransformerSettings) -> int:
    """Return the FLOP of forward and backward for one token: 6 N + 12 L d T (PaLM, arXiv 2204.02311, appendix B).

    L layers of width d see T tokens of context; causal masking is not deducted. N counts the parameters in matrix
    products: all except position embeddings and, if the head has its own weight, token embeddings. nanoGPT counts the
    same.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = sum(weight.numel() for weight in tables if weight is not model.head.weight)
    multiplied = sum(param.numel() for param in model.parameters()) - looked_up
    return 6 * multiplied + 12 * settings.n_layers * settings.d_model * settings.context_length
