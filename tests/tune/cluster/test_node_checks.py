"""Which differences between a node and the host of a campaign keep trials off the node."""

from typing import Any

import pytest

from tune.cluster.node_checks import compare, host_versions

CODE = "0123456789abcdef"


def report(code: dict[str, str] | None = None, python: str | None = None, **versions: str | None) -> dict[str, Any]:
    """The report of a node like this host, apart from these differences."""
    here = host_versions()
    there = {name: version for name, version in here.items() if name != "Python"} | versions
    return {"python": python or here["Python"], "versions": there, "code": code or {"digest": CODE, "folder": "/x"}}


def test_a_node_like_this_host_has_no_problem() -> None:
    assert compare(report(), host_versions(), CODE) is None


def test_another_build_or_another_version_of_a_package_that_only_stores_is_no_problem() -> None:
    torch = str(host_versions()["torch"]).partition("+")[0]
    assert compare(report(torch=f"{torch}+cu999", pyarrow="99.0"), host_versions(), CODE) is None


@pytest.mark.parametrize(
    ("there", "problem"),
    [
        ({"python": "3.99.1"}, "has Python 3.99.1, and this host "),
        ({"torch": "1.0", "numpy": "0.9"}, "has torch 1.0, and this host "),
        ({"torch": "1.0", "numpy": "0.9"}, "; numpy 0.9, and this host "),
        ({"safetensors": None, "scipy": None}, "has no safetensors and scipy"),
        ({"code": {"error": "ModuleNotFoundError: No module named 'ngpt'"}}, "cannot import the code (ModuleNotFound"),
        ({"code": {"digest": "other", "folder": "/old/ngpt"}}, "imports other code, from /old/ngpt"),
    ],
)
def test_what_can_change_numbers_or_end_trials_is_named(there: dict[str, Any], problem: str) -> None:
    assert problem in str(compare(report(**there), host_versions(), CODE))


def test_a_node_without_a_compiler_is_refused_if_the_campaign_compiles() -> None:
    here, problem = host_versions(), "compile: true needs a C++ compiler: install g++"
    assert compare(report() | {"compiler": None}, here, CODE) is None
    assert compare(report() | {"compiler": problem}, here, CODE) == f"cannot train: {problem}"
