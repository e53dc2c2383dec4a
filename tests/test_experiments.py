"""The shipped campaigns: each can be run, and says beforehand what to expect of it."""

import json
import re
from pathlib import Path

import pytest

import run_campaign
from tune.campaign import load_campaign
from tune.planning.plan import preview
from tune.spec.sweeps import BASELINE

EXPERIMENTS = sorted((Path(__file__).parent.parent / "experiments").glob("*.yaml"))
MANY = (
    "baseline",
    "campaign",
    "features",
    "open_questions",
    "optimizers",
    "phase4",
    "seeds39",
)  # trials, also at smoke size
SMOKED = [pytest.param(path, marks=pytest.mark.slow if path.stem in MANY else ()) for path in EXPERIMENTS]
every = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)


def header(path: Path) -> str:
    """The comment that a file starts with."""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return "\n".join(comment)


@every
def test_a_shipped_campaign_loads_and_says_what_it_is_about(path: Path) -> None:
    campaign = load_campaign(path)
    assert campaign.description
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*", campaign.name)


@every
def test_a_shipped_campaign_starts_with_what_it_expects_its_size_and_its_time(path: Path) -> None:
    parts = re.findall(r"^(Expect|Size|Time): \S+", header(path), flags=re.MULTILINE)
    assert parts == ["Expect", "Size", "Time"]
    assert re.search(r"^Time: .*\d+ (s|min|minutes|h|hours)\b", header(path), flags=re.MULTILINE)


@every
def test_the_size_in_the_header_is_the_number_of_trials(path: Path) -> None:
    size = re.search(r"^Size: ([\d,]+) trials\b", header(path), flags=re.MULTILINE)
    assert size
    trials = {trial.trial_id for phase in preview(load_campaign(path)) for trial in phase.trials}
    assert int(size[1].replace(",", "")) == len(trials)


@every
def test_what_a_shipped_campaign_asks_for_needs_no_file_that_is_not_shipped(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?m)^[^#]*(/home/|/root/|/tmp/|/mnt/)", text)


@every
def test_the_arms_of_each_phase_differ_from_its_baseline(path: Path) -> None:
    for phase in preview(load_campaign(path)):
        assert len(phase.arms) >= 2, phase.name


@pytest.mark.parametrize("path", SMOKED, ids=lambda path: path.stem)
def test_a_shipped_campaign_runs_at_smoke_size(path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    local = ["data.corpus=python-docs", "data.tokenizer=sentencepiece:512", "model.vocab_size=null"]
    arguments = [str(path), "--smoke", "--inline", "--json", "--out", str(tmp_path)]
    assert run_campaign.main([*arguments, *(f"--set={setting}" for setting in local)]) == 0, capfd.readouterr().err
    summary = json.loads(capfd.readouterr().out)
    shown = {phase["phase"]: {arm["arm"] for arm in phase["arms"]} for phase in summary["phases"]}
    campaign = load_campaign(path)
    arms = {phase.name: {arm.name for arm in phase.arms} for phase in preview(campaign)}
    assert shown.keys() == arms.keys()
    # Arms that differ in a size alone come out the same and are trained once. Which arm wins, or is better, is chance
    # here: so an arm may be what its phase has inherited, and is the baseline, and any better arms may be joined.
    better = {
        (phase["phase"], arm["arm"])
        for phase in summary["phases"]
        for arm in phase["arms"]
        if arm["verdict"] == "better"
    }
    for phase in campaign.phases:
        expected = arms[phase.name] | ({BASELINE.name} if phase.inherit else set())
        if phase.combine:
            parts = {part for arm in shown[phase.name] - {BASELINE.name} for part in arm.split(" + ")}
            expected, found = {name for source, name in better if source in phase.combine}, parts
        else:
            found = shown[phase.name]
        assert shown[phase.name] and found <= expected, phase.name
