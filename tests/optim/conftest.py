"""What all tests of the optimizers share."""

from __future__ import annotations

import pytest
from torch import Tensor

from optim import matrix_functions, native


@pytest.fixture(autouse=True)
def _float32_products_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon multiplies in bfloat16 on a CPU with AMX, and rounds more there: one test does so on any CPU."""
    fast = matrix_functions._has_fast_bfloat16

    def on_devices(matrix: Tensor) -> bool:
        return matrix.device.type != "cpu" and fast(matrix)

    monkeypatch.setattr(matrix_functions, "_has_fast_bfloat16", on_devices)


@pytest.fixture(autouse=True)
def _kernels_as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that another test trained in this process may have switched them off."""
    monkeypatch.setattr(native, "_wanted", True)
