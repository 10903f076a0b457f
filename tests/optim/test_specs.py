"""The table of optimizers agrees with the constructors, and can be read without torch."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import optim
from optim import OPTIMIZER_NAMES, build_optimizer, optimizer_class
from optim.matrix_optimizer import MatrixOptimizer
from optim.specs import REQUIRED, SPECS

OF_THE_LOOP = ("params", "total_steps", "maximize", "capturable")
"""Keywords of our constructors that are no settings: a run gives the first two, other people's loops the others."""


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.is_own])
def test_the_table_has_the_keywords_and_defaults_of_our_constructors(name: str) -> None:
    parameters = inspect.signature(optimizer_class(name)[0]).parameters
    accepted = {key: each.default for key, each in parameters.items() if key not in OF_THE_LOOP}
    required = {key: REQUIRED for key, default in accepted.items() if default is inspect.Parameter.empty}
    assert list(SPECS[name].defaults.items()) == list({**accepted, **required}.items())


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_setting_is_a_keyword_of_the_class(name: str) -> None:
    cls, implied = optimizer_class(name)
    assert {*SPECS[name].defaults, *implied} <= {*inspect.signature(cls).parameters}
    assert SPECS[name].takes_matrices == issubclass(cls, MatrixOptimizer)


def test_neither_the_names_nor_the_package_load_torch() -> None:
    code = "import sys, optim, optim.specs; from optim import OPTIMIZER_NAMES; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_the_package_has_its_names_and_submodules_at_first_use() -> None:
    code = """if True:
        import optim
        assert {"ASGO", "build_optimizer"} < set(dir(optim))
        optim.native.description()
        from optim import *
        assert ASGO is optim.asgo.ASGO and build_optimizer is optim.registry.build_optimizer
        assert not hasattr(optim, "asgoo")
    """
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
    with pytest.raises(AttributeError, match="module 'optim' has no attribute 'asgoo'"):
        _ = optim.asgoo


@pytest.mark.parametrize("again", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_an_optimizer_can_be_copied_and_pickled(again) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = build_optimizer(model, "dasgo", 5, lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    copied = again(optimizer)
    assert type(copied) is optim.DASGO
    assert str(copied.state_dict()) == str(optimizer.state_dict())
