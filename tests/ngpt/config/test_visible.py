"""Text from outside as it is printed."""

import logging

import pytest

from ngpt.config.visible import VisibleFormatter, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, caf\xe9 \u65e5\u672c \U0001f600", "plain text, caf\xe9 \u65e5\u672c \U0001f600"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\nc\td\x9b31m\x7f", r"a\rb\nc\td\x9b31m\x7f"),
        ("\u202agnp.\u202eexe\u2066\u2069", r"\u202agnp.\u202eexe\u2066\u2069"),
        ("a\u200bb\u2060c\ufeffd\xade", r"a\u200bb\u2060c\ufeffd\xade"),
        ("a\u3164b\u115fc\u034fd\U000e0101", r"a\u3164b\u115fc\u034fd\U000e0101"),
        ("bytes \udcff\ud800", r"bytes \udcff\ud800"),
        ("a\xa0b\u2028c", r"a\xa0b\u2028c"),
    ],
)
def test_what_acts_on_a_terminal_or_hides_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(text).isprintable()


def test_characters_may_be_kept() -> None:
    assert visible("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"


def test_other_objects_are_shown_as_text() -> None:
    assert visible(ValueError("a\x1b[0m")) == r"a\x1b[0m" and visible(None) == "None"


def test_a_log_record_is_visible_with_its_traceback() -> None:
    try:
        raise ValueError("bad \x1b[31m name")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.WARNING, __file__, 1, "lost %s", ("a\x1b]0;t\x07",), info)
    text = VisibleFormatter().format(record)
    assert r"lost a\x1b]0;t\x07" in text and r"ValueError: bad \x1b[31m name" in text
    assert "\x1b" not in text and text.count("\n") > 2
