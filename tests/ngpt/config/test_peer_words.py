"""Words of other programs: each stands for a setting that exists, and an error says which."""

import pytest

from ngpt.config.base import ConfigError, resolve, settings
from ngpt.config.overrides import named_settings
from ngpt.config.peer_words import NOTES, PEER_WORDS
from ngpt.optim.optimizers import OptimConfig
from ngpt.training.config import TrainConfig
from tune.spec.schema import EarlyStop, Header


def test_every_word_stands_for_a_setting_that_exists() -> None:
    known = {*settings(TrainConfig), *settings(Header), *(f"early_stop.{name}" for name in settings(EarlyStop))}
    assert {word: name for word, name in PEER_WORDS.items() if name not in known} == {}
    assert NOTES.keys() <= PEER_WORDS.keys()


def test_no_word_is_a_setting_of_ours() -> None:
    """It would never be looked up."""
    names = [*settings(TrainConfig), *settings(Header), *settings(EarlyStop)]
    assert {part for name in names for part in name.split(".")} & PEER_WORDS.keys() == set()


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("learning_rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("Learning-Rate", "optim.lr"),
        ("optimizer", "optim.name"),
        ("max_seq_len", "model.block_size"),
        ("lazy_proj_freq", "project_every"),
        ("lr_weights", "optim.lr"),
        ("scalar_alpha", "model.alpha_kind (`scalar`, `vector` or `head`)"),
        ("warmup_ratio", "schedule.warmup_steps (steps, not a share)"),
    ],
)
def test_an_unknown_setting_is_answered_with_ours(word: str, ours: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(TrainConfig, word)
    assert str(caught.value) == f"unknown setting; here it is called {ours}"


def test_a_word_in_the_wrong_section_is_answered_too() -> None:
    _, problems = named_settings(OptimConfig, {"hidden_size": 64}, ("base", "optim"))
    assert [str(problem) for problem in problems] == [
        "base.optim.hidden_size: unknown setting; here it is called model.n_embd"
    ]


def test_a_word_that_nobody_uses_is_not_answered_with_a_list_of_all_settings() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(TrainConfig, "qqqq")
    assert str(caught.value) == "unknown setting; find it with `python run_campaign.py settings WORD`"
