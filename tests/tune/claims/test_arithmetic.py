"""Expressions in claims: they have the value that Python gives them, and anything else is refused."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import ConfigError
from tune.claims.arithmetic import evaluate

numbers = st.integers(0, 999).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("110e3 * 20 * 60", 132e6),
        ("18e9 / (110e3 * 60)", 2727.2727272727275),
        ("-2 ** 2", -4.0),
        ("2 ** -1", 0.5),
        ("+7", 7.0),
        (" 1_000 ", 1000.0),
        (3, 3.0),
        (18e9, 18e9),
    ],
)
def test_an_expression_follows_the_usual_rules(text: str | float, value: float) -> None:
    assert evaluate(text) == value


@given(expressions)
def test_an_expression_of_whole_numbers_has_its_exact_value(text: str) -> None:
    exact = eval(text.replace(" ", ""), {"__builtins__": {}})  # as Python evaluates it
    assert math.isclose(evaluate(text), Fraction(exact), rel_tol=1e-12, abs_tol=1e-9)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1 +",
        "abs(1)",
        "__import__('os')",
        "().__class__",
        "[1]",
        "1 < 2",
        "1 if 1 else 2",
        "'a' * 9",
        "True",
        "1j",
        "1 // 2",
        "1 % 2",
        "1; 2",
        "\0",
        "(" * 150,
        "(-1) ** 0.5",
        "\ud800",
    ],
)
def test_anything_but_an_expression_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an arithmetic expression"):
        evaluate(text)


@pytest.mark.parametrize("text", ["1 / 0", "9 ** 9 ** 9 ** 9", "1e308 * 10", "1e999", float("nan"), float("inf")])
def test_an_expression_without_a_finite_value_is_refused_at_once(text: str | float) -> None:
    with pytest.raises(ConfigError, match="has no finite value"):
        evaluate(text)


@pytest.mark.parametrize("given", [None, True, [1], {"a": 1}])
def test_a_value_of_another_type_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="expected a number or an expression"):
        evaluate(given)  # pyright: ignore[reportArgumentType]


def test_a_long_expression_is_refused_unread() -> None:
    with pytest.raises(ConfigError, match="at most 200 characters, got 401"):
        evaluate("+".join("1" * 201))
