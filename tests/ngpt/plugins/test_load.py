"""Plug-ins add to tables, and are refused in one line where they do anything else."""

import sys
from pathlib import Path

import pytest

from ngpt.code.plugins import loaded_plugins, loaded_sources
from ngpt.model import norm
from ngpt.model.gpt import GPT
from ngpt.model.norm import rms_norm
from ngpt.model.residual import RESIDUAL_RULES, lerp
from ngpt.plugins.load import find, installed, load_installed, load_plugins, load_sources
from ngpt.plugins.tables import PluginError
from tests.helpers.plugin_files import RULE, install, no_plugins, write

__all__ = ["no_plugins"]
TABLE = "from ngpt.model.residual import RESIDUAL_RULES\n"
METRIC = "from ngpt.training.evaluation import METRICS, EvalMetric\n"


def test_a_plugin_adds_to_a_table_and_imports_the_files_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    write(tmp_path, "SHARE = 0.5\n", "a_helper.py")
    text = f"from .a_helper import SHARE\nprint('hello')\n{RULE}".replace("0.9", "SHARE")
    write(tmp_path, text, "my-rule.v2.py")
    load_plugins([f"{tmp_path.name}/my-rule.v2.py", str(tmp_path / "my-rule.v2.py")])  # twice the same
    (plugin,) = loaded_plugins()
    assert RESIDUAL_RULES["mine"](1.0, 1.0, 1.0, float) == 1.5  # pyright: ignore[reportArgumentType]
    assert (plugin.name, list(map(str, plugin.entries))) == ("my-rule.v2.py", ["residual rule mine"])
    assert capsys.readouterr() == ("", "hello\n")  # stdout is for data
    load_sources(loaded_sources())  # as a worker in the same process does


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = = 1\n", "mine.py:1: SyntaxError: invalid syntax"),
        ("\nx = y\n", "mine.py:2: NameError: name 'y' is not defined"),
        ("import no_such_module\n", "mine.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import beside\n", "; for the file beside it write `from .beside import ...`"),
        ("from .broken import x\n", "broken.py:3: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", "mine.py:1: SystemExit: 3 ends the program"),
        ("x = 1\n", 'mine.py adds nothing: it has no line such as TABLE["name"] = function for one of RESIDUAL_RULES'),
        (f"{TABLE}class A: pass\nRESIDUAL_RULES['a'] = A\n", "RESIDUAL_RULES['a'] is the class A; a residual rule is"),
        (f"{TABLE}RESIDUAL_RULES['a'] = 3\n", "RESIDUAL_RULES['a'] is 3; a residual rule is a function (x, f, alpha,"),
        (
            f"{TABLE}RESIDUAL_RULES['a'] = lambda x, f: x\n",
            "a function (x, f); it is called with (x, f, alpha, norm)",
        ),
        (f"{TABLE}RESIDUAL_RULES['a b'] = max\n", "RESIDUAL_RULES['a b']: the name of a residual rule starts with"),
        (f"{TABLE}RESIDUAL_RULES['seed'] = max\n", "RESIDUAL_RULES['seed']: the name seed means something else"),
        (f"{TABLE}RESIDUAL_RULES['lerp'] = max\n", "replaces the built-in residual rule lerp (ngpt/model/residual.py:"),
        (f"{TABLE}del RESIDUAL_RULES['lerp']\n", "removes the residual rule lerp of ngpt/model/residual.py:"),
        (
            "import ngpt.model.norm as n\nn.rms_norm = max\n",
            "mine.py replaces ngpt.model.norm.rms_norm: it may",
        ),
        (
            "from ngpt.model.gpt import GPT\nGPT.forward = print\n",
            "mine.py replaces ngpt.model.gpt.GPT.forward: it",
        ),
        (f"{METRIC}METRICS['a'] = max\n", "a metric is an object of EvalMetric with a function (model, eval_set)"),
        (f"{METRIC}METRICS['val_loss'] = EvalMetric(max)\n", "METRICS['val_loss']: the name val_loss means something"),
        (
            f"{METRIC}METRICS['a'] = EvalMetric(max, goal='up')\n",
            "mine.py:2: ValueError: the goal of a metric is",
        ),
    ],
)
def test_what_is_wrong_with_a_plugin_is_one_line_and_changes_nothing(tmp_path: Path, text: str, problem: str) -> None:
    write(tmp_path, "", "beside.py")
    write(tmp_path, "\n\nx = 1 / 0\n", "broken.py")
    before, modules = dict(RESIDUAL_RULES), set(sys.modules)
    functions = rms_norm, GPT.forward
    with pytest.raises(PluginError) as caught:
        load_plugins([write(tmp_path, text)])
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    assert before == RESIDUAL_RULES and not loaded_plugins()
    assert functions == (norm.rms_norm, GPT.forward)
    assert not [name for name in set(sys.modules) - modules if name.startswith("ngpt_plugin")]


def test_a_name_that_two_plugins_add_is_refused_with_both_places(tmp_path: Path) -> None:
    load_plugins([write(tmp_path)])
    mine = RESIDUAL_RULES["mine"]
    with pytest.raises(PluginError, match=r"other.py add the same residual rule mine \(mine.py:4 and other.py:4\)"):
        load_plugins([write(tmp_path, RULE, "other.py")])
    assert RESIDUAL_RULES["mine"] is mine
    with pytest.raises(PluginError, match=r"have the same name, mine\.py: rename one of them"):
        load_plugins([write(tmp_path / "elsewhere")])


def test_a_plugin_that_is_not_there_is_named_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    for text, problem in {
        "mime.py": "no such file, did you mean mine.py?",
        "./": "a folder, name a .py file",
        "mine": "No module named 'mine'; for the file write ./mine.py",
        "no.such": "No module named 'no'; is it installed?",
        "a-b": "neither a .py file nor the name of a module",
    }.items():
        with pytest.raises(PluginError, match=problem):
            load_plugins([text])
    assert find("mine.py").file == tmp_path / "mine.py"


def test_plugins_of_packages_are_loaded_and_a_broken_one_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    install(site, "pkg_good", RULE)
    install(site, "pkg_broken", "import no_such_module\n")
    install(site, "pkg_lerp", RULE.replace('"mine"', '"lerp"'))
    install(here, "pkg_here", RULE)  # in the current directory, which `python -m` has on its path
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", ["", str(here), str(site), *sys.path])
    assert {package for package, _ in installed()} >= {"pkg_good", "pkg_broken", "pkg_lerp"}
    assert "pkg_here" not in {package for package, _ in installed()}
    assert load_installed() == [] and not loaded_plugins()  # NGPT_PLUGINS=none
    monkeypatch.setenv("NGPT_PLUGINS", "all")
    with pytest.raises(PluginError, match="NGPT_PLUGINS is 'all': only none is possible"):
        load_installed()
    monkeypatch.delenv("NGPT_PLUGINS")
    broken, lerps = sorted(load_installed())
    assert "of the package pkg_broken is left out: plug-in rules.py:1: ModuleNotFoundError" in broken
    assert "of the package pkg_lerp is left out: plug-in pkg_lerp.rules replaces the built-in residual rule" in lerps
    assert [plugin.name for plugin in loaded_plugins()] == ["pkg_good.rules"]
    assert RESIDUAL_RULES["lerp"] is lerp
    with pytest.raises(PluginError, match="No module named 'pkg_here'"):
        load_plugins(["pkg_here.rules"])
    assert sys.path[:3] == ["", str(here), str(site)]
