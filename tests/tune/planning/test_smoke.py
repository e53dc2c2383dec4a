"""`--smoke`: the same phases and arms with small sizes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ngpt.config.base import flatten, override
from tests.helpers import ROOT
from tune.campaign import load_campaign
from tune.planning.plan import preview, trial_tokens
from tune.planning.smoke import shrink_campaign
from tune.spec.schema import Campaign, FreshSeeds

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
BASE = """\
campaign: c
base:
  model: {n_layer: 8, n_head: 6, n_embd: 384, block_size: 512}
  data: {corpus: python-docs, tokenizer: "sentencepiece:4096"}
  schedule: {warmup_steps: 100}
  steps: 5000
  batch_size: 64
  micro_batch_size: 16
"""

Load = Callable[[str], Campaign]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_campaign_can_be_shrunk_and_planned(path: Path) -> None:
    campaign = load_campaign(path)
    small = shrink_campaign(campaign)
    assert [phase.name for phase in small.phases] == [phase.name for phase in campaign.phases]
    for before, after in zip(campaign.phases, small.phases, strict=True):
        assert [(arm.name, arm.inherit) for arm in after.arms] == [(arm.name, arm.inherit) for arm in before.arms]
    for phase in preview(small):
        assert len(phase.seeds) <= 2
        for trial in phase.trials:
            model = trial.config.model
            assert trial_tokens(trial.config) <= 8 * 4 * 32
            assert (model.n_layer, model.block_size) <= (2, 32)
            assert model.n_embd <= 8 * model.n_head * 12
            assert model.vocab_size is not None


def test_only_sizes_are_reduced(load: Load) -> None:
    campaign = load(BASE + "vary: {alpha: [0.1]}\n")
    before, after = flatten(campaign.base), flatten(shrink_campaign(campaign).base)
    assert {name: value for name, value in after.items() if value != before[name]} == {
        "steps": 8,
        "batch_size": 4,
        "micro_batch_size": 1,
        "eval_every": 4,
        "eval_tokens": 256,
        "model.n_layer": 2,
        "model.n_embd": 48,
        "model.block_size": 32,
        "schedule.warmup_steps": 2,
        "data.tokenizer": "sentencepiece:512",
    }


def test_small_values_are_kept(load: Load) -> None:
    text = (
        "campaign: c\nbase: {n_layer: 1, n_head: 2, n_embd: 8, block_size: 16, tokenizer: 'sentencepiece:300', "
        "vocab_size: 300, steps: 3, batch_size: 2, eval_every: 1, eval_tokens: 64}\n"
        "phases:\n  - {name: a, vary: {steps: [2, 20]}, set: {batch_size: 1}, seeds: [7]}\n"
        "  - {name: b, vary: {lr: [1]}, seeds: fresh 5}\n"
    )
    campaign = load(text)
    small = shrink_campaign(campaign)
    assert small.base == override(campaign.base, {"vocab_size": None})  # resolved to 300 all the same
    assert [arm.overrides for arm in small.phases[0].arms] == [{"steps": 2}, {"steps": 8}]
    assert (small.phases[0].pinned, small.phases[0].seeds) == ({"batch_size": 1}, (7,))
    assert small.phases[1].seeds == FreshSeeds(2)


@pytest.mark.parametrize(
    "sweep",
    [
        "grid: {n_head: [2, 4, 6, 12], n_embd: [384, 768]}",
        "vary: {n_head: [8, 16, 24], batch_size: [16, 48, 80], micro_batch_size: [null, 4, 64], n_layer: [1, 30]}",
        "runs: [{arm: wide, n_head: 64, n_embd: 1024}, {arm: odd, n_head: 7, n_embd: 98}]",
        "vary: {tokenizer: ['sentencepiece:512', 'sentencepiece:8192', gpt2]}",
    ],
)
def test_shrunk_arms_are_valid_whichever_sizes_vary(load: Load, sweep: str) -> None:
    small = shrink_campaign(load(BASE + sweep))
    (phase,) = preview(small)
    for trial in phase.trials:
        model = trial.config.model
        assert model.n_embd % (2 * model.n_head) == 0
        assert trial.config.batch_size <= 4 and model.n_layer <= 2


def test_phases_that_vary_dependent_settings_stay_valid(load: Load) -> None:
    phases = "phases:\n  - {name: a, vary: {n_head: [4, 12]}}\n  - {name: b, inherit: a, vary: {n_embd: [768, 96]}}\n"
    small = shrink_campaign(load(BASE + phases))
    widths = {trial.config.model.n_embd for trial in preview(small)[1].trials}
    assert widths == {96}  # 12 heads of width 8


def test_a_shrunk_campaign_with_many_head_counts_is_not_wider_than_the_original(load: Load) -> None:
    sweep = (
        "runs: [{arm: a, n_head: 11, n_embd: 22}, {arm: b, n_head: 13, n_embd: 26}, {arm: c, n_head: 7, n_embd: 14}]"
    )
    for trial in preview(shrink_campaign(load(BASE + sweep)))[0].trials:
        assert trial.config.model.n_embd <= 384
