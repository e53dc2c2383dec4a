"""The standard error that the choice of the evaluation text adds, held against a bootstrap over its blocks."""

import numpy as np
import pytest

from tune.analysis.text_error import text_standard_error


def text(nats: np.ndarray, tokens: np.ndarray) -> dict[str, list[float]]:
    return {"kind": "documents", "tokens": tokens.tolist(), "nats": nats.tolist()}


def test_it_is_what_a_paired_bootstrap_over_blocks_gives() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(100, 400, 64)
    base = [tokens * rng.normal(5, 0.8, 64) for _ in range(3)]
    arm = [nats + tokens * rng.normal(-0.03, 0.05, 64) for nats in base]
    draws = rng.integers(64, size=(20_000, 64))
    difference = np.mean(arm, 0) - np.mean(base, 0)
    expected = (difference[draws].sum(1) / tokens[draws].sum(1)).std()
    found = text_standard_error([text(x, tokens) for x in arm], [text(x, tokens) for x in base])
    assert found == pytest.approx(expected, rel=0.03)


def test_with_blocks_of_one_size_it_is_the_standard_error_of_a_mean() -> None:
    rng = np.random.default_rng(4)
    tokens, base, arm = np.full(50, 10), rng.normal(50, 5, 50), rng.normal(49, 5, 50)
    found = text_standard_error([text(arm, tokens)], [text(base, tokens)])
    assert found == pytest.approx(((arm - base) / 10).std(ddof=1) / np.sqrt(50))


def test_arms_on_other_blocks_few_blocks_or_none_have_no_such_error() -> None:
    one, two = text(np.arange(8.0), np.full(8, 3)), text(np.arange(8.0), np.full(8, 4))
    short = text(np.arange(4.0), np.full(4, 3))
    assert text_standard_error([one], [two]) is None
    assert text_standard_error([one], []) is None
    assert text_standard_error([short], [short]) is None
    assert text_standard_error([one], [one]) == 0
