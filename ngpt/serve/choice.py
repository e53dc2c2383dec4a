"""The text of one choice of an answer while it is generated: stop strings, and the tokens that belong to it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ngpt.data.tokens.end_tokens import end_tokens
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.generation.text import Continuation

STOP, LENGTH = "stop", "length"  # why a choice has ended, in OpenAI's words


class StopScanner:
    """Cuts a text before the first stop string in it, however the text is divided into pieces.

    The first one is the one that is complete first; of several that end at the same character, the longest. The end of
    the text that may be the start of a stop string is held back.
    """

    def __init__(self, stops: Collection[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Returns what of the text so far is certain to come before any stop string, and has not been returned yet."""
        start, held = len(self._held), self._held + text
        for end in range(start + 1, len(held) + 1):
            for stop in self._stops:
                if held.endswith(stop, 0, end):
                    self._held, self.stopped = "", True
                    return held[: end - len(stop)]
        kept = self._possible_start(held)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def end(self) -> str:
        """Returns what is held back; no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        ends = range(longest, 0, -1)
        return next((size for size in ends if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)


class TokenLogprob(NamedTuple):
    """A token, its log-probability, the most probable tokens with theirs, and where it begins in the text.

    `logprob` is None for the first token of a prompt, which nothing predicts.
    """

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class Piece:
    """New text of a choice with its tokens; the last piece says why the choice has ended."""

    text: str = ""
    tokens: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


class Choice:
    """One choice: takes tokens, gives pieces of text. The end of a document, or a stop string, ends it."""

    def __init__(
        self,
        prompt: list[int],
        tokenizer: Tokenizer,
        *,
        stops: Collection[str],
        ends: Collection[int] = (),
        max_tokens: int,
        offset: int = 0,
    ) -> None:
        """Prepares a choice.

        Args:
            stops: strings that end it.
            ends: tokens that end it, besides those that end a text.
            offset: the length of the text before the generated one, if the answer repeats the prompt.
        """
        self._continuation = Continuation(prompt, tokenizer)
        self._ends = {*ends, *end_tokens(tokenizer)}
        self._scanner = StopScanner(stops)
        self._max_tokens = max_tokens
        self._read = self._sent = offset  # characters that were decoded, and that were returned in pieces
        self._waiting: list[TokenLogprob] = []
        self.n_tokens = 0
        self.finish_reason: str | None = LENGTH if max_tokens == 0 else None

    def add(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> Piece | None:
        """Adds a generated token; returns the piece that it completes, None if there is nothing new to say."""
        self.n_tokens += 1
        self._waiting.append(TokenLogprob(token, logprob, top, self._read))
        if token in self._ends:
            self.finish_reason = STOP
        else:
            self._continuation.add(token)
            if self.n_tokens == self._max_tokens:
                self.finish_reason = LENGTH
        if self.finish_reason:
            self._continuation.end()
        new, self._continuation.unprinted = self._continuation.unprinted, ""
        self._read += len(new)
        text = self._scanner.add(new)
        if self._scanner.stopped:
            self.finish_reason = STOP
        elif self.finish_reason:
            text += self._scanner.end()
        self._sent += len(text)
        piece = Piece(text, self._take_tokens(), self.finish_reason)
        return None if piece == Piece() else piece

    def _take_tokens(self) -> tuple[TokenLogprob, ...]:
        """The tokens whose text has begun to be sent; at an end without a stop string, all of them."""
        takes_all = self.finish_reason is not None and not self._scanner.stopped
        count = sum(takes_all or each.offset < self._sent for each in self._waiting)
        taken, self._waiting = tuple(self._waiting[:count]), self._waiting[count:]
        return taken
