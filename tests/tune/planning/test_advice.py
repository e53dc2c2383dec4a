"""Likely mistakes of arms: each is said once, with the arms that make it."""

from dataclasses import replace
from pathlib import Path

import pytest

from ngpt.config.base import build
from ngpt.data.dataset import open_dataset
from ngpt.training.config import TrainConfig
from tests.helpers.tiny_campaign import write_file
from tune.campaign import load_campaign
from tune.launch import report_advice
from tune.machine.estimate import estimate
from tune.planning.advice import advice_on_arms, advice_on_phases
from tune.planning.plan import preview

GOOD = {"steps": 100, "batch_size": 4, "model.block_size": 32, "eval_tokens": 8192}


def arm(**changes: int) -> TrainConfig:
    return build(TrainConfig, GOOD | {name.replace("__", "."): value for name, value in changes.items()})


def test_a_mistake_of_all_arms_names_none_and_one_of_some_names_them() -> None:
    late = {"schedule__warmup_steps": 100}
    arms = [("p/a", arm(eval_tokens=64)), ("p/b", arm(eval_tokens=64, **late)), ("q/c", arm(eval_tokens=64))]
    few, warmup = advice_on_arms(arms, lambda config: {})
    assert few.startswith("an evaluation scores 64 tokens") and "p/a" not in few
    assert warmup.startswith("the warm-up of 100 steps") and warmup.endswith(" (p/b)")


def test_many_mistakes_are_not_listed_one_by_one() -> None:
    arms = [(f"p/{steps}", arm(steps=steps, schedule__warmup_steps=1000)) for steps in range(101, 121)]
    lines = advice_on_arms(arms, lambda config: {})
    assert len(lines) == 6 and lines[-1] == "15 more like these in other arms"
    assert len(advice_on_arms(arms[:6], lambda config: {})) == 6


def test_what_depends_on_the_corpus_is_said_once_that_is_prepared(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the plan and at the start of the campaign; not by a smoke run, whose settings are not the user's."""
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    campaign = load_campaign(write_file(tmp_path, corpus), ["batch_size=10000"])
    few = "an evaluation scores 128 tokens"
    assert [line.split(":")[0] for line in advice_on_phases(preview(campaign))] == [few]
    tokens = sum(map(len, open_dataset(campaign.base.data).train))
    large = f"a batch has 160,000 tokens, more than the {tokens:,} of the training split"
    planned = estimate(campaign, tmp_path / "results").advice
    assert [line.split(":")[0] for line in planned] == [few, large]
    capsys.readouterr()
    report_advice(campaign)
    assert capsys.readouterr().err.splitlines() == [f"warning: {line}" for line in planned]
    report_advice(replace(campaign, smoke=True))
    assert capsys.readouterr().err == ""
