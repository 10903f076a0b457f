"""Model FLOP utilization: FLOP per second of the model over the device's peak."""

from __future__ import annotations

import re

from torch import nn

from models.gpt import GPT
from models.transformer import Transformer
from pipelines.config import GPTSettings, TransformerSettings

# Comments: published numbers, with which other tables agree, except for GB200, GB300, B300, H200 NVL and A5000, which
# are from memory.
_PEAKS = (
    (r"GB[23]00", 2_500e12),  # GB200 and GB300 NVL72: 360 PFLOPS sparse for 72 GPUs
    (r"B[23]00", 2_250e12),  # HGX B200 and B300: 36 PFLOPS sparse for 8 GPUs
    (r"H200 NVL", 836e12),  # 1,671 TFLOPS sparse
    (r"GH200|H200", 989e12),  # 1,979 TFLOPS sparse
    (r"H[18]00 PCIe", 756e12),  # 1,513 TFLOPS sparse
    (r"H100 NVL", 835e12),  # 1,671 TFLOPS sparse
    (r"H[18]00", 989e12),  # 1,979 TFLOPS sparse
    (r"H20", 148e12),
    (r"A[18]00", 312e12),  # data sheet: 312, 624 sparse
    (r"A40", 150e12),  # 149.7, 299.4 sparse
    (r"A30", 165e12),  # 165, 330 sparse
    (r"A10", 125e12),  # 125, 250 sparse
    (r"L40S", 362e12),  # 362.05, 733 sparse
    (r"L40", 181e12),  # 181.05, 362.1 sparse: half of the L40S, on the same chip
    (r"L4", 121e12),  # 242 TFLOPS sparse
    # From the architectures' white papers, with float32 accumulation: half the rate of float16's on GeForce GPUs.
    (r"RTX PRO 6000 Blackwell Workstation", 504e12),  # 503.8
    (r"RTX 6000 Ada", 364e12),  # 364.2
    (r"RTX A6000", 155e12),  # 154.8
    (r"RTX A5000", 111e12),  # 111.1
    (r"RTX 5090$", 209.5e12),
    (r"RTX 4090$", 165e12),  # 165.2
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
