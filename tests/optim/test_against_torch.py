"""Where torch has the same rule, the two must agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from optim import AccAsro, Asro, Muon

from .cases import Description, matrix_optimizers, noise, parameter, set_gradient, start

SHAPES = [(5, 3), (3, 5), (7,), (), (2, 3, 2, 2)]


def run_both(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, gradients: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameters of two optimizers of one parameter each after the same gradients."""
    mine, other = (each.param_groups[0]["params"][0] for each in (ours, theirs))
    for gradient in gradients:
        set_gradient(mine, gradient)
        set_gradient(other, gradient)
        ours.step()
        theirs.step()
    return mine.detach(), other.detach()


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (32, 32), (1, 16), (16, 1)], ids=str)
def test_muon_agrees_with_torch(shape, nesterov, weight_decay, adjust_lr_fn):
    """torch orthogonalizes in bfloat16: five steps leave about one per cent."""
    keywords = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 5, "weight_decay": weight_decay}
    params = [parameter(start(shape), torch.float32) for _ in range(2)]
    ours = Muon([params[0]], **keywords, adjust_lr_fn=adjust_lr_fn)
    theirs = torch.optim.Muon([params[1]], **keywords, adjust_lr_fn=adjust_lr_fn)
    mine, other = run_both(ours, theirs, noise(shape))
    assert torch.linalg.norm(mine - other) < 0.02 * torch.linalg.norm(other)


def test_nesterov_is_off_by_default():
    param = parameter(start((3, 4)))
    assert Muon([param]).param_groups[0]["nesterov"] is False


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_asro_without_decrement_is_adam(shape, weight_decay):
    keywords = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    params = [parameter(start(shape)) for _ in range(2)]
    ours = Asro([params[0]], decrement=0.0, min_scale=0.1, **keywords)
    theirs = (torch.optim.AdamW if weight_decay else torch.optim.Adam)([params[1]], **keywords)
    torch.testing.assert_close(*run_both(ours, theirs, noise(shape, steps=30)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accasro_without_increment_and_decrement_is_adam(shape):
    params = [parameter(start(shape)) for _ in range(2)]
    scales = {"increment": 0.0, "decrement": 0.0, "max_scale": 2.0, "min_scale": 0.5, "total_steps": 30}
    ours, theirs = AccAsro([params[0]], lr=0.1, **scales), torch.optim.Adam([params[1]], lr=0.1)
    torch.testing.assert_close(*run_both(ours, theirs, noise(shape, steps=30)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@matrix_optimizers
def test_the_fallback_is_adamw_without_weight_decay(case: Description, shape):
    params = [parameter(start(shape)) for _ in range(2)]
    ours = case.build([{"params": [params[0]], "rule": "adam"}], lr=0.1)
    theirs = torch.optim.AdamW([params[1]], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    torch.testing.assert_close(*run_both(ours, theirs, noise(shape, steps=30)), rtol=1e-12, atol=1e-13)


@matrix_optimizers
def test_the_fallback_with_its_own_settings_is_adamw_with_them(case: Description):
    settings = {"lr": 0.03, "betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.2}
    params = [parameter(start((3, 4))) for _ in range(2)]
    ours = case.build([{"params": [params[0]], "rule": "adam", **settings}])
    theirs = torch.optim.AdamW([params[1]], **settings)
    torch.testing.assert_close(*run_both(ours, theirs, noise((3, 4), steps=30)), rtol=1e-12, atol=1e-13)
