"""Numbers written as sums: `110e3 * 20 * 60`. Numbers, + - * / ** and parentheses; no names, no calls, no `eval`."""

import ast
import math
import operator
from collections.abc import Callable

from ngpt.config.base import ConfigError

LONGEST = 200  # characters
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,  # of floats: a huge power is an overflow at once, not a number of a million digits
}
SIGNS: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(text: str | float) -> float:
    """The value of a sum; a number is its own.

    Raises:
        ConfigError: it is not such a sum, or has no finite value.
    """
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ConfigError(f"expected a number or a sum such as `110e3 * 20 * 60`, got {text!r}")
    if len(str(text)) > LONGEST:
        raise ConfigError(f"a sum has at most {LONGEST} characters, got {len(str(text))}")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body, text) if isinstance(text, str) else float(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # ValueError: a null byte, the root of -1
        raise _not_a_sum(text) from None
    except (OverflowError, ZeroDivisionError):
        raise ConfigError(f"{text!r} has no finite value") from None
    if not math.isfinite(value):
        raise ConfigError(f"{text!r} has no finite value")
    return value


def _value(node: ast.expr, text: str) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, text), _value(right, text))
        case ast.UnaryOp(op, operand) if type(op) in SIGNS:
            return SIGNS[type(op)](_value(operand, text))
    raise _not_a_sum(text)


def _not_a_sum(text: object) -> ConfigError:
    return ConfigError(f"{text!r} is not a sum of numbers: use + - * / ** and parentheses, such as `110e3 * 20 * 60`")
