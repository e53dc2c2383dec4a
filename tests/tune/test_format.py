"""Numbers and names as people read them."""

import pytest

from tune import format as fmt


def test_losses_have_four_decimals_and_a_real_minus() -> None:
    assert fmt.number(4.32111) == "4.3211"
    assert fmt.number(-0.5) == f"{fmt.MINUS}0.5000"
    assert fmt.number(-0.00001) == "0.0000"
    assert fmt.number(None) == fmt.MISSING


def test_differences_carry_their_sign_unless_they_round_to_zero() -> None:
    assert fmt.signed(0.0123) == "+0.0123"
    assert [fmt.digits(-0.08123, 2), fmt.digits(1e-7, plus=True)] == [f"{fmt.MINUS}0.081", f"+1e{fmt.MINUS}07"]
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


def test_plain_text_is_one_visible_line() -> None:
    assert fmt.plain("\x1b[31mred\x1b[0m") == r"\x1b[31mred\x1b[0m"
    assert fmt.plain(" a\r\n\tb\x00\x9b31m\n") == r"a b\x00\x9b31m"
    assert fmt.plain("\u202eevil\u200b\ud800") == r"\u202eevil\u200b\ud800"
    assert fmt.plain("[red]x[/]") == "[red]x[/]"


def test_long_names_lose_their_middle() -> None:
    assert fmt.shorten("alpha=0.15", 10) == "alpha=0.15"
    assert fmt.shorten("project_every=10, alpha_kind=vector", 15) == "project…=vector"
    assert len(fmt.shorten("x" * 50, 12)) == 12


def test_names_are_joined_like_a_sentence() -> None:
    assert fmt.listing([]) == ""
    assert fmt.listing(["a"]) == "a"
    assert fmt.listing("abc") == "a, b and c"
    assert fmt.listing("abcdefgh") == "a, b, c, d, e, f and 2 more"
    assert fmt.listing(["a=1, b=2", "a=3, b=4", "c"]) == "a=1, b=2; a=3, b=4 and c"


def test_a_claim_value_has_an_interval_or_as_few_decimals_as_it_needs() -> None:
    assert [fmt.claim_value(x) for x in (39.0, 0.15**2 / 0.05**2, 2.2449)] == ["39", "9", "2.2449"]
    assert fmt.claim_value(-1.0, -1.5, -0.5) == "-1.0000 [-1.5000, -0.5000]".replace("-", fmt.MINUS)
    assert fmt.claim_value(1.32e8, 1.3e8, 1.34e8) == "1.32e+08 [1.3e+08, 1.34e+08]"
    assert fmt.claim_value(None) == fmt.MISSING


COMPILER = "InductorError: InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')"
ADVICE = "\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (COMPILER + ADVICE, COMPILER),
        (
            f'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n    ^^^\n{COMPILER}{ADVICE}\n',
            COMPILER,
        ),
        (
            '  File "a.py", line 1, in f\n    g()\nKeyError: 1\n\nDuring:\n\n  File "b"\nValueError: two\nlines',
            "ValueError: two lines",
        ),
        ("Traceback ...\nValueError: it broke", "ValueError: it broke"),
        ("killed: its process was killed or crashed, 4 times", "killed: its process was killed or crashed, 4 times"),
        ("ValueError", "ValueError"),
        ("", ""),
    ],
)
def test_the_reason_of_an_error_is_its_type_and_message(error: str, reason: str) -> None:
    """Of journals with tracebacks too, and never the last line, which may be advice."""
    assert fmt.reason(error) == reason
