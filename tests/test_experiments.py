"""The shipped campaigns: each loads, runs, and says what it asks, what it costs and how to run it."""

import json
import re
from pathlib import Path

import pytest

import run_campaign
from tune.campaign import load_campaign
from tune.claims.evidence import Evidence
from tune.claims.relations import judge_claims
from tune.planning.plan import preview
from tune.spec.sweeps import BASELINE
from tune.storage.records import TrialOutcome

EXPERIMENTS = sorted((Path(__file__).parent.parent / "experiments").glob("*.yaml"))
LONG = ("baseline", "campaign", "flagship", "open_questions", "seeds39")  # minutes each


def duration(path: Path) -> list[pytest.MarkDecorator]:
    """The marks of a test that runs a campaign."""
    return [pytest.mark.slow] + [pytest.mark.long] * (path.stem in LONG)


SMOKED = [pytest.param(path, marks=duration(path)) for path in EXPERIMENTS]
every = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)


def header(path: Path) -> str:
    """The comment at the start of a file."""
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
def test_a_header_says_what_the_campaign_asks_costs_and_how_to_run_it(path: Path) -> None:
    text = header(path)
    assert 3 <= len(text.splitlines()) <= 10
    assert "?" in text.partition("\n\n")[0]
    assert re.search(r"^Cost: .*\d+ (s|min|minutes|h|hours)\b", text, flags=re.MULTILINE | re.DOTALL)
    assert re.search(rf"^Run: python run_campaign\.py experiments/{path.name}\b", text, flags=re.MULTILINE)


@every
def test_the_cost_in_a_header_is_the_number_of_trials(path: Path) -> None:
    cost = re.search(r"^Cost: ([\d,]+) trials\b", header(path), flags=re.MULTILINE)
    assert cost
    trials = {trial.trial_id for phase in preview(load_campaign(path)) for trial in phase.trials}
    assert int(cost[1].replace(",", "")) == len(trials)


@every
def test_the_settings_in_a_header_are_accepted(path: Path) -> None:
    """Those that need no downloaded file: smaller models and other corpora."""
    settings = re.findall(r"--set ([\w.]+=[\w./:-]+)", header(path))
    local = [setting for setting in settings if not setting.startswith("data.path=") and not setting.endswith(":DIR")]
    assert load_campaign(path, local)


def test_the_sums_of_the_source_reports_that_do_not_hold_are_those_in_the_findings() -> None:
    """Each is a paragraph of docs/findings.md, section "Sums"."""
    sums = [claim for path in EXPERIMENTS for claim in load_campaign(path).claims if claim.relation == "arithmetic"]
    nothing = Evidence([], lambda *_: TrialOutcome("missing", None), "val_loss", "minimize", 0.95, 0.005)
    results = judge_claims(sums, nothing)
    assert {result.id for result in results if result.verdict == "refuted"} == {
        *("18B-tokens", "flops-of-pilot", "five-minutes", "13.7M-parameters", "305-percent", "phase1-loss"),
        *("cumulative-sum", "phase4-steps", "more-than-the-sum", "batch-gain-twice"),
    }


@every
def test_a_shipped_campaign_names_no_file_outside_the_repository(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?m)^[^#]*(/home/|/root/|/tmp/|/mnt/)", text)


@every
def test_the_arms_of_each_phase_differ_from_its_baseline(path: Path) -> None:
    for phase in preview(load_campaign(path)):
        assert len(phase.arms) >= 2, phase.name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised while torch's compiler loads
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
    # At smoke size, arms that differ only in a size are equal and trained once. Which arm is better is chance: an arm
    # may equal what its phase inherits (the baseline), and any better arms may be joined.
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
