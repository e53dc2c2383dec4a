"""The documents: what they name is there."""

import re
from pathlib import Path

import pytest

from ngpt.config.base import resolve, settings
from ngpt.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
FEATURES = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")


def test_every_test_that_the_features_rest_on_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", FEATURES))
    assert len(named) > 50
    missing = [
        f"{file}::{test}"
        for file, test in sorted(named)
        if not (ROOT / file).is_file() or f"def {test}" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_every_fault_has_a_line_and_every_test_that_shows_one_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1] for line in text.splitlines() if line.startswith("| F")]
    assert sorted(int(number) for line in lines for number in re.findall(r"F(\d+)", line)) == list(range(1, 51))
    named = set(re.findall(r"`(test_\w+)(?:::(test_\w+))?`", text))
    assert len(named) > 60
    missing = [
        f"{file}::{test}"
        for file, test in sorted(named)
        if not any(f"def {test}" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(f"{file}.py"))
    ]
    assert missing == []


@pytest.mark.parametrize(
    "setting", sorted(set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*): ", FEATURES)) - {"data", "model"})
)
def test_every_setting_that_the_features_name_is_one(setting: str) -> None:
    assert resolve(TrainConfig, setting)


def test_every_setting_is_named_in_a_document() -> None:
    """The names of a run are set by the campaign; nobody else writes them."""
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.yaml")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in files)))
    unnamed = {name for name in settings(TrainConfig) if name.rpartition(".")[2] not in words}
    assert unnamed <= {"tracker.job_type", "tracker.run_name"}


def test_every_feature_says_which_seed_asked_for_it() -> None:
    rows = [line.split(" | ") for line in FEATURES.splitlines() if line.startswith("| ") and "---" not in line]
    seeds = {row[0]: row[1] for row in rows if row[1] != "seed"}
    assert len(seeds) > 45
    assert {part for seed in seeds.values() for part in seed.split(", ")} <= {
        "000",
        "001",
        "002",
        "003",
        "004",
        "paper",
        "-",
    }
