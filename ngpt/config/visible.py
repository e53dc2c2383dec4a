"""The visible form of text from outside: of files, models, the environment and exceptions.

Every print of such text goes through `visible`, because a terminal obeys escape sequences, and direction marks and
characters without width make a text look like another one.
"""

import logging
import re

# Characters that `str.isprintable` accepts although they have no width, or only choose how others look.
_HIDDEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\uffa0\U000e0100-\U000e01ef]")


def visible(text: object, *, keep: str = "") -> str:
    """Returns `text` with each character that acts on a terminal or hides as an escape such as `\\x1b` or `\\u202e`.

    These are control characters and line breaks, direction marks, characters without width, lone surrogates, and
    spaces other than U+0020. The characters in `keep` stay as they are: `keep="\\n"` for text of several lines.
    """
    text = str(text)
    if text.isprintable() and not _HIDDEN.search(text):
        return text
    return "".join(
        char if char in keep or (char.isprintable() and not _HIDDEN.match(char)) else escape(char) for char in text
    )


def escape(char: str) -> str:
    """Returns a character as Python writes it in a string: `\\x1b`, `\\u202e`."""
    return char.encode("unicode_escape").decode()


class VisibleFormatter(logging.Formatter):
    """Formats log records, including their tracebacks, in visible form."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n\t")
