"""The structure of the code: import order, reserved packages, start-up imports, test files and documents."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("ngpt/**/*.py"), *ROOT.glob("tune/**/*.py"), ROOT / "run_campaign.py"])
NAMES = {path: path.relative_to(ROOT).as_posix() for path in SOURCES}

# The wings, bottom first: a file imports from its own wing and from those before it.
WINGS = (
    *("ngpt/code", "ngpt/config", "ngpt/plugins", "ngpt/system", "ngpt/data/text", "ngpt/data/tokens", "ngpt/data"),
    "ngpt/kernels",
    *(
        "ngpt/model",
        "ngpt/generation",
        "ngpt/optim",
        "ngpt/distributed",
        "ngpt/trackers",
        "ngpt/training",
        "ngpt/sizing",
        "ngpt/ensemble",
        "ngpt/runs",
        "ngpt/conversion",
        "ngpt/downstream",
        "ngpt/export",
        "ngpt",
        "ngpt/serve",
        "ngpt/bench",
    ),
    *("tune/storage", "tune/trials", "tune/spec", "tune/analysis", "tune/claims", "tune/planning", "tune/report"),
    *("tune/machine", "tune/results", "tune/terminal", "tune/remote", "tune/session", "tune/cluster", "tune/ranks"),
    *("tune/executors", "tune", "tune/bench", "."),
)
FRONTS = ("ngpt", "tune")  # import their public names when these are first used
LEAF = "tune/format.py"  # imports no wing of tune, so every one of them may use it
MOST_FILES = 14  # in a wing

# Packages that only these files import.
RESERVED = {
    "ray": {
        f"tune/{name}.py"
        for name in (
            *("cluster/connection", "cluster/node_checks", "cluster/relay", "executors/ray_cluster"),
            *("executors/ray_executor", "executors/ray_nodes", "executors/ray_storage", "executors/ray_trainable"),
            "executors/warm_workers",
            "ranks/actors",
        )
    },
    "wandb": {"ngpt/trackers/wandb_run.py"},
    "torch.utils.tensorboard": {"ngpt/trackers/tensorboard_run.py"},
    "mlflow": {"ngpt/trackers/mlflow_run.py"},
    "trackio": {"ngpt/trackers/trackio_run.py"},
    "sentencepiece": {"ngpt/data/tokens/tokenizer.py", "ngpt/export/tokenizer_files.py"},
    "tiktoken": {"ngpt/data/tokens/gpt2_bpe.py", "ngpt/data/tokens/tiktoken_bpe.py"},
    "tokenizers": {"ngpt/data/tokens/hf_tokenizer.py", "ngpt/export/tokenizer_files.py"},
    "uvicorn": {"ngpt/serve/server.py"},
    "starlette": {f"ngpt/serve/{name}.py" for name in ("access", "app", "delivery")},
    "prometheus_client": {"ngpt/serve/metrics.py"},
    "huggingface_hub": {"ngpt/data/text/hub.py", "ngpt/export/upload.py"},
    "transformers": {f"ngpt/export/{name}.py" for name in ("families", "folder", "modeling_ngpt", "tokenizer_files")},
    "optuna": {"tune/planning/optuna_search.py"},
    "lm_eval": {f"ngpt/downstream/{name}.py" for name in ("__main__", "harness", "harness_model")},
}
# Files without a test file of their own, and the tests that cover them.
UNTESTED: dict[str, str] = {
    "ngpt/code/plugins.py": "test_load.py",
    "ngpt/plugins/tables.py": "test_load.py",
    "ngpt/conversion/exported.py": "test_folder.py",
    "ngpt/conversion/layout.py": "test_convert.py",
    "ngpt/conversion/official.py": "test_convert.py",
    "ngpt/conversion/own.py": "test_shards.py",
    "ngpt/data/tokens/gpt2_bpe.py": "test_tokenizer.py",
    "ngpt/export/card.py": "test_campaign.py",
    "ngpt/export/modeling_ngpt.py": "test_families.py",
    "ngpt/export/upload.py": "test_push.py",
    "ngpt/distributed/data_parallel.py": "test_strategies.py",
    "ngpt/distributed/join.py": "test_launch.py",
    "ngpt/distributed/orthogonalization.py": "test_strategies.py",
    "ngpt/distributed/ranks.py": "test_launch.py",
    "ngpt/distributed/replica.py": "test_strategies.py",
    "ngpt/distributed/sharded.py": "test_strategies.py",
    "ngpt/data/manifest.py": "test_dataset.py",
    "ngpt/generation/cache.py": "test_batch.py",
    "ngpt/generation/contexts.py": "test_batch.py",
    "ngpt/generation/decoding_model.py": "test_batch.py",
    "ngpt/generation/plain.py": "test_generate.py",
    "ngpt/generation/sampling.py": "test_generate.py",
    "ngpt/generation/text.py": "test_generate.py",
    "ngpt/data/shard_index.py": "test_dataset.py",
    "ngpt/downstream/bundle.py": "test_core.py",
    "ngpt/downstream/config.py": "test_harness.py",
    "ngpt/downstream/evaluate.py": "test_harness.py",
    "ngpt/model/config.py": "test_gpt.py",
    "ngpt/model/layers.py": "test_gpt.py",
    "ngpt/optim/batching.py": "test_muon.py",
    **{f"ngpt/serve/{name}.py": "test_server.py" for name in ("access", "app", "delivery", "engine", "metrics")},
    **{f"ngpt/serve/{name}.py": "test_openai_client.py" for name in ("answers", "scheduler", "schema", "work")},
    "ngpt/trackers/base.py": "test_tracker.py",
    "ngpt/trackers/open.py": "test_tracker.py",
    "ngpt/trackers/run_id.py": "test_mlflow_run.py",
    "ngpt/trackers/sender.py": "test_mlflow_run.py",
    "ngpt/trackers/server.py": "test_wandb_run.py",
    "ngpt/sizing/hardware.py": "test_step_time.py",
    "ngpt/sizing/table.py": "test_step_time.py",
    "ngpt/training/state.py": "test_recovery.py",
    "tune/storage/event_fields.py": "test_events.py",
    "tune/storage/records.py": "test_state.py",
    "tune/spec/schema.py": "test_campaign.py",
    "tune/spec/phase_reader.py": "test_campaign.py",
    "tune/spec/validation.py": "test_campaign.py",
    "tune/spec/reading.py": "test_campaign.py",
    "tune/spec/seeds.py": "test_campaign.py",
    "tune/claims/evidence.py": "test_relations.py",
    "tune/claims/possible_arms.py": "test_reader.py",
    "tune/claims/selectors.py": "test_relations.py",
    "tune/analysis/alpha_spending.py": "test_sequential.py",
    "tune/analysis/readings.py": "test_noise.py",
    "tune/analysis/variances.py": "test_noise.py",
    "tune/campaign_rows.py": "test_campaign_pages.py",
    "tune/report/figures.py": "test_html.py",
    "tune/report/markdown.py": "test_html.py",
    "tune/results/answer.py": "test_summary.py",
    "tune/results/comparability.py": "test_compare.py",
    "tune/results/phase_summary.py": "test_summary.py",
    "tune/results/phase_warnings.py": "test_summary.py",
    "tune/results/snapshot.py": "test_status.py",
    "tune/terminal/final_screen.py": "test_live.py",
    "tune/terminal/plan_view.py": "test_estimate.py",
    "tune/session/code_versions.py": "test_code_changes.py",
    "tune/session/discarded.py": "test_code_changes.py",
    **{f"tune/session/{name}.py": "test_session.py" for name in ("executor_info", "outcomes", "phase_tracker")},
    "tune/session/start_record.py": "test_session.py",
    "tune/session/trial_config.py": "test_session.py",
    "tune/executors/ray_cluster.py": "test_ray_executor.py",
    "tune/executors/ray_process.py": "test_ray_supervisor.py",
    "tune/session/remote.py": "test_ray_supervisor.py",
    "tune/bench/campaigns.py": "test_bench.py",
    "tune/bench/sequential.py": "test_bench.py",
    "tune/ranks/rank.py": "test_processes.py",
    "tune/trials/folder_lock.py": "test_ray_trainable.py",
    "tune/rows.py": "test_campaign_results.py",
    "tune/verbs.py": "test_run_campaign.py",
}
MOST_LINES = 60  # of a function
README_LINES = 150
# The imports that CHANGELOG.md promises to keep.
PUBLIC = {
    "ngpt": ("GPT", "ModelConfig", "TrainConfig", "generate", "load_model", "train"),
    "ngpt.model": ("GPT", "ModelConfig"),
    "ngpt.train": ("TrainConfig", "train"),
    "ngpt.convert": ("from_nvidia_ngpt", "from_nanochat"),
    "tune": ("load_campaign", "plan", "run", "load_results", "compare", "judge"),
}
DOCUMENTS = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = {
    "changes.py",
    "facts.py",
    "lab.py",
    "mine.py",
    "model.py",
    "other.py",
}  # files that documents show, or that other projects have


class Import(NamedTuple):
    """`import module`, or `from module import name`; `bound` is the name that it gets here."""

    module: str
    name: str | None
    bound: str
    line: int


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> list[Import]:
    return list(found_imports(path))


def found_imports(path: Path) -> Iterator[Import]:
    for node in ast.walk(tree(path)):
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
    for node in ast.walk(tree(path)):
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
        for node in ast.walk(tree(path))
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


def test_no_campaign_exports_or_uploads() -> None:
    assert {name for name in importers("ngpt.export") | importers("ngpt.push") if not name.startswith("ngpt/")} == set()


def test_there_are_no_import_cycles() -> None:
    modules = {module_name(path) for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        if module_name(path) in FRONTS:
            continue
        names = [(f"{found.module}.{found.name}", found.module) for found in imports(path)]
        graph[module_name(path)] = {name if name in modules else module for name, module in names} & modules
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_the_command_line_starts_without_heavy_imports() -> None:
    trackers = ("wandb", "tensorboard", "mlflow", "trackio")
    heavy = ("torch", "ray", "pyarrow", "plotly", "scipy", "sentencepiece", "pandas", *trackers)
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
    listed = [wing for wing in WINGS if wing != "." and not wing.startswith("ngpt/data/")]  # its parts are on its line
    assert [wing for wing in listed if not re.search(rf"^{wing}/ ", text, flags=re.MULTILINE)] == []
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
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node)
        if "overload" not in map(ast.unparse, node.decorator_list)
    ]
    assert silent == []


def test_every_file_has_a_docstring() -> None:
    trees = {NAMES[path]: tree(path) for path in SOURCES}
    assert [name for name, module in trees.items() if module.body and not ast.get_docstring(module)] == []
