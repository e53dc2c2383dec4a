"""The shape of the program: who may import whom, what a fresh start loads, and that nothing is without a test."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("ngpt/**/*.py"), *ROOT.glob("tune/**/*.py"), ROOT / "run_campaign.py"])
NAMES = {path: path.relative_to(ROOT).as_posix() for path in SOURCES}

# Packages that only these files may import, here always all the importers there are.
RESERVED = {
    "ray": {"tune/executors/ray_executor.py", "tune/executors/ray_trainable.py"},
    "wandb": {"ngpt/training/wandb_tracker.py"},
    "torch.utils.tensorboard": {"ngpt/training/tracker.py"},
    "sentencepiece": {"ngpt/data/tokens/tokenizer.py"},
    "tiktoken": {"ngpt/data/tokens/gpt2_bpe.py"},
    "optuna": {"tune/planning/optuna_search.py"},
}
# A file without a test file of its own, and why.
UNTESTED: dict[str, str] = {
    "ngpt/data/tokens/gpt2_bpe.py": "one tokenizer among others: test_tokenizer.py",
    "ngpt/data/shard_index.py": "what corpora.py does with shards that exist already: test_corpora.py",
    "tune/spec/schema.py": "types without behaviour, filled by load_campaign: test_campaign.py",
    "tune/spec/phase_reader.py": "part of load_campaign: test_campaign.py",
    "tune/spec/validation.py": "part of load_campaign: test_campaign.py",
    "tune/claims/evidence.py": "what claims rest on: test_claims.py",
    "tune/claims/selectors.py": "how claims name arms: test_claims.py",
    "tune/session/phase_tracker.py": "the phases of a session: test_session.py",
    "tune/executors/ray_process.py": "the process that Ray runs in, in real runs: test_engine.py, test_keeper.py",
    "tune/storage/lock.py": "the lock of a session: test_session.py",
    "tune/terminal/final_screen.py": "the other half of the terminal: test_console.py",
    "tune/report/figures.py": "the report's plots: test_report.py",
    "tune/report/markdown.py": "the same content without plots: test_report.py",
    "tune/bench/campaigns.py": "python -m tune.bench: test_tune_bench.py",
    "tune/bench/gpu.py": "python -m tune.bench: test_tune_bench.py",
    "tune/results/phase_summary.py": "what summary.py writes of a phase: test_summary.py",
}
MOST_LINES = 60  # of a function


class Import(NamedTuple):
    """`import module`, or `from module import name`; `bound` is the name that it gets here."""

    module: str
    name: str | None
    bound: str
    line: int


def imports(path: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, alias.asname or alias.name.split(".")[0], node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield Import(node.module or "", alias.name, alias.asname or alias.name, node.lineno)


def importers(package: str) -> set[str]:
    start = f"{package}."
    return {NAMES[path] for path in SOURCES if any(f"{used.module}.".startswith(start) for used in imports(path))}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_the_library_knows_nothing_of_the_campaigns() -> None:
    for package in ("ray", "rich", "tune", "run_campaign"):
        assert {name for name in importers(package) if name.startswith("ngpt/")} == set()
    assert importers("run_campaign") == set()


@pytest.mark.parametrize("package", RESERVED)
def test_a_package_of_the_outside_is_imported_in_one_place(package: str) -> None:
    assert importers(package) == RESERVED[package]


def test_the_name_tune_is_our_package_and_never_rays() -> None:
    """`from ray import tune` would make two of them; `import ray.tune` does not."""
    found = [
        f"{NAMES[path]}:{used.line}: write `import ray.tune`"
        for path in SOURCES
        for used in imports(path)
        if used.module.split(".")[0] == "ray" and (used.bound == "tune" or (used.module == "ray" and used.name))
    ]
    assert found == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {module_name(path) for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        used = {f"{found.module}.{found.name}" for found in imports(path)} | {found.module for found in imports(path)}
        graph[module_name(path)] = used & modules
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_the_command_line_starts_without_what_it_may_not_need() -> None:
    heavy = ("torch", "ray", "pyarrow", "plotly", "wandb", "tensorboard", "scipy", "sentencepiece", "pandas")
    code = f"import sys, run_campaign; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_every_file_has_a_test_file() -> None:
    tests = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    missing = []
    for path, name in NAMES.items():
        expected = {f"test_{path.stem}.py", f"test_{path.parent.name}_{path.stem}.py"}
        if not (path.stem.startswith("__") or name in UNTESTED or expected & tests):
            missing.append(name)
    assert missing == []
    assert set(UNTESTED) <= set(NAMES.values())


def test_the_readme_names_every_file_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"[\w./-]*\w\.py\b", text))
    there = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    unknown = {name for name in mentioned if not any(f"/{path}".endswith(f"/{name}") for path in there)}
    assert unknown == set()
    names = {Path(name).name for name in mentioned}
    files = {path.name for package in ("ngpt", "tune") for path in (ROOT / package).glob("[!_]*.py")}
    assert files - names == set()


def test_the_readme_names_every_document_and_the_cpp() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [*ROOT.glob("docs/*.md"), *ROOT.glob("ngpt/*.cpp"), *ROOT.glob("ngpt/*.h")]
    tree = text.partition("## The tree")[2].partition("## I want to")[0]
    assert len(files) >= 10 and [path.name for path in files if path.name not in tree] == []


def test_the_package_metadata_list_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(
        {module_name(path.parent / "__init__.py") for path in SOURCES if path.parent != ROOT}
    )


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{NAMES[path]}:{node.lineno}: {node.name} has {lines} lines"
        for path in SOURCES
        for node in functions(path)
        if node.end_lineno is not None and (lines := node.end_lineno - node.lineno + 1) > MOST_LINES
    ]
    assert long == []


def test_public_functions_say_what_they_do() -> None:
    silent = [
        f"{NAMES[path]}:{node.lineno}: {node.name}"
        for path in SOURCES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert silent == []


def test_every_file_but_an_empty_one_says_what_it_is_for() -> None:
    trees = {NAMES[path]: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert [name for name, tree in trees.items() if tree.body and not ast.get_docstring(tree)] == []
