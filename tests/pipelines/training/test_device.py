"""The precision of a run depends on what the device computes in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipelines.config import TrainingSettings
from pipelines.training.device import pick_precision


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), torch.float32), ((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_auto_is_bf16_where_a_gpu_computes_in_it(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V100 (7.0) and T4 (7.5) emulate bfloat16: tensors can be made, and products are slower than in float32."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True, raising=False)
    training = TrainingSettings(steps=1, batch_size=1)
    assert pick_precision(training, torch.device("cuda")) == expected
    assert pick_precision(training, torch.device("cpu")) == torch.float32
