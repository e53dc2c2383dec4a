"""Settings that are likely to be a mistake get one sentence each; the usual ones get none."""

import pytest

from ngpt.config.base import build
from ngpt.runs.advice import advice
from ngpt.training.config import TrainConfig

USUAL = {"steps": 100, "batch_size": 4, "model.block_size": 32, "eval_tokens": 8192, "schedule.warmup_steps": 10}


@pytest.mark.parametrize(
    ("changes", "train_tokens", "eval_tokens", "sentences"),
    [
        ({}, 3_200, 8_192, []),
        ({}, None, None, []),
        (
            {"schedule.warmup_steps": 2000},
            None,
            None,
            ["the warm-up of 2,000 steps is not shorter than the run of 100"],
        ),
        ({"schedule.warmup_steps": 99}, None, None, []),
        ({}, 3_199, None, ["the run reads its 3,199 training tokens 4.0 times"]),
        ({}, 100, None, ["a batch has 128 tokens, more than the 100 of the training split"]),
        ({"eval_tokens": 4_999}, None, None, ["an evaluation scores 4,999 tokens"]),
        ({}, None, 992, ["an evaluation scores 992 tokens"]),
    ],
)
def test_each_mistake_has_one_sentence(
    changes: dict[str, int], train_tokens: int | None, eval_tokens: int | None, sentences: list[str]
) -> None:
    config = build(TrainConfig, USUAL | changes)
    found = list(advice(config, train_tokens=train_tokens, eval_tokens=eval_tokens))
    assert [text.split(":")[0] for text in found] == sentences


def test_a_sample_of_tokens_that_nothing_decodes_is_no_text() -> None:
    config = build(TrainConfig, USUAL | {"tracker.sample_tokens": 9})
    assert list(advice(config, has_tokenizer=True)) == list(advice(config)) == []
    (text,) = advice(config, has_tokenizer=False)
    assert text == "tracker.sample_tokens has no effect: no tokenizer decodes the tokens of this corpus"
