"""Constructor keywords: their names, their defaults, and the errors for values they cannot take."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from optim import ASGO, DASGO, AccAsro, Asro, Muon, Shampoo

from .cases import DESCRIPTIONS, Description, every_keyword, every_optimizer, matrix_optimizers, parameter, start

REQUIRED = inspect.Parameter.empty
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
CONSTRUCTORS: dict[type, dict[str, Any]] = {
    ASGO: {
        "lr": 1e-2, "momentum": 0.9, "beta2": 0.8, "eps": 1e-10, "weight_decay": 0.1, "root_method": "auto",
        "root_steps": 10, "precond_frequency": 1, "root_precision": "bf16",
    },
    DASGO: {"lr": 1e-2, "momentum": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    Muon: {
        "lr": 1e-2, "momentum": 0.9, "nesterov": False, "ns_steps": 5, "weight_decay": 0.1,
        "ns_coefficients": (3.4445, -4.7750, 2.0315), "adjust_lr_fn": "match_rms_adamw",
    },
    Shampoo: {
        "lr": 5e-3, "momentum": 0.9, "beta2": 0.999, "eps": 1e-10, "weight_decay": 0.1, "precond_frequency": 1,
        "exponent": -0.25,
    },
    Asro: {"lr": REQUIRED, "decrement": REQUIRED, "min_scale": REQUIRED, "scale_start_step": 0, **ADAM},
    AccAsro: {
        "lr": REQUIRED, "increment": REQUIRED, "decrement": REQUIRED, "max_scale": REQUIRED, "min_scale": REQUIRED,
        "total_steps": REQUIRED, "scale_start_step": 0, **ADAM,
    },
}  # fmt: skip
REFUSED = [
    pytest.param(case, keyword, value, id=f"{case.name}-{keyword}-{value}")
    for case in DESCRIPTIONS
    for keyword, values in case.refused.items()
    for value in values
]


@pytest.mark.parametrize("optimizer", CONSTRUCTORS, ids=lambda optimizer: optimizer.__name__)
def test_the_constructor_has_the_published_keywords_and_defaults(optimizer):
    parameters = list(inspect.signature(optimizer).parameters.values())
    published, own = parameters[1:-2], parameters[-2:]
    assert [(p.name, p.default) for p in published] == list(CONSTRUCTORS[optimizer].items())
    assert [(p.name, p.default) for p in own] == [("maximize", False), ("capturable", False)]
    assert all(p.kind is p.KEYWORD_ONLY for p in own)


def assert_names(error: pytest.ExceptionInfo[ValueError], keyword: str, value: object) -> None:
    assert keyword in str(error.value)
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("case", "keyword", "value"), REFUSED)
def test_a_bad_value_is_refused_with_keyword_and_value(case: Description, keyword, value):
    with pytest.raises(ValueError, match=keyword) as error:
        case.build([parameter(start((3, 4)))], **{keyword: value})
    assert_names(error, keyword, value)


@pytest.mark.parametrize(("case", "keyword", "value"), REFUSED)
def test_a_bad_value_in_a_group_is_refused_and_the_group_not_added(case: Description, keyword, value):
    optimizer = case.build([parameter(start((3, 4)))])
    with pytest.raises(ValueError, match=keyword) as error:
        optimizer.add_param_group({"params": [parameter(start((3, 4)))], keyword: value})
    assert_names(error, keyword, value)
    assert len(optimizer.param_groups) == 1


@every_optimizer
def test_a_negative_learning_rate_in_a_tensor_is_refused(case):
    with pytest.raises(ValueError, match="lr"):
        case.build([parameter(start((3, 4)))], lr=torch.tensor(-0.1))


@pytest.mark.parametrize("shape", [(2,), (0,), (40, 3)], ids=str)
@every_optimizer
def test_a_learning_rate_of_other_than_one_element_is_refused_in_one_line(case, shape):
    with pytest.raises(ValueError, match="Tensor lr must be 1-element") as error:
        case.build([parameter(start((3, 4)))], lr=torch.full(shape, 1e-3))
    assert "\n" not in str(error.value)


@every_keyword
def test_values_at_the_edge_of_their_range_are_taken(case, keyword):
    edges = {"momentum": 0.0, "beta2": 0.0, "betas": (0.0, 0.0), "lr": 0, "weight_decay": 0, "decrement": 0.0,
             "increment": 0.0, "scale_start_step": 0, "total_steps": 1, "precond_frequency": 1, "ns_steps": 1,
             "root_steps": 1, "eps": 1e-30, "exponent": -1.0}  # fmt: skip
    if keyword in {"min_scale", "max_scale"}:
        edges |= {"min_scale": 1.0 if case.name == "Asro" else 1.5, "max_scale": 0.75}
    param = parameter(start((3, 4)))
    optimizer = case.build([param], **({keyword: edges[keyword]} if keyword in edges else {}))
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.isfinite(param).all()


@every_optimizer
def test_an_unknown_group_key_is_refused_with_the_nearest_known_one(case):
    with pytest.raises(ValueError, match=r"weight_decey.*weight_decay"):
        case.build([{"params": [parameter(start((3, 4)))], "weight_decey": 0.1}])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("betas", (1.0, 0.9)),
        ("betas", 0.9),
        ("eps", -1.0),
        ("lr", -1.0),
        ("weight_decay", float("nan")),
        ("rule", "sgd"),
    ],
)
@matrix_optimizers
def test_a_bad_value_in_a_fallback_group_is_refused(case, key, value):
    with pytest.raises(ValueError, match=key) as error:
        case.build([{"params": [parameter(start((3,)))], "rule": "adam", key: value}])
    assert_names(error, key, value)


@matrix_optimizers
def test_adams_betas_in_a_matrix_group_are_refused(case):
    """Nobody would read them."""
    with pytest.raises(ValueError, match="betas"):
        case.build([{"params": [parameter(start((3, 4)))], "betas": (0.9, 0.99)}])


@every_optimizer
def test_an_empty_list_of_parameters_is_refused(case):
    with pytest.raises(ValueError, match="empty"):
        case.build([])


@every_optimizer
def test_a_parameter_in_two_groups_is_refused(case):
    param = parameter(start((3, 4)))
    with pytest.raises(ValueError, match=re.compile("more than one", re.IGNORECASE)):
        case.build([{"params": [param]}, {"params": [param]}])
