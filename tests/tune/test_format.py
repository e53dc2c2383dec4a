"""Numbers and names as people read them."""

from math import sqrt
from typing import Any

import pytest
from scipy.stats import nct, t

from tune import format as fmt
from tune.report.wording import next_step


def test_losses_have_four_decimals_and_a_real_minus() -> None:
    assert fmt.number(4.32111) == "4.3211"
    assert fmt.number(-0.5) == f"{fmt.MINUS}0.5000"
    assert fmt.number(-0.00001) == "0.0000"
    assert fmt.number(None) == fmt.MISSING


def test_differences_carry_their_sign_unless_they_round_to_zero() -> None:
    assert fmt.signed(0.0123) == "+0.0123"
    assert fmt.signed(-0.0123) == f"{fmt.MINUS}0.0123"
    assert fmt.signed(0.00001) == "0.0000"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (812, "812"),
        (999.7, "1.00k"),
        (12_345, "12.3k"),
        (999_950, "1.00M"),
        (4_194_304, "4.19M"),
        (1.2e9, "1.20B"),
        (62_914_560, "62.9M"),
        (193_000_000, "193M"),
        (None, fmt.MISSING),
    ],
)
def test_counts_have_three_digits(value: float | None, text: str) -> None:
    assert fmt.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.12, "4.1 s"),
        (59.97, "1 m 00 s"),
        (83, "1 m 23 s"),
        (3599.7, "1 h 00 m"),
        (7500, "2 h 05 m"),
        (273_600, "3 d 4 h"),
        (-1, "0.0 s"),
        (None, fmt.MISSING),
    ],
)
def test_durations_have_two_units(seconds: float | None, text: str) -> None:
    assert fmt.duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.12, "4 s"), (59.4, "59 s"), (59.6, "1 m 00 s"), (-1, "0 s")])
def test_durations_that_go_by_have_whole_seconds(seconds: float, text: str) -> None:
    assert fmt.duration(seconds, tenths=False) == text


def test_small_p_values_are_only_small() -> None:
    assert [fmt.p_value(p) for p in (0.0, 0.0234, 0.5, None)] == ["<0.001", "0.023", "0.50", fmt.MISSING]


def test_settings_are_written_as_in_the_yaml() -> None:
    overrides = {"a": True, "b": None, "c": 0.0003, "d": [0.9, 0.95], "e": "vector", "f": 7, "g": {"h": 1e-05}}
    assert fmt.settings(overrides) == "a=true, b=null, c=0.0003, d=[0.9, 0.95], e=vector, f=7, g={h=1e-05}"
    assert fmt.settings({}) == fmt.MISSING and fmt.value({}) == "{}"


def test_plain_text_has_no_escapes_controls_or_second_line() -> None:
    assert fmt.plain("\x1b[31mred\x1b[0m") == "red"
    assert fmt.plain("\x1b]0;title\x07x\x1b]8;;http://a\x1b\\link") == "xlink"
    assert fmt.plain("a\r\n\tb\x00\x9b31m") == "a b31m"
    assert fmt.plain("\u202eevil\u200b\ud800") == "evil"
    assert fmt.plain("[red]x[/]") == "[red]x[/]"


def test_long_names_lose_their_middle() -> None:
    assert fmt.shorten("alpha=0.15", 10) == "alpha=0.15"
    assert fmt.shorten("project_every=10, alpha_kind=vector", 15) == "project…=vector"
    assert len(fmt.shorten("x" * 50, 12)) == 12


def test_interval_is_written_only_where_there_is_one() -> None:
    spread = {"mean": 4.3, "sd": 0.1, "ci_low": 4.2, "ci_high": 4.4}
    assert fmt.mean_interval(spread) == "4.3000 ± 0.1000"
    assert fmt.mean_interval(spread | {"ci_low": None}) == "4.3000"
    assert fmt.mean_interval(None) == fmt.MISSING
    assert fmt.effect({"mean": 0.1, "ci_low": None, "ci_high": None}) == "+0.1000"
    assert fmt.effect({"mean": 0.1, "ci_low": -0.1, "ci_high": 0.3}) == f"+0.1000 [{fmt.MINUS}0.1000, +0.3000]"
    assert fmt.effect(None) == fmt.MISSING


