"""The arithmetic of a model, and the peaks of devices."""

from __future__ import annotations

import pytest
import torch

from pipelines.benchmarks.utilization import flops_per_token, peak_flops
from pipelines.config import GPTSettings, TransformerSettings
from pipelines.training.gpt_task import build_decoder

GPT2 = {"context_length": 1024, "n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072, "vocab_multiple": 128}


@pytest.mark.parametrize("tied_head", [True, False])
def test_a_token_of_gpt2_costs_six_flop_a_multiplied_parameter_and_the_attention(tied_head: bool) -> None:
    settings = GPTSettings(**GPT2, bias=False, tied_head=tied_head)
    with torch.device("meta"):
        model = build_decoder(settings, 50_257)
    multiplied = 50_304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768  # the head, layers with two gains, the last gain
    assert flops_per_token(model, settings) == 6 * multiplied + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("tied_head", [True, False])
def test_a_token_of_llama_costs_the_same_by_its_own_matrices(tied_head: bool) -> None:
    shape = {key: value for key, value in GPT2.items() if key != "d_ff"}
    settings = TransformerSettings(kind="transformer", **shape, n_kv_heads=4, d_ff=2048, tied_head=tied_head)
    with torch.device("meta"):
        model = build_decoder(settings, 50_257)
    block = 2 * 768**2 + 2 * 256 * 768 + 3 * 768 * 2048 + 2 * 768  # query, output; key, value; gated; two gains
    assert flops_per_token(model, settings) == 6 * (50_304 * 768 + 12 * block + 768) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 836),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GH200 144G HBM3e", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GB300", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA A40", 150),
        ("NVIDIA A30", 165),
        ("NVIDIA A10", 125),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 504),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX A5000", 111),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_the_peak_is_that_of_dense_bfloat16(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA RTX A5000 Laptop GPU",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "NVIDIA A40-12Q",
        "NVIDIA A100X",
        "NVIDIA GB10",
        "NVIDIA B100",
        "Quadro RTX 6000",
        "Tesla T4",
        "x86_64 CPU, 2 threads",
    ],
)
def test_a_device_that_is_not_in_the_table_has_none(name: str) -> None:
    assert peak_flops(name) is None
