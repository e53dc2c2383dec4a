"""Campaigns with `evaluation:`: scores become metrics of trials, and trained trials are evaluated from checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ngpt.downstream.bundle import read_bundle
from ngpt.downstream.core import evaluate_core
from ngpt.downstream.evaluate import core_scores
from ngpt.training.load_model import load_model
from tests.helpers.core_bundle import write_bundle
from tests.helpers.tiny_campaign import begun, losses, records, session_on, train_all, write_file
from tune.executors.local import run_inline

PHASES = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
  - name: again
    inherit: alpha
    seeds: [3, 4]
    vary: {project_every: [1, 2]}
"""
EVALUATION = "evaluation: {core: BUNDLE, limit: 4, phases: [again]}\n"


@pytest.fixture
def files(tmp_path: Path, corpus: Path) -> tuple[Path, Path]:
    """A campaign without and with `evaluation:`."""
    bundle = write_bundle(tmp_path / "bundle")
    file = write_file(tmp_path, corpus, phases=PHASES, steps=2, every=2)
    asking = tmp_path / "asking.yaml"
    asking.write_text(file.read_text().replace("seeds: [1, 2]\n", "seeds: [1, 2]\n" + evaluation(bundle), 1))
    return file, asking


def evaluation(bundle: Path) -> str:
    return EVALUATION.replace("BUNDLE", str(bundle))


def scores_of(record: dict[str, Any]) -> dict[str, float]:
    """What the record has of them; a metric that a trial lacks is null."""
    metrics = record["metrics"].items()
    return {name: value for name, value in metrics if name.startswith("core") and value is not None}


def messages_of(file: Path, root: Path) -> list[str]:
    """Trains and evaluates what is missing; returns what the session said."""
    said: list[str] = []
    with session_on(file, root) as session:
        session.message = said.append
        run_inline(begun(session))
        session.end()
    return said