def test_pictures_of_intervals_share_a_scale_and_the_zero() -> None:
    arms = [
        {"verdict": "better", "delta": {"mean": -0.2, "ci_low": -0.3, "ci_high": -0.1}},
        {"verdict": "baseline", "delta": None},
        {"verdict": "diverged", "delta": None},
        {"verdict": "worse", "delta": {"mean": 0.1, "ci_low": None, "ci_high": None}},
    ]
    assert fmt.forest(arms, 9) == ["──●── │  ", "      ●  ", "      │  ", "      │ ●"]
    assert fmt.forest(arms[1:3], 5) == [" " * 5, " " * 5]


def test_names_are_joined_like_a_sentence() -> None:
    assert fmt.listing([]) == ""
    assert fmt.listing(["a"]) == "a"
    assert fmt.listing("abc") == "a, b and c"
    assert fmt.listing("abcdefgh") == "a, b, c, d, e, f and 2 more"
    assert fmt.listing(["a=1, b=2", "a=3, b=4", "c"]) == "a=1, b=2; a=3, b=4 and c"


def test_trials_are_listed_only_when_something_is_unusual() -> None:
    counts = {"total": 15, "finished": 15, "diverged": 0, "failed": 0, "stopped": 0, "reused": 0}
    assert fmt.trial_counts(counts) == "15 trials"
    assert fmt.trial_counts(counts | {"finished": 14, "diverged": 1}) == "15 trials (14 finished, 1 diverged)"
    assert fmt.trial_counts(counts | {"reused": 4}) == "15 trials (4 reused)"
    assert fmt.trial_counts({"total": 1, "finished": 1}) == "1 trial"


def test_what_a_sum_of_whole_numbers_comes_to_has_no_decimals() -> None:
    assert [fmt.claim_value({"observed": x}) for x in (39.0, 0.15**2 / 0.05**2, 2.2449)] == ["39", "9", "2.2449"]
    assert fmt.claim_value({"observed": -1.0, "ci_low": -1.5, "ci_high": -0.5}).startswith("\u22121.0000 [")


def test_the_total_of_a_campaign_does_not_contain_what_its_phases_share() -> None:
    counts = {"total": 20, "finished": 17, "diverged": 3, "reused": 12}
    assert fmt.campaign_counts(counts) == "20 trials (17 finished, 3 diverged) + 12 reused"
    assert fmt.campaign_counts({"total": 29, "finished": 29, "reused": 3}) == "29 trials + 3 reused"
    assert fmt.cost({"trials": counts, "tokens": 44_300, "seconds": 69.0}).startswith("20 trials (17 finished, 3 div")


def summary(**answer: Any) -> dict[str, Any]:
    noise = {"sd": 0.004, "smallest_detectable": 0.065, "method": "paired"}
    phase = {"phase": "a", "seeds": [1, 2], "min_effect": 0.005, "confidence": 0.95, "noise": noise, "arms": ["x", "y"]}
    chosen = {"phase": "a", "winner": "x", "delta": {"mean": -0.1}, "confirmed": False}
    return {"status": "finished", "answer": chosen | answer, "phases": [phase]}


def test_next_step_fits_the_state_of_the_campaign() -> None:
    assert "fresh 5" in next_step(summary())
    assert "change `vary:`" in next_step(summary(confirmed=True))
    assert "Run the same command again" in next_step(summary() | {"status": "interrupted"})
    assert "tries those trials again" in next_step(summary() | {"trials": {"failed": 1}})


def test_next_step_without_a_winner_says_how_many_seeds_would_show_one() -> None:
    undecided = summary(winner=None, delta=None)

    def power(n: int) -> float:
        """Of a paired t test of so many seeds, for an effect of 0.005."""
        return float(nct.sf(t.ppf(0.975, n - 1), n - 1, 0.005 / (0.004 * sqrt(2 / n))))

    assert power(12) < 0.8 < power(13)  # more seeds also tell the noise better: two have one degree of freedom
    assert "about 13 seeds" in next_step(undecided)
    undecided["phases"][0]["seeds"] = list(range(13))
    assert "seeds are needed" not in next_step(undecided)
    undecided["phases"][0]["seeds"] = [1]
    assert "One seed carries no claim" in next_step(undecided)


def test_next_step_reads_the_last_phase_when_no_phase_won() -> None:
    assert "about 13 seeds" in next_step(summary(winner=None, delta=None, phase=None))


def test_campaign_warnings_that_a_phase_shows_are_not_repeated() -> None:
    text = {"phases": [{"phase": "a", "warnings": ["w"]}], "warnings": ["a: w", "other"]}
    assert fmt.own_warnings(text) == ["other"]
