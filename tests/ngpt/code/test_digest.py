"""The digest of the code changes with everything that can change numbers, and with nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ngpt.code.digest import Code, current_code, read_code
from ngpt.code.plugins import Entry, Plugin, Source
from ngpt.config.base import flatten, override
from ngpt.plugins.tables import Table
from ngpt.training.config import TrainConfig
from tests.helpers import ROOT

Edit = Callable[..., Code]
BASE = flatten(TrainConfig())
RULES = """
def lerp(x):
    \"\"\"Returns what it says.\"\"\"
    return _half(x) + 1


def slerp(x):
    return x * 2  # twice


def _half(x):
    return x / 2


RULES = {"lerp": lerp, "slerp": slerp}
OLD = {"chord": "lerp"}
"""
FILES = {
    "__init__.py": "",
    "training/__init__.py": "",
    "data/__init__.py": "",
    "training/loop.py": "import math\nfrom ngpt.rules import RULES\nfrom ngpt.config import C\n\n\n"
    "def train(c: C):\n    return math.floor(RULES[c.rule](1))\n\n\ndef unused():\n    return 0\n",
    "data/dataset.py": "def open_dataset():\n    return 1\n",
    "rules.py": RULES,
    "config.py": "from ngpt.rules import OLD, RULES\n\n\nclass C:\n"
    "    rule: Annotated[str, one_of(RULES, 'rule', aliases=OLD)] = 'lerp'\n",
    "ensemble/__init__.py": "",
    "ensemble/train.py": "from ngpt.training.loop import train\n\n\ndef train_together():\n    return [train()]\n",
}


def write(folder: Path, files: dict[str, str]) -> Code:
    """A package `ngpt` with these files, in a folder of its own."""
    package = folder / f"version{len(list(folder.iterdir()))}" / "ngpt"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return Code(package)


@pytest.fixture
def edit(tmp_path: Path) -> Edit:
    """The little package above, with a text in one of its files replaced, and with other files."""

    def edited(file: str = "rules.py", before: str = "", after: str = "", **files: str) -> Code:
        assert before in FILES[file]
        return write(tmp_path, FILES | {file: FILES[file].replace(before, after, 1)} | files)

    return edited


def changed(old: Code, new: Code, rule: str = "lerp", *, together: bool = False) -> dict[str, list[str]]:
    return new.changed(old.meanings, {"model.rule": rule}, together=together)


def test_an_edited_formula_is_named_with_its_file(edit: Edit) -> None:
    old, new = edit(), edit(before="+ 1", after="+ 2")
    assert old.digest != new.digest
    assert changed(old, new) == {"ngpt/rules.py": ["lerp"]}


def test_an_edit_concerns_the_runs_that_reach_it(edit: Edit) -> None:
    old = edit()
    assert changed(old, edit(before="x * 2", after="x * 3"), "lerp") == {}
    assert changed(old, edit(before="x * 2", after="x * 3"), "slerp") == {"ngpt/rules.py": ["slerp"]}
    assert changed(old, edit(before="x / 2", after="x / 3"), "slerp") == {}
    assert changed(old, edit(before="x * 2", after="x * 3"), "chord") == {}  # the old name of lerp
    assert changed(old, edit(before="x / 2", after="x / 3"), "chord") == {"ngpt/rules.py": ["_half"]}
    assert changed(old, edit(before="x / 2", after="x / 3"), "a rule without an entry") == {"ngpt/rules.py": ["_half"]}


def test_a_new_rule_concerns_no_earlier_run(edit: Edit) -> None:
    old, new = edit(), edit(before='"slerp": slerp', after='"slerp": slerp, "other": abs')
    assert old.digest != new.digest
    assert changed(old, new, "lerp") == changed(old, new, "slerp") == {}
    assert changed(old, new, "other") == {"ngpt/rules.py": ["RULES[other]"]}


def test_a_rule_that_is_exchanged_in_the_table_is_a_change(edit: Edit) -> None:
    old, new = edit(), edit(before='"lerp": lerp', after='"lerp": slerp')
    assert changed(old, new, "lerp") == {"ngpt/rules.py": ["RULES[lerp]"]}


def test_every_rule_counts_where_code_goes_through_the_table(edit: Edit) -> None:
    loop = {"training/loop.py": FILES["training/loop.py"].replace("RULES[c.rule](1)", "sum(RULES.values())")}
    old, new = edit(**loop), edit(before="x * 2", after="x * 3", **loop)
    assert changed(old, new, "lerp") == {"ngpt/rules.py": ["slerp"]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  # twice", ""),
        ("Returns what it says.", "Something else."),
        ("_half(x) + 1", "(\n        _half(x)\n        + 1\n    )"),
        ("\n\n\nRULES", "\n# ----\n\nRULES"),
    ],
    ids=["comment", "docstring", "formatting", "blank lines"],
)
def test_comments_and_formatting_do_not_count(edit: Edit, before: str, after: str) -> None:
    old, new = edit(), edit(before=before, after=after)
    assert (old.digest, old.meanings) == (new.digest, new.meanings)


def test_the_place_of_a_definition_does_not_count(edit: Edit) -> None:
    old = edit()
    slerp, half = (f"def {name}(x):\n" for name in ("slerp", "_half"))
    parts = RULES.partition(slerp)[0], slerp + RULES.partition(slerp)[2].partition(half)[0], half
    rest = RULES.partition(half)[2]
    reordered = edit(
        **{"rules.py": parts[1] + half + rest.partition("RULES")[0] + parts[0] + "RULES" + rest.partition("RULES")[2]}
    )
    moved = edit(
        **{
            "rules.py": RULES.replace("def _half(x):\n    return x / 2\n", "").replace(
                "\ndef", "from ngpt.low import _half\n\n\ndef", 1
            ),
            "low.py": "def _half(x):\n    return x / 2\n",
        }
    )
    for new in (reordered, moved):
        assert old.digest == new.digest
        assert changed(old, new) == changed(old, new, "slerp") == {}


def test_a_renamed_file_does_not_count(edit: Edit, tmp_path: Path) -> None:
    old = edit()
    files = {"wings/rules.py" if name == "rules.py" else name: text for name, text in FILES.items()}
    files = {name: text.replace("ngpt.rules", "ngpt.wings.rules") for name, text in files.items()}
    new = write(tmp_path, files | {"wings/__init__.py": ""})
    assert old.digest == new.digest and changed(old, new) == {}


def test_two_definitions_of_one_name_are_told_apart(edit: Edit) -> None:
    """The import of another function with the same name is a change, although both functions existed before."""
    more = {"other.py": "def scale(x):\n    return x\n", "rules.py": RULES.replace("x / 2", "scale(x)")}
    more["more.py"] = "def scale(x):\n    return 3 * x\n\n\ndef use(x):\n    return scale(x)\n"
    loop = FILES["training/loop.py"].replace("unused", "also").replace("math.floor", "also() or math.floor")
    more["training/loop.py"] = loop.replace("return 0", "return use(0)").replace(
        "import math", "import math\nfrom ngpt.more import use"
    )
    old = edit(**{**more, "rules.py": "from ngpt.other import scale\n" + more["rules.py"]})
    new = edit(**{**more, "rules.py": "from ngpt.more import scale\n" + more["rules.py"]})
    assert old.digest != new.digest
    assert changed(old, new) == {"ngpt/rules.py": ["scale"]}


@pytest.mark.parametrize(
    ("imports", "name"),
    [
        ("from ngpt.low.mine import half", "half"),
        ("from .low.mine import half", "half"),
        ("from .low import mine", "mine.half"),
        ("from ngpt.low.mine import *", "half"),
        ("import ngpt.low.mine\nimport ngpt.config", "ngpt.low.mine.half"),
    ],
)
def test_every_way_to_import_code_is_followed(edit: Edit, imports: str, name: str) -> None:
    user = RULES.replace("_half(x) + 1", f"{name}(x) + 1").replace("\ndef", f"{imports}\n\n\ndef", 1)
    for rules in (
        user,
        user.replace(f"{imports}\n", "").replace("    return", f"    {imports.splitlines()[0]}\n    return"),
    ):
        if "*" in imports and imports not in rules.partition("def")[0]:
            continue  # not allowed in a function
        files = {"rules.py": rules, "low/__init__.py": ""}
        old, new = (edit(**files, **{"low/mine.py": f"def half(x):\n    return x / {k}\n"}) for k in (2, 3))
        assert changed(old, new) == {"ngpt/low/mine.py": ["half"]}


def test_code_that_nothing_reaches_does_not_count(edit: Edit) -> None:
    old = edit()
    assert old.digest == edit("training/loop.py", "return 0", "return 9").digest
    assert old.digest == edit(**{"bench.py": "print('fast')"}).digest


def test_statements_that_run_at_import_count(edit: Edit) -> None:
    old = edit()
    new = edit("data/dataset.py", "def open", "import sys\n\nsys.flags = 3\n\n\ndef open")
    assert changed(old, new) == {"ngpt/data/dataset.py": ["(module)"]}
    registered = edit("data/dataset.py", "def open", "@register\ndef patch():\n    return 1\n\n\ndef open")
    again = edit("data/dataset.py", "def open", "@register\ndef patch():\n    return 2\n\n\ndef open")
    assert changed(registered, again) == {"ngpt/data/dataset.py": ["patch"]}


def test_another_library_under_the_same_name_is_a_change(edit: Edit) -> None:
    old, new = edit(), edit("training/loop.py", "import math", "import numpy as math")
    assert old.digest != new.digest and changed(old, new) == {"ngpt/training/loop.py": ["math"]}


def test_the_ensemble_concerns_only_runs_that_were_trained_together(edit: Edit) -> None:
    old, new = edit(), edit("ensemble/train.py", "[train()]", "[train(), 0]")
    assert changed(old, new) == {}
    assert changed(old, new, together=True) == {"ngpt/ensemble/train.py": ["train_together"]}


def test_cpp_sources_count_without_their_comments(edit: Edit) -> None:
    kernel = "// adds\nfloat add(float a) {\n  return a + 1; /* one\n more */\n}\n"
    old = edit(**{"exp.cpp": kernel})
    assert old.digest == edit(**{"exp.cpp": kernel.replace("adds", "sums").replace("  return", "\treturn")}).digest
    assert changed(old, edit(**{"exp.cpp": kernel.replace("a + 1", "a + 2")})) == {"ngpt/exp.cpp": ["(source)"]}


def test_a_file_in_the_middle_of_an_edit_has_no_digest(edit: Edit) -> None:
    whole, half = edit(), edit(before="x / 2", after="x /")
    found = read_code(whole.folder)
    assert found is not None and found.digest == whole.digest
    assert read_code(half.folder) is None


# ---- the real package ----------------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path: Path) -> Callable[..., Code]:
    """A copy of the package, with a text in one file replaced."""

    def edited(file: str = "__init__.py", before: str = "", after: str = "") -> Code:
        package = tmp_path / f"copy{len(list(tmp_path.iterdir()))}" / "ngpt"
        shutil.copytree(ROOT / "ngpt", package, ignore=shutil.ignore_patterns("__pycache__"))
        text = (package / file).read_text()
        assert before in text
        (package / file).write_text(text.replace(before, after, 1))
        return Code(package)

    return edited


def settings(**changes: object) -> dict[str, object]:
    return flatten(override(TrainConfig(), {name.replace("__", "."): value for name, value in changes.items()}))


def test_the_code_of_this_process_is_that_of_its_files(real: Callable[..., Code]) -> None:
    assert real().digest == current_code().digest and len(current_code().digest) == 16
    assert real().changed(current_code().meanings, BASE, together=True) == {}


@pytest.mark.parametrize(
    ("file", "before", "after", "reaches"),
    [
        ("model/residual.py", "alpha * (", "2 * alpha * (", {"model.residual": "lerp"}),
        ("optim/muon.py", "for ", "for  ", {}),
        ("trackers/wandb_run.py", "def ", "def _", {}),
        ("data/text/hub.py", "def ", "def _", {}),
    ],
)
def test_edits_of_the_real_package(
    real: Callable[..., Code], file: str, before: str, after: str, reaches: dict[str, str]
) -> None:
    found = real(file, before, after).changed(current_code().meanings, BASE)
    assert list(found) == ([f"ngpt/{file}"] if reaches else [])


# ---- plug-ins ------------------------------------------------------------------------------------------------------

MINE = {
    "mine.py": "from ngpt.rules import RULES as TABLE\nfrom .helper import half\n\n\ndef mine(x):\n    return half(x)\n"
    "\n\ndef other(x):\n    return x\n\n\nTABLE['mine'] = mine\nTABLE['other'] = other\n",
    "helper.py": "def half(x):\n    return x / 2\n",
}


def plugin(folder: Path, file: str = "mine.py", before: str = "", after: str = "") -> Plugin:
    """A plug-in with two rules, with a text in one of its files replaced, in a folder of its own."""
    place = folder / f"plugin{len(list(folder.iterdir()))}"
    place.mkdir()
    for name, text in MINE.items():
        assert name != file or before in text
        (place / name).write_text(text.replace(before, after, 1) if name == file else text)
    table = Table("rule", "ngpt.rules", "RULES", ("x",))
    source = Source("mine.py", "ngpt_plugin_mine", place / "mine.py")
    return Plugin(source, place / "mine.py", (Entry(table, "mine"), Entry(table, "other")))


def test_an_edited_plugin_concerns_the_runs_that_reach_it(edit: Edit, tmp_path: Path) -> None:
    package = edit().folder
    old = Code(package, [plugin(tmp_path)])
    assert changed(old, Code(package, [plugin(tmp_path)]), "mine") == {}  # in another folder
    assert old.digest == Code(package, [plugin(tmp_path)]).digest != Code(package).digest
    comment = Code(package, [plugin(tmp_path, before="return half", after='"""Halves."""\n    return half')])
    assert (comment.digest, changed(old, comment, "mine")) == (old.digest, {})
    helper = Code(package, [plugin(tmp_path, "helper.py", "x / 2", "x / 3")])
    assert changed(old, helper, "mine") == {"helper.py of mine.py": ["half"]}
    assert changed(old, helper, "other") == changed(old, helper, "lerp") == {}
    new = Code(package, [plugin(tmp_path, before="return x", after="return -x")])
    assert changed(old, new, "other") == {"mine.py": ["other"]} and changed(old, new, "mine") == {}
    digests = {code.plugin_digest(code.plugins[0]) for code in (old, comment, helper, new)}
    assert len(digests) == 3 and old.plugin_digest(old.plugins[0]) == comment.plugin_digest(comment.plugins[0])


def test_a_plugin_concerns_no_run_that_does_not_use_it(edit: Edit, tmp_path: Path) -> None:
    package = edit().folder
    without, code = Code(package), Code(package, [plugin(tmp_path)])
    for rule in ("lerp", "slerp"):
        assert changed(without, code, rule) == changed(code, without, rule) == {}
        assert code.plugins_of({"model.rule": rule}) == []
    assert changed(without, code, "other") == {"mine.py": ["TABLE[other]", "other"]}
    assert code.plugins_of({"model.rule": "mine"}) == list(code.plugins)
    assert [*code.plugin_files(code.plugins[0])] == ["helper.py of mine.py", "mine.py"]
    folder = code.plugins[0].file.parent
    files = {"mine.py": folder / "mine.py", "helper.py": folder / "helper.py"}
    assert code.files_to_send() == {"ngpt_plugin_mine": files}


def test_what_a_plugin_does_at_its_import_concerns_every_run(edit: Edit, tmp_path: Path) -> None:
    package = edit().folder
    old = Code(package, [plugin(tmp_path)])
    idle = "print('loaded')\nif __name__ == '__main__':\n    half(3)\n\n\ndef mine"
    assert changed(old, Code(package, [plugin(tmp_path, before="def mine", after=idle)]), "lerp") == {}
    busy = Code(package, [plugin(tmp_path, before="def mine", after="half(3)\n\n\ndef mine")])
    assert changed(old, busy, "lerp") == {"mine.py": ["(module)"]}
    # An entry that is added in another way counts with everything in its file.
    loop = "for name in ('mine', 'other'):\n    TABLE[name] = mine\n"
    where = {"before": "TABLE['mine'] = mine\nTABLE['other'] = other\n", "after": loop}
    old = Code(package, [plugin(tmp_path, **where)])
    edited = plugin(tmp_path, **where)
    edited.file.write_text(edited.file.read_text().replace("return half(x)", "return half(-x)"))
    assert changed(old, Code(package, [edited]), "other") == {"mine.py": ["mine"]}


def test_a_module_of_a_package_is_followed_in_the_package(edit: Edit, tmp_path: Path) -> None:
    package = edit().folder
    codes = list[Code]()
    for share in (2, 3):
        root = tmp_path / f"site{share}" / "others"
        root.mkdir(parents=True)
        (root / "__init__.py").touch()
        (root / "share.py").write_text(f"def half(x):\n    return x / {share}\n")
        (root / "rules.py").write_text(MINE["mine.py"].replace("from .helper", "from others.share"))
        table = Table("rule", "ngpt.rules", "RULES", ("x",))
        found = Plugin(Source("others.rules", "others.rules"), root / "rules.py", (Entry(table, "mine"),))
        codes.append(Code(package, [found]))
    assert changed(codes[0], codes[1], "mine") == {"others/share.py": ["half"]}
    assert codes[0].files_to_send() == {}
