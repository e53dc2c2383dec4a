"""Evaluates expressions such as `110e3 * 20 * 60`: numbers, + - * / ** and parentheses; no names, calls or `eval`."""

import ast
import math
import operator
from collections.abc import Callable

from ngpt.config.base import ConfigError

MAX_CHARACTERS = 200
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,  # on floats, so that a huge power overflows instead of becoming an integer of a million digits
}
SIGNS: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(text: str | float) -> float:
    """Evaluates an expression or a number.

    Raises:
        ConfigError: `text` is neither, or its value is not finite.
    """
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ConfigError(f"expected a number or an expression such as `110e3 * 20 * 60`, got {text!r}")
    if len(str(text)) > MAX_CHARACTERS:
        raise ConfigError(f"an expression has at most {MAX_CHARACTERS} characters, got {len(str(text))}")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body) if isinstance(text, str) else float(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # ValueError: from `_value`, or a null byte
        advice = "use numbers, + - * / ** and parentheses, such as `110e3 * 20 * 60`"
        raise ConfigError(f"{text!r} is not an arithmetic expression: {advice}") from None
    except (OverflowError, ZeroDivisionError):
        raise ConfigError(f"{text!r} has no finite value") from None
    if not math.isfinite(value):
        raise ConfigError(f"{text!r} has no finite value")
    return value


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op, operand) if type(op) in SIGNS:
            return SIGNS[type(op)](_value(operand))
    raise ValueError("not arithmetic")
