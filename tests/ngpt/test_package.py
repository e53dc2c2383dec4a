"""`from ngpt import ...`: quick, complete, and the same whatever else has been imported."""

import subprocess
import sys

import pytest

import ngpt

QUICK = """
import sys, ngpt
assert {*ngpt.__all__} <= {*dir(ngpt)}
assert "torch" not in sys.modules and "pydantic" not in sys.modules
"""
ORDERS = """
import inspect, pickle, sys
import ngpt.train, ngpt.generate
from ngpt import generate, train
from ngpt.train import TrainConfig, main, train as same
assert train is same and train is ngpt.train and generate is ngpt.generate
assert inspect.isgeneratorfunction(train) and inspect.isfunction(generate)
assert main is sys.modules["ngpt.train"].main
assert pickle.loads(pickle.dumps(generate)) is generate
"""


@pytest.mark.parametrize("code", [QUICK, pytest.param(ORDERS, marks=pytest.mark.slow)])
def test_the_package_is_quick_and_its_functions_are_not_hidden_by_its_modules(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_name_is_an_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'ngpt' has no attribute 'generat'"):
        getattr(ngpt, "generat")  # noqa: B009
