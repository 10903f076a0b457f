"""Training in float64, in which runs that differ by the order of their sums can be told from runs that differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from pipelines.data.images.transforms import Normalize


@contextmanager
def double_precision() -> Iterator[None]:
    """Models, optimizers, images and losses in float64."""

    normalize = Normalize.__call__

    def normalized(self: Normalize, images: Tensor) -> Tensor:
        return normalize(self, images).double()

    with mock.patch.object(Tensor, "float", Tensor.double), mock.patch.object(Normalize, "__call__", normalized):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def bound(steps: int) -> float:
    """How far, as a share, the rounding of sums in another order drives two runs in float64 apart.

    A sum is rounded by eps = 2.2e-16. An inverse root, and Adam's division, make more of it in the directions in which
    the gradient is small: of one that is √eps of the largest, they bring eps / √eps = √eps into the update, and smaller
    ones are below the noise floor. Each step adds as much. (In float32, √eps is 3.5e-4.)
    """
    return float(steps * torch.finfo(torch.float64).eps ** 0.5)
