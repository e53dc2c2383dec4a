"""The documents: every test, setting, key, option and column that they name exists, and none is missing."""

import importlib
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import run_campaign
from ngpt.config.base import flatten, is_identity, resolve, sections, settings
from ngpt.training.config import TrainConfig
from tune.campaign import load_campaign, top_keys
from tune.claims.relations import RELATIONS
from tune.results.summary import CURVE_COLUMNS
from tune.spec.metrics import BUILT_IN_GOALS
from tune.spec.phase_reader import PHASE_KEYS
from tune.spec.schema import Claim, EarlyStop, Evaluation, Resources

ROOT = Path(__file__).parents[1]
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
FEATURES, CAMPAIGN_FILE, RESULTS = DOCS["features"], DOCS["campaign-file"], DOCS["results"]
TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))
COMMANDS = {
    "ngpt.train": [],
    "ngpt.evaluate": [],
    "ngpt.generate": [],
    "ngpt.inspect": [],
    "ngpt.convert": [],
    "ngpt.downstream.__main__": [],
    "ngpt.serve.__main__": [],
    "ngpt.export.__main__": [],
    "ngpt.push": [],
    "ngpt.data.__main__": [],
    "ngpt.bench.__main__": [],
    "tune.bench.__main__": [],
    "benchmarks.peers": [],
    "benchmarks.gpu": [],
    "benchmarks.generation": [],
    "benchmarks.ranks": [],
    "tests.chaos.__main__": [],
}


def named_tests(text: str) -> set[tuple[str, str]]:
    """File stems and functions: `test_x`, `test_x::test_y` or `tests/folder/test_x.py::test_y`."""
    return set(re.findall(r"`(?:tests/(?:\w+/)*)?(test_\w+)(?:\.py)?(?:::(test_\w+))?`", text))


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, headers included."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def words_in_code(text: str) -> set[str]:
    """Every word inside of backticks or fences."""
    return set(re.findall(r"[\w-]+", " ".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))))


@pytest.mark.parametrize("document", ["features", "reliability", "benchmarks", "SECURITY", "CONTRIBUTING"])
def test_every_test_that_a_document_names_exists(document: str) -> None:
    named = named_tests(DOCS[document])
    assert document not in ("features", "reliability") or len(named) > 50
    sources = {file: "".join(path.read_text("utf-8") for path in TEST_FILES if path.stem == file) for file, _ in named}
    missing = [f"{file}::{test}" for file, test in named if f"def {test or 'test_'}" not in sources[file]]
    assert sorted(missing) == []


def test_every_fault_has_a_row() -> None:
    numbers = [row[0] for row in rows(DOCS["reliability"]) if row[0].startswith("F")]
    found = sorted(int(number) for cell in numbers for number in re.findall(r"F(\d+)", cell))
    assert found == list(range(1, len(found) + 1)) and len(found) >= 57


@pytest.mark.parametrize("document", ["architecture", "CONTRIBUTING"])
def test_every_name_in_a_document_occurs_in_the_code(document: str) -> None:
    """Names in backticks: those with a capital or an underscore, and calls."""
    code = "".join(path.read_text("utf-8") for name in ("ngpt", "tune") for path in (ROOT / name).rglob("*.py"))
    prose = re.sub(r"^```.*?^```", "", DOCS[document], flags=re.MULTILINE | re.DOTALL)
    names = set(re.findall(r"`([A-Z][A-Za-z_]+|[a-z]+_[a-z_]+)(?:\([A-Z]*\))?`", prose))
    assert len(names) > 5
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


def test_the_tables_of_choices_are_in_the_files_that_contributing_names() -> None:
    named = [
        (path, name)
        for row in rows(DOCS["CONTRIBUTING"])
        for path in re.findall(r"`((?:ngpt|tune)/[\w/]+\.py)`", row[1])
        for name in re.findall(r"`([A-Z_]+)`", row[2])
    ]
    assert len(named) >= 8
    assert [pair for pair in named if not re.search(rf"^{pair[1]}\b", (ROOT / pair[0]).read_text("utf-8"), re.M)] == []


@pytest.mark.parametrize(
    "setting", sorted(set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*): ", FEATURES)) - {"data", "model"})
)
def test_every_setting_that_the_features_name_is_one(setting: str) -> None:
    assert resolve(TrainConfig, setting)


def test_every_feature_names_its_source() -> None:
    sources = {row[0]: row[1] for row in rows(FEATURES) if row[1] != "source"}
    assert len(sources) > 45
    allowed = {"000", "001", "002", "003", "004", "paper", "-"}
    assert {part for source in sources.values() for part in source.split(", ")} <= allowed


