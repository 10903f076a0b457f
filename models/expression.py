"""Parser for a function of two variables, from text to tensor operations. The text is never executed as code."""

from __future__ import annotations

import ast
import math
import string
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from models.functions import Formula, TestFunction

_MAX_CHARACTERS = 300
_MAX_DEPTH = 60  # nested operations
_MAX_EXPONENT = 100
_TOO_DEEP = f"operations are nested more than {_MAX_DEPTH} deep"

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
_HINTS = {"^": "; write a power as x**2", "=": "; write only the right-hand side", "|": "; write abs(x)"}


class _InvalidPart(Exception):
    """An invalid part of the expression, and the reason."""

    def __init__(self, part: ast.expr, reason: str) -> None:
        super().__init__(reason)
        self.part = part


def expression_function(text: str) -> TestFunction:
    """Return the function of an expression such as `x**2 + 10*y**2`; its optimum is unknown.

    Valid are numbers, `x`, `y`, `pi`, `e`, parentheses, `+ - * / **` and the functions `abs`, `sqrt`, `exp`, `log`,
    `sin`, `cos`, `tan`, `sinh`, `cosh`, `tanh`, `atan`, `minimum` and `maximum`. Raises `ValueError`, with position and
    reason, for anything else, and if the text is too long, the nesting too deep, an exponent too large, or a constant
    part is not finite.
    """
    text = text.strip()
    _check_text(text)
    try:
        formula = _read(_parse(text), depth=1)
    except _InvalidPart as error:
        start = error.part.col_offset
        raise ValueError(
            f"character {start + 1}, {_shortened(text[start : error.part.end_col_offset])}: {error}"
        ) from None
    if isinstance(formula, float):
        raise ValueError("it depends on neither x nor y")
    return TestFunction("expression", "Expression", text, _broadcasting(formula), (3.0, 2.0), None, 1_000)


def _check_text(text: str) -> None:
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; the limit is {_MAX_CHARACTERS}")
    if not text:
        raise ValueError("it is empty; write a function of x and y, such as x**2 + 10*y**2")
    for position, character in enumerate(text, start=1):
        if character not in _CHARACTERS:
            raise ValueError(f"character {position}, {character!r}, is not allowed{_HINTS.get(character, '')}")


def _parse(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        reason = (error.msg or "invalid syntax").partition(". Perhaps")[0]
        rest = text[(error.offset or len(text) + 1) - 1 :]  # for an error at the end, Python reports no position
        place = f"near character {error.offset}, {_shortened(rest)}" if rest else "at the end"
        raise ValueError(f"{place}: {reason}") from None
    except (RecursionError, MemoryError):
        raise ValueError(_TOO_DEEP) from None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _read(node: ast.expr, depth: int) -> float | Formula:
    """Return the value of a part without variables; for other parts, the function."""
    if depth > _MAX_DEPTH:
        raise _InvalidPart(node, _TOO_DEEP)
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
            if isinstance(operator, ast.Pow) and isinstance(parts[1], float) and abs(parts[1]) > _MAX_EXPONENT:
                raise _InvalidPart(right, f"an exponent can be at most {_MAX_EXPONENT}")
            return _apply(node, _OPERATORS[type(operator)], *parts)
        case ast.Call(func=ast.Name(id=name) as function, args=arguments, keywords=[]):
            operation = _find_function(node, function, len(arguments))
            return _apply(node, operation, *(_read(argument, depth + 1) for argument in arguments))
    raise _InvalidPart(
        node, "is not supported; use numbers, x, y, + - * / ** (a product is 2*x) and functions such as sin(x)"
    )


def _read_name(node: ast.expr, name: str) -> float | Formula:
    if name == "x":
        return lambda x, y: x
    if name == "y":
        return lambda x, y: y
    if name in _FUNCTIONS or name in _PAIR_FUNCTIONS:
        raise _InvalidPart(node, "is a function: add an argument in parentheses, as in sin(x)")
    if name not in _CONSTANTS:
        raise _InvalidPart(node, f"is not a known name; known names: x, y, {', '.join(_CONSTANTS)}")
    return _CONSTANTS[name]


def _find_function(call: ast.Call, name: ast.Name, count: int) -> Callable[..., Tensor]:
    functions: dict[str, Callable[..., Tensor]] = {**_FUNCTIONS, **_PAIR_FUNCTIONS}
    if name.id not in functions:
        raise _InvalidPart(name, f"is not a known function (a product is 2*x); known functions: {', '.join(functions)}")
    takes = 1 if name.id in _FUNCTIONS else 2
    if count != takes:
        raise _InvalidPart(call, f"{name.id} takes {takes} argument{'s' if takes > 1 else ''}, not {count}")
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
        raise _InvalidPart(node, "is not a finite number")
    return float(value)


def _broadcasting(formula: Formula) -> Formula:
    """Make the values have the broadcast shape of both arguments, even if the formula uses only one."""

    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        shape = (x + y).shape
        return formula(x.expand(shape), y.expand(shape))

    return evaluate