def test_scores_are_metrics_of_the_phase_that_asks_and_change_no_training(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    plain, asking = files
    train_all(plain, tmp_path / "plain")
    summary = train_all(asking, tmp_path / "asking")
    assert losses(tmp_path / "asking") == losses(tmp_path / "plain")  # ids too
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for record in records(tmp_path / "asking"):
        by_phase.setdefault(record["phase"], []).append(record)
    assert all(scores_of(record) == {} for record in by_phase["alpha"])
    bundle = read_bundle(tmp_path / "bundle", limit=4)
    for record in by_phase["again"]:
        folder = tmp_path / "asking" / "trials" / record["trial_id"]
        assert scores_of(record) == pytest.approx(core_scores(evaluate_core(load_model(folder), bundle)))
        about = record["provenance"]["evaluation"]
        assert about["asked"] == {"tasks": [], "limit": 4, "num_fewshot": None, "core": True}
        assert json.loads((folder / "evaluation.json").read_text())["scores"] == scores_of(record)
    arm = summary.phases[-1].arms[0]
    assert {"core", "core_stderr", "core/answers"} <= arm.metrics.keys()
    values = [record["metrics"]["core"] for record in by_phase["again"] if record["arm"] == arm.arm]
    assert arm.metrics["core"].mean == pytest.approx(sum(values) / len(values))


def test_trained_trials_are_evaluated_from_their_checkpoints_and_one_without_is_said(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asking = files
    root = tmp_path / "results"
    train_all(plain, root)
    before = {record["trial_id"]: record for record in records(root) if record["phase"] == "again"}
    lost = min(before)
    shutil.rmtree(root / "trials" / lost / "checkpoints")

    def not_again(*arguments: object, **options: object) -> None:
        pytest.fail("a trial was trained again")

    monkeypatch.setattr("tune.trials.trial.train", not_again)
    said = messages_of(asking, root)
    assert sum("evaluated in" in line for line in said) == 3
    assert [line for line in said if "not evaluated" in line and "has no checkpoints" in line]
    for record in records(root):
        if record["phase"] != "again":
            continue
        old = before[record["trial_id"]]
        assert {name: record[name] for name in ("seconds", "attempt", "started_at", "status")} == {
            name: old[name] for name in ("seconds", "attempt", "started_at", "status")
        }
        assert {name: record["metrics"][name] for name in old["metrics"]} == old["metrics"]
        assert bool(scores_of(record)) == (record["trial_id"] != lost)
        assert ("error" in record["provenance"]["evaluation"]) == (record["trial_id"] == lost)
    # Nothing is left to do but the one that failed, which is tried again.
    assert sum("evaluated" in line for line in messages_of(asking, root)) == 1


def test_trials_that_were_given_other_examples_of_a_task_are_warned_of(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    _, asking = files
    text = asking.read_text()
    asking.write_text(text.replace("seeds: [3, 4]", "seeds: [3]"))
    assert not [line for line in train_all(asking, tmp_path / "out").phases[-1].warnings if "examples" in line]
    tasks = tmp_path / "bundle" / "core.yaml"
    tasks.write_text(tasks.read_text().replace("num_fewshot: [2]", "num_fewshot: [1]"))
    asking.write_text(text)
    (warning,) = [line for line in train_all(asking, tmp_path / "out").phases[-1].warnings if "examples" in line]
    assert warning.startswith("its trials were given different examples or prompts of core/answers: their scores")


@pytest.mark.slow
def test_a_larger_limit_evaluates_again_and_a_score_ranks_the_arms(files: tuple[Path, Path], tmp_path: Path) -> None:
    _, asking = files
    root = tmp_path / "results"
    train_all(asking, root)
    text = asking.read_text().replace("limit: 4, phases: [again]", "limit: 6")
    asking.write_text(text)
    lost = next(record["trial_id"] for record in records(root) if record["phase"] == "again")
    checkpoints = root / "trials" / lost / "checkpoints"
    checkpoints.rename(tmp_path / "checkpoints")
    said = messages_of(asking, root)
    assert sum("evaluated in" in line for line in said) == 7  # the phase alpha has four trials
    assert {r["provenance"]["evaluation"]["asked"]["limit"] for r in records(root)} == {6}
    # A score of four examples does not stand among those of six.
    assert {r["trial_id"] for r in records(root) if not scores_of(r)} == {lost}
    (tmp_path / "checkpoints").rename(checkpoints)
    assert sum("evaluated in" in line for line in messages_of(asking, root)) == 1
    other = tmp_path / "ranked"
    asking.write_text(text.replace("campaign: tiny\n", "campaign: tiny\nmetric: {name: core, goal: maximize}\n"))
    summary = train_all(asking, other)
    arms = summary.phases[0].arms
    means = [arm.metrics["core"].mean for arm in arms]
    assert means == sorted(means, reverse=True)


@pytest.mark.slow
def test_workers_of_ray_evaluate_groups_with_the_harness(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.harness_tasks import OFFLINE, write_tasks
    from tune.campaign import load_campaign
    from tune.launch import launch

    for name, value in {**OFFLINE, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}.items():
        monkeypatch.setenv(name, value)
    tasks = write_tasks(tmp_path / "tasks", n=4)
    phases = "\n  - {name: alpha, vary: {alpha: [0.05, 0.4]}}\n"
    file = write_file(tmp_path, corpus, phases=phases, steps=2, every=2, vectorise=4)
    asked = f"metric: {{name: last_word/perplexity}}\nevaluation: {{tasks: [last_word], include_path: {tasks}}}\n"
    file.write_text(file.read_text().replace("seeds: [1, 2]\n", f"seeds: [1, 2]\n{asked}", 1))
    campaign = load_campaign(file)
    assert campaign.metric.goal == "minimize"
    summary, signal = launch(campaign, tmp_path / "results", command="the same command")
    assert (summary.status, signal) == ("finished", 0)
    found = records(tmp_path / "results")
    assert len(found) == 4 and all(record["metrics"]["last_word/perplexity"] > 1 for record in found)
    assert {record["provenance"]["vectorised"] for record in found} <= {2, 4}
    file.write_text(file.read_text().replace("last_word/perplexity", "last_word/perplexit"))
    with pytest.raises(ValueError, match="lm-eval does not say which last_word/perplexit is better"):
        load_campaign(file)
