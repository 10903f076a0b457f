"""A user's own function: what it computes, what is refused, and where the refusal points."""

import math
import re

import numpy as np
import pytest
import torch

from models.expression import expression_function

# With the same meaning in Python, which is the reference; `minimum` and `maximum` are numpy's names too.
READABLE = [
    "x**2 + 10*y**2",
    "  x + y  ",
    "-x**2 - -y",
    "+x*y/(1 + x**2) - 2.5e-1",
    "2**3**0.5*x + y**-2",
    "x**2*y**3 - 3*x*(y - 1)**2/7",
    "sin(x)*cos(y) + tan(x/3) + tanh(x*y) + atan(y)",
    "sinh(x/2) + cosh(y/2) + exp(-x**2) + log(1 + y**2) + sqrt(abs(x) + 1)",
    "minimum(x, y)*maximum(x, 0.5) + minimum(2, maximum(1, 3))",
    "pi*x + e**y + sin(pi/6)",
    "(1 + x**2)**(y/2)",
    "+".join(["x*y"] * 50),
    "(" * 100 + "x" + ")" * 100,
]
NAMES = ["abs", "sqrt", "exp", "log", "sin", "cos", "tan", "sinh", "cosh", "tanh", "minimum", "maximum", "pi", "e"]


@pytest.mark.parametrize("text", READABLE, ids=lambda text: text[:30])
def test_an_expression_means_what_it_means_in_python(text: str) -> None:
    names = {name: getattr(np, name) for name in NAMES} | {"atan": math.atan}
    function = expression_function(text)
    for x, y in np.random.default_rng(0).uniform(0.1, 3, (20, 2)).tolist():
        expected = eval(text.strip(), {"__builtins__": {}}, {**names, "x": x, "y": y})
        found = function.evaluate(*torch.tensor([x, y], dtype=torch.float64).unbind())
        assert float(found) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("text", ["x**2 + 10*y**2", "x", "3*y - 1", "abs(y)**0.5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_function_of_one_variable_too_fills_a_grid_and_keeps_the_dtype(text: str, dtype: torch.dtype) -> None:
    x, y = torch.linspace(-2, 2, 4, dtype=dtype), torch.linspace(-1, 1, 3, dtype=dtype)
    grid = expression_function(text).evaluate(x[None, :], y[:, None])
    assert grid.shape == (3, 4)
    assert grid.dtype == dtype


def test_gradients_go_through_every_operation() -> None:
    function = expression_function("x**3*y - sin(x)/y + maximum(x, y)*e**x")
    point = torch.tensor([1.3, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda at: function.evaluate(*at.unbind()), point)
    square = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    expression_function("x**2 + abs(y)").evaluate(*square.unbind()).backward()
    assert square.grad is not None
    assert square.grad.tolist() == [0, 0]


def test_the_optimum_is_unknown() -> None:
    assert expression_function("x**2").optima == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("x^2", "character 2, '^', is not allowed; write a power as x**2"),
        ("x + y²", "character 6, '²', is not allowed"),
        ("x\ny", "character 2, '\\n', is not allowed"),
        ("f(x) = x", "character 6, '=', is not allowed; write only the right-hand side"),
        ("x**2 + foo(y)", "character 8, 'foo': is not a known function"),
        ("x + z", "character 5, 'z': is not a known name; known names: x, y, pi, e"),
        ("x + sin", "character 5, 'sin': is a function: add an argument in parentheses, as in sin(x)"),
        ("2(x)", "character 1, '2(x)': is not supported; use numbers, x, y, + - * / ** (a product is 2*x)"),
        ("2x", "near character 1, '2x': invalid decimal literal"),
        ("x**2 +", "at the end: invalid syntax"),
        ("3*(x", "near character 3, '(x': '(' was never closed"),
        ("x, y", "character 1, 'x, y': is not supported"),
        ("x.real", "character 1, 'x.real': is not supported"),
        ("x + __import__", "character 5, '__import__': is not a known name"),
        ("x + True", "character 5, 'True': is not supported"),
        ("1j*x", "character 1, '1j': is not supported"),
        ("x if y else 1", "is not supported"),
        ("x // y", "character 1, 'x // y': is not supported"),
        ("minimum(x)", "character 1, 'minimum(x)': minimum takes 2 arguments, not 1"),
        ("sin(x, y)", "character 1, 'sin(x, y)': sin takes 1 argument, not 2"),
        ("sin(*x)", "character 5, '*x': is not supported"),
        ("3 + sqrt(2)", "it depends on neither x nor y"),
        ("x + 1/0", "character 5, '1/0': is not a finite number"),
        ("x*log(-1)", "character 3, 'log(-1)': is not a finite number"),
        ("1e999*x", "character 1, '1e999': is not a finite number"),
        ("x**101", "character 4, '101': an exponent can be at most 100"),
        ("x + 9**9**9", "character 8, '9**9': an exponent can be at most 100"),
        ("x*" * 200 + "x", "it has 401 characters; the limit is 300"),
        ("-" * 299 + "x", "operations are nested more than 60 deep"),
        ("+".join("x" * 150), "operations are nested more than 60 deep"),
        ("**".join("x" * 100), "operations are nested more than 60 deep"),
    ],
)
def test_a_bad_expression_is_refused_with_its_place_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        expression_function(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250
