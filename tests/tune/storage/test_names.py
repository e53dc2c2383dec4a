"""Names of phases and trials never leave the results directory, and never are those of its files."""

from pathlib import Path

import pytest

from tests.helpers.tiny_campaign import train_all, write_file
from tune.storage.names import NAME, RESERVED, RESERVED_BESIDE, folder_problem


@pytest.mark.parametrize("name", ["alpha", "0123456789-s1", "a.b_c-d", "A" * 100, "report", "trials.jsonl", "seeds"])
def test_a_usual_name_is_a_folder(name: str) -> None:
    assert folder_problem(name, is_phase=True) is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "~", "-a", ".a", "a..b", "a b", "a\n", "a\0", "ä", "a" * 101]
)
def test_other_names_are_not(name: str) -> None:
    assert "a name has 1 to 100 letters" in (folder_problem(name) or "")


def test_no_file_or_folder_of_the_results_can_be_the_name_of_a_phase(
    tmp_path: Path, corpus: Path, no_report: None
) -> None:
    phases = "\n  - name: alpha\n    vary: {alpha: [0.05]}\n"
    train_all(write_file(tmp_path, corpus, phases=phases, seeds="[1]"), tmp_path / "r" / "tiny")
    names = {path.name for path in (tmp_path / "r" / "tiny").iterdir()} - {"alpha"}
    names |= {"report.html", "report.md", "journal.torn", "campaign.pid", "discarded"}
    assert {"derived.json", "campaign.lock", "manifest.json", "trials"} <= names
    for name in names:
        assert RESERVED.fullmatch(name) and RESERVED.fullmatch(name.upper()), name
    beside = {path.name for path in (tmp_path / "r").iterdir()} - {"tiny"}
    assert beside and all(RESERVED_BESIDE.fullmatch(name) for name in beside if NAME.fullmatch(name))