def test_the_settings_page_lists_every_setting_with_its_default() -> None:
    """A star marks what does not change a trial."""
    defaults = flatten(TrainConfig())
    listed = {
        name: (default.strip("`"), bool(star))
        for cell, default in ((row[0], row[2]) for row in rows(DOCS["settings"]) if len(row) == 4)
        for name, star in re.findall(r"^`([\w.]+)`( \*)?$", cell)
        if name in defaults
    }
    assert listed.keys() == defaults.keys()
    for name, (default, star) in listed.items():
        value = defaults[name]
        read = YAML(typ="safe").load(default)
        assert read == (list(value) if isinstance(value, tuple) else value), name
        assert star != is_identity(TrainConfig, name), name


def test_the_campaign_file_page_names_every_key() -> None:
    keys = {*top_keys(), *PHASE_KEYS, *RELATIONS, *BUILT_IN_GOALS}
    keys |= {*settings(Resources), *settings(EarlyStop), *settings(Evaluation)}
    keys |= {field.name for field in fields(Claim)}
    keys |= {"trials", "hours", "method", "space", "seed", "parallel", "confirm"}  # of `budget:` and `search:`
    assert keys - words_in_code(CAMPAIGN_FILE) == set()


def test_every_example_of_a_campaign_file_can_be_loaded(tmp_path: Path) -> None:
    pages = DOCS["README"] + CAMPAIGN_FILE
    examples = [text for text in re.findall(r"```yaml\n(.*?)```", pages, re.DOTALL) if "campaign:" in text]
    assert len(examples) >= 3
    for text in examples:
        path = tmp_path / "example.yaml"
        path.write_text(text, encoding="utf-8")
        assert load_campaign(path).phases


def test_the_results_page_names_every_column() -> None:
    """The fields are those of a summary that a campaign wrote, and of the curves."""
    summary = json.loads((ROOT / "docs" / "measured" / "phase1" / "summary.json").read_text(encoding="utf-8"))
    phase = summary["phases"][0]
    arm = next(arm for arm in phase["arms"] if arm["delta"])
    known = {*summary, *summary["answer"], *summary["claims"][0], *phase, *phase["noise"], *phase["trials"]}
    known |= {*arm, *arm["delta"], *arm["score"], *CURVE_COLUMNS}
    assert known - words_in_code(RESULTS) == set()


def test_the_commands_page_names_every_option_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    helps = [run_campaign.run_parser().format_help()]
    helps += [run_campaign.verb_parser(verb).format_help() for verb in run_campaign.VERBS]
    for module, sources in COMMANDS.items():
        command = importlib.import_module(module)
        for arguments in [[source, "--help"] for source in sources] or [["--help"]]:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr("sys.argv", [module, *arguments])
                command.main()
            helps.append(capsys.readouterr().out)
    options = {option for text in helps for option in re.findall(r"^  (?:-h, )?(--[\w-]+)", text, flags=re.MULTILINE)}
    assert len(options) > 50
    listed = set(re.findall(r"--[a-z][\w-]+", DOCS["cli"]))
    assert listed ^ options <= {"--help", "--norm_mode"}


def test_every_setting_that_a_command_of_a_document_changes_exists() -> None:
    """`--set NAME=VALUE [NAME=VALUE ...]`; capitals stand for any name."""
    commands = [words for text in DOCS.values() for words in re.findall(r"--set((?:[ \n]+[\w.-]+=[^\s`]+)+)", text)]
    names = {name for words in commands for name in re.findall(r"([\w.-]+)=", words) if not name.isupper()}
    assert len(names) > 15
    for name in names - sections(TrainConfig).keys():
        resolve(TrainConfig, name)  # raises ConfigError for what is not a setting


def test_every_command_of_the_cluster_page_has_the_options_that_it_needs() -> None:
    import ray.scripts.scripts

    lines = re.findall(r"^.*\S.*$", "\n".join(re.findall(r"```bash\n(.*?)```", DOCS["cluster"], re.DOTALL)), re.M)
    seen = set()
    for line in lines:
        words = shlex.split(line, comments=True)
        if not words:  # a comment
            continue
        seen.add(next(word for word in words if "=" not in word))
        scripts = [i for i, word in enumerate(words) if word.endswith(("run_campaign.py", "campaign.sbatch"))]
        if scripts:
            assert (ROOT / words[scripts[0]]).is_file()
            options = run_campaign.run_parser().parse_args(words[scripts[0] + 1 :])
            assert options.campaign == Path("FILE") or (ROOT / options.campaign).is_file()
        if "ray" in words:
            command, words = ray.scripts.scripts.cli, words[words.index("ray") + 1 :]
            while hasattr(command, "commands"):
                command, words = command.commands[words[0]], words[1:]
            known = {option for parameter in command.params for option in parameter.opts}
            own = words[: words.index("--")] if "--" in words else words
            assert {word.split("=")[0] for word in own if word.startswith("--")} <= known, line
    assert seen == {"export", "ray", "python", "uv", "sbatch", "docker", "kubectl"}
