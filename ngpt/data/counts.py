"""Counts what is scored: tokens, UTF-8 bytes, words between white space, and documents."""

import codecs
import hashlib

import numpy as np

from ngpt.data.tokens.formats import token_dtype
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.data.windows import Window


class ScoredCounts:
    """Counts the scored tokens of windows in order.

    `bytes` and `words` are None unless the tokenizer is known and loses nothing. Words are those of the scored text, so
    a word whose first token is not scored counts if more of it is. `documents` counts the texts that start, and each
    document separator in them. `sha256` identifies the tokens, each with the one before it.
    """

    def __init__(self, *, vocab_size: int, token_bytes: np.ndarray | None, tokenizer: Tokenizer | None) -> None:
        self.tokens, self.documents = 0, 0
        self.bytes: int | None = None if token_bytes is None else 0
        self.words: int | None = None if token_bytes is None or tokenizer is None else 0
        self._sizes, self._tokenizer = token_bytes, tokenizer
        self._separator = tokenizer.document_separator if tokenizer else None
        self._hash, self._dtype = hashlib.sha256(), token_dtype(vocab_size)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._in_word = False

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def add(self, window: Window) -> None:
        """Counts the scored tokens of the next window."""
        scored = window.tokens[-window.n_scored :]
        self.tokens += window.n_scored
        self.documents += window.starts + int((scored == self._separator).sum())
        self._hash.update(window.tokens[-window.n_scored - 1 :].astype(self._dtype).tobytes())
        if window.starts:
            self._end_word()
        if self._sizes is None or self.bytes is None:
            return
        sizes = self._sizes[scored]
        self.bytes += int(sizes.sum())
        if window.starts:  # a mark may offset the space that its tokenizer adds after it
            self.bytes += min(0, int(self._sizes[window.tokens[0]]))
        if self._tokenizer is not None and self.words is not None:
            for number, part in enumerate(np.split(scored, np.flatnonzero(sizes <= 0))):
                if number:  # it begins with a token without text, which ends a word
                    self._end_word()
                self.words += self._words_in(self._tokenizer.decode_bytes(part[1:] if number else part))

    def _words_in(self, data: bytes) -> int:
        """How many words begin in the next bytes."""
        text = self._decoder.decode(data)
        if not text:
            return 0
        goes_on = self._in_word and not text[0].isspace()
        self._in_word = not text[-1].isspace()
        return len(text.split()) - goes_on

    def _end_word(self) -> None:
        self._decoder.reset()
        self._in_word = False
