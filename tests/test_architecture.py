"""The structure of the code: import order, reserved packages, start-up imports, test files and documents."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("ngpt/**/*.py"), *ROOT.glob("tune/**/*.py"), ROOT / "run_campaign.py"])
NAMES = {path: path.relative_to(ROOT).as_posix() for path in SOURCES}

# The wings, bottom first: a file imports from its own wing and from those before it.
WINGS = (
    *("ngpt/config", "ngpt/system", "ngpt/data/text", "ngpt/data/tokens", "ngpt/data", "ngpt/kernels", "ngpt/model"),
    *("ngpt/optim", "ngpt/training", "ngpt/ensemble", "ngpt/runs", "ngpt", "ngpt/bench"),
    *("tune/storage", "tune/trials", "tune/spec", "tune/analysis", "tune/claims", "tune/planning", "tune/report"),
    *("tune/machine", "tune/results", "tune/terminal", "tune/session", "tune/executors", "tune", "tune/bench", "."),
)
LEAF = "tune/format.py"  # imports no wing of tune, so every one of them may use it
MOST_FILES = 14  # in a wing

# Packages that only these files import.
RESERVED = {
    "ray": {"tune/executors/ray_executor.py", "tune/executors/ray_trainable.py"},
    "wandb": {"ngpt/training/wandb_tracker.py"},
    "torch.utils.tensorboard": {"ngpt/training/tracker.py"},
    "sentencepiece": {"ngpt/data/tokens/tokenizer.py"},
    "tiktoken": {"ngpt/data/tokens/gpt2_bpe.py", "ngpt/data/tokens/tiktoken_bpe.py"},
    "tokenizers": {"ngpt/data/tokens/hf_tokenizer.py"},
    "huggingface_hub": {"ngpt/data/text/hub.py"},
    "optuna": {"tune/planning/optuna_search.py"},
}
# Files without a test file of their own, and the tests that cover them.
UNTESTED: dict[str, str] = {
    "ngpt/data/tokens/gpt2_bpe.py": "test_tokenizer.py",
    "ngpt/data/shard_index.py": "test_dataset.py",
    "ngpt/model/config.py": "test_gpt.py",
    "ngpt/model/layers.py": "test_gpt.py",
    "ngpt/optim/batching.py": "test_muon.py",
    "ngpt/training/state.py": "test_recovery.py",
    "tune/storage/records.py": "test_state.py",
    "tune/spec/schema.py": "test_campaign.py",
    "tune/spec/phase_reader.py": "test_campaign.py",
    "tune/spec/validation.py": "test_campaign.py",
    "tune/spec/reading.py": "test_campaign.py",
    "tune/spec/seeds.py": "test_campaign.py",
    "tune/claims/evidence.py": "test_relations.py",
    "tune/claims/possible_arms.py": "test_reader.py",
    "tune/claims/selectors.py": "test_relations.py",
    "tune/report/figures.py": "test_html.py",
    "tune/report/markdown.py": "test_html.py",
    "tune/results/answer.py": "test_summary.py",
    "tune/results/comparability.py": "test_compare.py",
    "tune/results/phase_summary.py": "test_summary.py",
    "tune/results/seed_notes.py": "test_fresh_seeds.py",
    "tune/results/snapshot.py": "test_status.py",
    "tune/terminal/final_screen.py": "test_live.py",
    "tune/terminal/plan_view.py": "test_estimate.py",
    "tune/session/phase_tracker.py": "test_session.py",
    "tune/executors/ray_process.py": "test_ray_supervisor.py",
    "tune/bench/campaigns.py": "test_bench.py",
    "tune/bench/sequential.py": "test_bench.py",
}
MOST_LINES = 60  # of a function
README_LINES = 150
# The imports that CHANGELOG.md promises to keep.
PUBLIC = {
    "ngpt.model": ("GPT", "ModelConfig"),
    "ngpt.train": ("TrainConfig", "train"),
    "ngpt.convert": ("from_nvidia_ngpt", "from_nanochat"),
    "tune": ("judge",),
}
DOCUMENTS = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = {"changes.py", "facts.py", "lab.py", "model.py"}  # files that documents show, or that other projects have


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


def test_ngpt_does_not_import_the_campaign_engine() -> None:
    for package in ("ray", "rich", "tune", "run_campaign"):
        assert {name for name in importers(package) if name.startswith("ngpt/")} == set()
    assert importers("run_campaign") == set()


@pytest.mark.parametrize("package", RESERVED)
def test_a_third_party_package_is_imported_only_where_it_is_allowed(package: str) -> None:
    assert importers(package) == RESERVED[package]


def test_the_name_tune_never_means_ray_tune() -> None:
    """`from ray import tune` would make two of them; `import ray.tune` does not."""
    found = [
        f"{NAMES[path]}:{used.line}: write `import ray.tune`"
        for path in SOURCES
        for used in imports(path)
        if used.module.split(".")[0] == "ray" and (used.bound == "tune" or (used.module == "ray" and used.name))
    ]
    assert found == []


def test_wings_import_one_way() -> None:
    upward = []
    for path in SOURCES:
        for used in imports(path):
            target = NAMES.get(ROOT / f"{used.module.replace('.', '/')}/{used.name}.py") or NAMES.get(
                ROOT / f"{used.module.replace('.', '/')}.py"
            )
            if target is None or target == LEAF:
                continue
            wing, other = (PurePosixPath(name).parent.as_posix() for name in (NAMES[path], target))
            if WINGS.index(other) > WINGS.index(wing):
                upward.append(f"{NAMES[path]}:{used.line} imports {target}")
    assert upward == []


def is_shown_safely(value: ast.expr) -> bool:
    """Whether a printed expression is a constant, JSON, in visible form, or a text of constants and numbers."""
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in ("visible", "plain", "dumps")
    if isinstance(value, ast.JoinedStr):
        return all(isinstance(part, ast.Constant) or is_shown_safely(part) for part in value.values)
    if isinstance(value, ast.FormattedValue):
        is_number = value.format_spec is not None and "," in ast.unparse(value.format_spec)
        return is_number or is_shown_safely(value.value)
    return isinstance(value, ast.Constant)


def test_text_from_outside_is_printed_in_visible_form() -> None:
    raw = [
        f"{NAMES[path]}: {ast.unparse(node)}"
        for path in SOURCES
        if "/bench/" not in NAMES[path]  # numbers only
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if not all(map(is_shown_safely, node.args))
    ]
    # A model's text goes into a file as it is, and on a terminal in visible form.
    assert raw == ["ngpt/generate.py: print(shown, end='\\n' if current.ended else '', flush=True)"]


def test_every_wing_has_a_place_and_few_files() -> None:
    wings = Counter(PurePosixPath(name).parent.as_posix() for name in NAMES.values())
    assert set(wings) == set(WINGS)
    assert [wing for wing, files in wings.items() if files > MOST_FILES] == []


def test_production_code_does_not_import_benchmarks() -> None:
    assert {name for name in importers("ngpt.bench") | importers("tune.bench") if "/bench/" not in name} == set()


def test_there_are_no_import_cycles() -> None:
    modules = {module_name(path) for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        names = [(f"{found.module}.{found.name}", found.module) for found in imports(path)]
        graph[module_name(path)] = {name if name in modules else module for name, module in names} & modules
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_the_command_line_starts_without_heavy_imports() -> None:
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


def test_every_file_has_a_test_file_in_the_mirrored_wing() -> None:
    missing = []
    for name in NAMES.values():
        path = PurePosixPath(name)
        expected = ROOT / "tests" / path.parent / f"test_{path.stem}.py"
        if not (
            path.stem.startswith("__") or path.parts[-2:-1] == ("bench",) or name in UNTESTED or expected.is_file()
        ):
            missing.append(name)
    assert missing == []
    assert set(UNTESTED) <= set(NAMES.values())
    assert all(list((ROOT / "tests").rglob(test)) for test in UNTESTED.values())


def test_the_readme_names_every_wing_and_document_and_stays_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [wing for wing in WINGS if wing != "." and not re.search(rf"^{wing}/ ", text, flags=re.MULTILINE)] == []
    assert len(text.splitlines()) <= README_LINES
    assert [path.name for path in ROOT.glob("docs/*.md") if f"(docs/{path.name}" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_a_document_exists(document: Path) -> None:
    """Links are relative to the document, paths of the repository to its root; a bare file name may be anywhere."""
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", prose) + re.findall(r'src="([^"]+)"', prose)
    missing = [link for link in links if not (document.parent / link).exists()]
    paths = re.findall(r"(?<![\w./-])(?:ngpt|tune|tests|experiments|docs|\.ci)/[\w./-]*[\w/]", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    names = {path.name for folder in ("ngpt", "tune", "tests") for path in (ROOT / folder).rglob("*")}
    files = re.findall(r"(?<![\w./-])\w+\.(?:py|cpp|h)\b", text)
    missing += [name for name in files if name not in names and not (ROOT / name).exists() and name not in EXAMPLES]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_anchor_in_a_document_is_a_heading(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([\w./-]*)#([\w-]+)\)", document.read_text(encoding="utf-8"))
    missing = []
    for file, anchor in links:
        text = (document.parent / file if file else document).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        missing += [] if anchor in slugs else [f"{file}#{anchor}"]
    assert missing == []


def test_every_data_file_of_a_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    files = [path for name in ("ngpt", "tune") for path in (ROOT / name).rglob("*.*") if path.is_file()]
    data = [path for path in files if path.suffix not in (".py", ".pyc")]
    packages = {path: ".".join(path.relative_to(ROOT).parent.parts) for path in data}
    assert len(data) >= 6
    assert [p.name for p in data if not any(p.match(glob) for glob in listed.get(packages[p], []))] == []


def test_every_package_has_a_docstring() -> None:
    packages = {path.parent for path in SOURCES} - {ROOT}
    inits = {package: package / "__init__.py" for package in packages}
    assert [str(package) for package, init in inits.items() if not init.is_file()] == []
    assert [NAMES[init] for init in inits.values() if not ast.get_docstring(ast.parse(init.read_text("utf-8")))] == []


@pytest.mark.parametrize(("module", "names"), PUBLIC.items())
def test_public_imports_work(module: str, names: tuple[str, ...]) -> None:
    imported = importlib.import_module(module)
    assert [name for name in names if not hasattr(imported, name)] == []


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{NAMES[path]}:{node.lineno}: {node.name} has {lines} lines"
        for path in SOURCES
        for node in functions(path)
        if node.end_lineno is not None and (lines := node.end_lineno - node.lineno + 1) > MOST_LINES
    ]
    assert long == []


def test_public_functions_have_docstrings() -> None:
    silent = [
        f"{NAMES[path]}:{node.lineno}: {node.name}"
        for path in SOURCES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert silent == []


def test_every_file_has_a_docstring() -> None:
    trees = {NAMES[path]: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert [name for name, tree in trees.items() if tree.body and not ast.get_docstring(tree)] == []
