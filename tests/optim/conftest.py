"""What all tests of the optimizers share."""

from __future__ import annotations

import pytest

from optim import matrix_functions, native


@pytest.fixture(autouse=True)
def _float32_products_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon multiplies in bfloat16 on a CPU with such instructions, and rounds more there."""
    monkeypatch.setattr(matrix_functions, "_bfloat16_wanted", False)


@pytest.fixture(autouse=True)
def _kernels_as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that another test trained in this process may have switched them off."""
    monkeypatch.setattr(native, "_wanted", True)
