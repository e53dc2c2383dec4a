"""The simulated loops and chains: small versions of the limits that docs/statistics-seeds.md states."""

import numpy as np
import pytest
import scipy.stats

from tune.analysis.noise import compare_arms
from tune.analysis.readings import NoisePrior
from tune.bench import confirmations as bench


def test_the_vectorised_confirmation_judges_as_compare_arms_does() -> None:
    rng = np.random.default_rng(2)
    pairs = rng.normal(-1.0, 1.0, (40, 4)) * rng.choice([0.3, 1.0, 8.0], (40, 1))
    for level in (0.05, 0.01):
        for prior in (None, NoisePrior(5.0, 1.5)):
            arrays = prior and (np.full(40, prior.df), np.full(40, prior.variance))
            expected = []
            for row in pairs:
                values = {"base": dict.fromkeys(range(4), 0.0), "arm": dict(enumerate(row.tolist()))}
                contrast = compare_arms(values, "base", prior=prior).contrasts["arm"]
                expected.append(contrast.p < level and contrast.difference < 0)
            assert bench.is_confirmed(pairs, level, arrays).tolist() == expected


def test_a_confirmation_without_a_prior_is_students_paired_test() -> None:
    pairs = np.random.default_rng(3).normal(-0.8, 1.0, (50, 5))
    p = scipy.stats.ttest_1samp(pairs, 0.0, axis=1, alternative="less").pvalue
    assert bench.is_confirmed(pairs, 0.05).tolist() == (p < 0.025).tolist()


def test_holms_correction_of_an_example_by_hand() -> None:
    # sorted 0.01 0.02 0.03 0.5: times 4 3 2 1 is 0.04 0.06 0.06 0.5
    p = np.array([[0.03, 0.01, 0.5, 0.02], [0.9, 0.9, 0.9, 0.9]])
    assert bench.holm(p) == pytest.approx(np.array([[0.06, 0.04, 0.5, 0.06], [1.0, 1.0, 1.0, 1.0]]))


def test_editing_and_confirming_again_rarely_ends_in_a_false_confirmation() -> None:
    found = bench.edit_and_confirm(600, np.random.default_rng(5))
    assert found["false_confirmation_same_seeds_20_edits"] > 0.2
    assert found["false_confirmation_fresh_and_counted_20_edits"] < 0.065  # 0.041 with 4000 rounds
    assert found["false_confirmation_with_borrowed_noise_20_edits"] < 0.05


def test_a_baseline_on_other_seeds_brings_no_luck_along() -> None:
    found = bench.inherited_luck(1200, np.random.default_rng(6))
    assert found["false_worse_same_trials"] > 0.045
    assert found["false_worse_other_seeds"] < 0.02


def test_a_search_that_is_confirmed_hands_on_nearly_the_best_and_hardly_ever_something_worse() -> None:
    found = bench.handed_on(600, np.random.default_rng(8))
    for world in bench.DRAWS:
        rules = {rule: found[f"handed_on_{world}_{rule}"] for rule in ("better", "best_mean", "confirmed", "oracle")}
        assert rules["confirmed"] < max(0.6 * rules["oracle"], rules["oracle"] + 0.05), (world, rules)
        assert rules["confirmed"] <= rules["better"] + 0.05, (world, rules)
    assert found["handed_on_much_worse_best_mean"] > 0.1, "the lowest mean alone is a gamble"


def test_the_shrunken_estimate_of_a_winner_is_nearly_unbiased() -> None:
    found = bench.winners_estimates(400, np.random.default_rng(7))
    for name, error in found.items():
        assert error < -0.7 if name.endswith("observed") else abs(error) < 0.25, name
