"""A user's own function of two variables, read from text: parsed into tensor operations, never evaluated as code."""

from __future__ import annotations

import ast
import math
import string
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from models.functions import Formula, TestFunction

_LONGEST = 300  # characters
_DEEPEST = 60  # operations inside one another
_LARGEST_EXPONENT = 100
_TOO_DEEP = f"operations are nested more than {_DEEPEST} deep"

_CONSTANTS = {"pi": math.pi, "e": math.e}
_OPERATORS: dict[type[ast.operator], Callable[[Tensor, Tensor], Tensor]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
    ast.Pow: torch.pow,
}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "atan": torch.atan,
}
_PAIR_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"minimum": torch.minimum, "maximum": torch.maximum}
_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_.+-*/(), ")
_HINTS = {"^": "; a power is written x**2", "=": "; write only what stands right of it", "|": "; write abs(x)"}


class _Refusal(Exception):
    """A part of the expression that cannot be, and why."""

    def __init__(self, part: ast.expr, reason: str) -> None:
        super().__init__(reason)
        self.part = part


def expression_function(text: str) -> TestFunction:
    """The function that an expression such as `x**2 + 10*y**2` describes; its optimum is unknown.

    It may hold numbers, `x`, `y`, `pi`, `e`, brackets, `+ - * / **` and the functions `abs`, `sqrt`, `exp`, `log`,
    `sin`, `cos`, `tan`, `sinh`, `cosh`, `tanh`, `atan`, `minimum` and `maximum`. Raises `ValueError` with the place
    and the reason for anything else, and for a text too long, a nesting too deep, an exponent too large and a constant
    part without a finite value.
    """
    text = text.strip()
    _check_text(text)
    try:
        formula = _read(_parse(text), depth=1)
    except _Refusal as refusal:
        place = refusal.part.col_offset
        raise ValueError(
            f"character {place + 1}, {_shortened(text[place : refusal.part.end_col_offset])}: {refusal}"
        ) from None
    if isinstance(formula, float):
        raise ValueError("it depends neither on x nor on y")
    return TestFunction("expression", "Expression", text, _filling_the_grid(formula), (3.0, 2.0), None, 1_000)


def _check_text(text: str) -> None:
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text):,} characters; at most {_LONGEST} can be read")
    if not text:
        raise ValueError("it is empty; write a function of x and y, as in x**2 + 10*y**2")
    for position, character in enumerate(text, start=1):
        if character not in _CHARACTERS:
            raise ValueError(f"character {position}, {character!r}, has no meaning here{_HINTS.get(character, '')}")


def _parse(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        reason = (error.msg or "invalid syntax").partition(". Perhaps")[0]
        rest = text[(error.offset or len(text) + 1) - 1 :]  # Python gives no place to an error at the end
        place = f"near character {error.offset}, {_shortened(rest)}" if rest else "at the end"
        raise ValueError(f"{place}: {reason}") from None
    except (RecursionError, MemoryError):
        raise ValueError(_TOO_DEEP) from None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _read(node: ast.expr, depth: int) -> float | Formula:
    """The value of a part without variables, or else the part as a function."""
    if depth > _DEEPEST:
        raise _Refusal(node, _TOO_DEEP)
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _finite(node, torch.tensor(float(value), dtype=torch.float64))
        case ast.Name(id=name):
            return _read_name(node, name)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _read(operand, depth + 1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _apply(node, torch.neg, _read(operand, depth + 1))
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            parts = [_read(left, depth + 1), _read(right, depth + 1)]
            if isinstance(operator, ast.Pow) and isinstance(parts[1], float) and abs(parts[1]) > _LARGEST_EXPONENT:
                raise _Refusal(right, f"an exponent can be at most {_LARGEST_EXPONENT}")
            return _apply(node, _OPERATORS[type(operator)], *parts)
        case ast.Call(func=ast.Name(id=name) as function, args=arguments, keywords=[]):
            operation = _find_function(node, function, len(arguments))
            return _apply(node, operation, *(_read(argument, depth + 1) for argument in arguments))
    raise _Refusal(
        node, "cannot be read; it takes numbers, x, y, + - * / ** (a product is 2*x) and functions, as sin(x)"
    )


def _read_name(node: ast.expr, name: str) -> float | Formula:
    if name == "x":
        return lambda x, y: x
    if name == "y":
        return lambda x, y: y
    if name in _FUNCTIONS or name in _PAIR_FUNCTIONS:
        raise _Refusal(node, "is a function: give it brackets, as in sin(x)")
    if name not in _CONSTANTS:
        raise _Refusal(node, f"is not a known number; known are x, y, {', '.join(_CONSTANTS)}")
    return _CONSTANTS[name]


def _find_function(call: ast.Call, name: ast.Name, count: int) -> Callable[..., Tensor]:
    functions: dict[str, Callable[..., Tensor]] = {**_FUNCTIONS, **_PAIR_FUNCTIONS}
    if name.id not in functions:
        raise _Refusal(name, f"is not a known function (a product is 2*x); known are {', '.join(functions)}")
    takes = 1 if name.id in _FUNCTIONS else 2
    if count != takes:
        raise _Refusal(call, f"{name.id} takes {takes} number{'s' if takes > 1 else ''}, not {count}")
    return functions[name.id]


def _apply(node: ast.expr, operation: Callable[..., Tensor], *parts: float | Formula) -> float | Formula:
    constants = [torch.tensor(part, dtype=torch.float64) for part in parts if isinstance(part, float)]
    if len(constants) == len(parts):
        return _finite(node, operation(*constants))

    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        return operation(*(x.new_tensor(part) if isinstance(part, float) else part(x, y) for part in parts))

    return evaluate


def _finite(node: ast.expr, value: Tensor) -> float:
    if not value.isfinite():
        raise _Refusal(node, "is not a finite number")
    return float(value)


def _filling_the_grid(formula: Formula) -> Formula:
    """The same with values in the shape that both arguments broadcast to, also where one of them is not used."""

    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        shape = (x + y).shape
        return formula(x.expand(shape), y.expand(shape))

    return evaluate
