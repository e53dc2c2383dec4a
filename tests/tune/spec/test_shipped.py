"""The shipped experiments: their list, and copies that load, run anywhere and overwrite nothing."""

import json
import os
import re
from pathlib import Path

import pytest

import run_campaign
from ngpt.config.base import ConfigError
from tests.helpers import ROOT
from tune.campaign import load_campaign
from tune.spec.shipped import Shipped, copy_experiment, find_shipped, missing_file_message, shipped

EXPERIMENTS = ROOT / "experiments"
CAMPAIGNS = [each for each in shipped() if each.is_campaign]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_of_the_experiments_is_listed_with_a_line_about_it() -> None:
    files = {path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("*") if path.is_file()}
    assert {f"{each.name}.yaml" for each in shipped()} == files and len(files) > 20
    for each in shipped():
        assert 10 < len(each.about) < 160 and each.about.isprintable(), each


@pytest.mark.parametrize("chosen", CAMPAIGNS, ids=lambda chosen: chosen.name)
def test_a_copy_names_files_that_were_copied_with_it(chosen: Shipped) -> None:
    first, *others = copy_experiment(chosen, None)
    assert first == Path(f"{chosen.name}.yaml")
    text = first.read_text(encoding="utf-8")
    assert "experiments/" not in "".join(re.findall(r"^#.*(?:--set|Run:).*", text, flags=re.M))
    assert all(Path(path).is_file() for path in re.findall(r"[\w./-]*models/[\w.-]+\.yaml", text))
    assert {path.name for path in others} == {Path(path).name for path in re.findall(r"models/[\w.-]+\.yaml", text)}


def test_a_copy_is_the_same_campaign() -> None:
    chosen = find_shipped("phase3")
    copy, original = load_campaign(copy_experiment(chosen, Path("mine"))[0]), load_campaign(chosen.path)
    assert (copy.name, copy.base, copy.phases) == (original.name, original.base, original.phases)


@pytest.mark.parametrize(
    ("out", "name"), [("mine.yaml", "mine"), ("folder", "quickstart"), ("my own.yaml", "quickstart")]
)
def test_a_copy_under_another_file_name_is_a_campaign_of_that_name(out: str, name: str) -> None:
    chosen = find_shipped("quickstart")
    copy = load_campaign(copy_experiment(chosen, Path(out))[0])
    assert (copy.name, copy.phases) == (name, load_campaign(chosen.path).phases)


def test_two_experiments_share_the_model_that_both_name(folder: Path) -> None:
    first, second = (copy_experiment(find_shipped(name), None) for name in ("phase2", "phase3"))
    assert set(first) & set(second) == {Path("models/1.3M.yaml")}


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (None, "quickstart.yaml"),
        ("mine.yaml", "mine.yaml"),
        ("here", "here/quickstart.yaml"),
        ("new/folder", "new/folder/quickstart.yaml"),
        ("new/mine.yml", "new/mine.yml"),
    ],
)
def test_out_is_a_file_or_a_folder(out: str | None, expected: str) -> None:
    Path("here").mkdir()
    chosen = find_shipped("quickstart")
    assert copy_experiment(chosen, out and Path(out)) == [Path(expected)]
    assert f"Run: python run_campaign.py {expected}\n" in Path(expected).read_text(encoding="utf-8")


@pytest.mark.parametrize("existing", ["phase2.yaml", "models/30.5M.yaml", "phase2.yaml link"])
def test_a_file_that_exists_is_not_overwritten_and_then_nothing_is_written(existing: str, folder: Path) -> None:
    path = Path(existing.partition(" ")[0])
    path.parent.mkdir(exist_ok=True)
    if " " in existing:
        path.symlink_to("nowhere")
    else:
        path.write_text("mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=f"{path} exists already and is not overwritten"):
        copy_experiment(find_shipped("phase2"), None)
    assert sorted(folder.rglob("*")) == before and (os.path.islink(path) or path.read_text() == "mine")


def test_a_file_of_another_kind_is_not_taken_for_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "notes.txt").write_text("mine")
    assert run_campaign.main(["new", "quickstart", "--out", "notes.txt"]) == 2
    said = "notes.txt is not a folder; give --out a folder, or a new file that ends in .yaml\n"
    assert capsys.readouterr().err == said and (folder / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_an_io_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("")
    assert run_campaign.main(["new", "quickstart", "--out", "file/below"]) == 74
    assert capsys.readouterr().err.startswith("file/below: ")


def test_new_prints_the_file_and_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_campaign.main(["new", "experiments/quickstart.yaml", "--out", "a b.yaml"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("a b.yaml\n", "next: python run_campaign.py 'a b.yaml' --plan\n")
    assert run_campaign.main(["new", "models/1.3M", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == (["models/1.3M.yaml"], "")


def test_without_a_name_new_lists_what_there_is(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run_campaign.main(["new"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [each.name for each in shipped()] and err == ""
    assert run_campaign.main(["new", "--json"]) == 0
    assert {"name", "path", "about"} <= json.loads(capsys.readouterr().out)[0].keys()
    assert list(folder.iterdir()) == []


def test_an_unknown_name_is_answered_with_the_list_and_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_campaign.main(["new", "quikstart"]) == 2
    out, err = capsys.readouterr()
    *listed, last = err.splitlines()
    assert out == "" and last == "unknown experiment 'quikstart', did you mean 'quickstart'?"
    assert any(line.startswith("quickstart ") for line in listed)


def test_a_missing_campaign_file_is_answered_with_the_nearest_one() -> None:
    assert missing_file_message(Path("nothing-like-it.yaml")) is None
    message = missing_file_message(Path("quikstart.yaml"))
    assert (
        message == "quikstart.yaml: no such file, `python run_campaign.py new quickstart` copies the shipped experiment"
    )
    Path("experiments").mkdir()
    Path("experiments/quickstart.yaml").touch()
    message = missing_file_message(Path("quikstart.yaml"))
    assert message == "quikstart.yaml: no such file, did you mean 'experiments/quickstart.yaml'?"
    Path("quickstart.yml").touch()
    assert (
        missing_file_message(Path("quikstart.yaml")) == "quikstart.yaml: no such file, did you mean 'quickstart.yml'?"
    )
    assert missing_file_message(Path("no/such/quickstart.yaml")) is not None
