"""The page of all settings and the command that searches them."""

from pathlib import Path

import pytest

import run_campaign
from ngpt.config.base import ConfigError
from tune.spec.settings_page import COMMAND, all_settings, find_settings, settings_page, settings_text

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def test_the_page_is_what_the_types_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), f"run: {COMMAND}"


def test_every_setting_has_a_meaning_of_one_sentence() -> None:
    assert [setting.name for setting in all_settings() if not setting.meaning.endswith(".")] == []
    assert len(all_settings()) > 100


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["learning_rate"], {"optim.lr"}),
        (["max-seq-len"], {"model.block_size"}),
        (["optim.lr"], {"optim.lr"}),
        (["LEARNING", "embedding", "head"], {"optim.lr"}),
        (["riemannian"], {"optim.name"}),
        (["gpus"], {"resources.gpus_per_trial"}),
    ],
)
def test_settings_are_found_by_name_choice_meaning_and_words_of_others(words: list[str], names: set[str]) -> None:
    assert {setting.name for setting in find_settings(words)} == names


def test_a_word_of_another_program_is_answered_with_ours() -> None:
    text = settings_text(find_settings(["lazy_proj_freq"]), ["lazy_proj_freq"])
    assert text.splitlines()[:2] == ["lazy_proj_freq is called project_every here", "project_every"]


def test_a_misspelt_word_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="no setting has 'scheduel' in its name or meaning, did you mean 'schedule'"):
        find_settings(["scheduel"])


def test_the_command_prints_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_campaign.main(["settings", "grad_clip"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["optim.grad_clip", "  number or null; default: 1.0"] and len(out) == 3
