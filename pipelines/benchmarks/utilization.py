"""Model FLOP utilization: the share of a device's peak that the arithmetic of the model itself makes up."""

from __future__ import annotations

import re

from models.gpt import GPT
from pipelines.config import GPTSettings

_PEAKS = (
    (r"B200", 2_250e12),
    (r"GH200|H200", 989e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100", 989e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"A10", 125e12),
    (r"L4", 121e12),
    (r"RTX 4090$", 165e12),
    (r"RTX 3090$", 71e12),
)
# A slice of a GPU, and one that is held to less power, go by names that contain the whole one's.
_LESS_THAN_ITS_NAME = re.compile(r"\bMIG\b|Laptop|Max-Q")


def peak_flops(device: str) -> float | None:
    """FLOP a second of a GPU, by the name that CUDA gives it, or None for one that is not in the table.

    Those of dense bfloat16 products that accumulate in float32, as NVIDIA's data sheets have them.
    """
    if _LESS_THAN_ITS_NAME.search(device):
        return None
    return next((peak for name, peak in _PEAKS if re.search(rf"\b(?:{name})(?!\w)", device)), None)


def flops_per_token(model: GPT, settings: GPTSettings) -> int:
    """FLOP of a forward and a backward pass for one token: 6 N + 12 L d T (PaLM, arXiv 2204.02311, appendix B).

    L layers of width d see T tokens of context; that attention looks back only is not deducted. N are the parameters
    that take part in products: all but the positions, and but the token embedding where the head has its own weight.
    nanoGPT counts the same.
    """
    looked_up = model.position_embedding.weight.numel()
    if not settings.tied_head:
        looked_up += model.token_embedding.weight.numel()
    multiplied = sum(param.numel() for param in model.parameters()) - looked_up
    return 6 * multiplied + 12 * settings.n_layers * settings.d_model * settings.context_length
