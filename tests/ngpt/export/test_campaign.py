"""What a card says about a trial of a campaign, read from a summary that a campaign wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import ConfigError
from ngpt.export.campaign import best_trial, campaign_facts
from ngpt.export.folder import export_model
from ngpt.training.load_model import find_checkpoint, load_model
from tests.helpers.random_models import random_model, save_model

MEASURED = Path(__file__).parents[3] / "docs" / "measured" / "phase1" / "summary.json"
TRIALS = ("5b9d5bc291-s1", "5b9d5bc291-s2", "5b9d5bc291-s3")  # of the arm that won
LOSSES = (4.93, 4.88, 4.91)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The results of phase 1, with checkpoints of two trials of its winner."""
    root = tmp_path / "phase1"
    for trial in TRIALS[:2]:
        save_model(random_model(), root / "trials" / trial, step=3, steps=5, **{"optim.lr": 0.25, "batch_size": 2})
    shutil.copyfile(MEASURED, root / "summary.json")
    (root / "iterations").mkdir()
    records = [{"trial_id": trial, "metrics": {"val_loss": loss}} for trial, loss in zip(TRIALS, LOSSES, strict=True)]
    (root / "iterations" / "trials.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return root


def changed(results: Path, **changes: Any) -> None:
    path = results / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_facts_of_a_trial_are_those_of_its_arm(results: Path) -> None:
    facts = campaign_facts(find_checkpoint(results / "trials" / TRIALS[0]))
    assert facts is not None
    assert (facts.campaign, facts.metric, facts.commit) == (
        "phase1",
        "val_loss",
        "517dba41c50c76e258f9a8da6ae7ff881f5c2050",
    )
    assert [(each.phase, each.arm, each.verdict, each.trials) for each in facts.verdicts] == [
        ("iterations", "iteration 3", "better", 3)
    ]
    assert campaign_facts(find_checkpoint(save_model(random_model(), results.parent / "run"))) is None


def test_the_card_tells_recipe_data_campaign_and_verdict(results: Path) -> None:
    export_model(load_model(results / "trials" / TRIALS[0]), results.parent / "card-of-it", verify=False)
    card = (results.parent / "card-of-it" / "README.md").read_text(encoding="utf-8")
    for line in (
        "# card-of-it",
        "| steps | 3 of 5 |",
        "| tokens | 144 |",  # 3 steps of 2 sequences of 24
        "| `optim.lr` | `0.25` |",
        "| training tokens in the corpus | 301,966 |",
        "| iterations | iteration 3 | 3 | -4.8167 [-4.8461, -4.7873] | better |",
        "- This folder lacks a tokenizer: the model was trained on token ids.",
    ):
        assert line in card.splitlines()
    assert "**phase1**" in card and "by commit `517dba41c50c76e258f9a8da6ae7ff881f5c2050`" in card
    assert "Use alpha=0.15, logit_scale=10, qk_norm=true" in card


def test_a_results_folder_stands_for_the_best_trial_of_its_winner(results: Path) -> None:
    found = best_trial(results)
    assert found is not None
    assert found[0] == results / "trials" / TRIALS[1]
    assert found[1].endswith("val_loss 4.8800, the best of 2 of iteration 3 in phase iterations")
    changed(results, metric={"name": "val_loss", "goal": "maximize"})
    assert (best_trial(results) or ("", ""))[0] == results / "trials" / TRIALS[0]
    assert best_trial(results / "trials" / TRIALS[0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": []}, "has no finished phase yet: give one of its trials"),
        ({"phases": [3]}, r"summary.json is not the summary of a campaign \(TypeError: "),
    ],
)
def test_a_summary_without_an_answer_is_refused(results: Path, changes: dict[str, Any], message: str) -> None:
    changed(results, **changes)
    with pytest.raises(ConfigError, match=message):
        best_trial(results)


def test_a_damaged_summary_is_refused(results: Path) -> None:
    (results / "summary.json").write_text("[")
    with pytest.raises(ConfigError, match=r"summary\.json is not the summary of a campaign"):
        campaign_facts(find_checkpoint(results / "trials" / TRIALS[0]))
