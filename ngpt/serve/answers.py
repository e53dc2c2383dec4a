"""Answers in the words of OpenAI's API: the objects of completions and chats, whole or in chunks."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.serve.choice import Piece, TokenLogprob

Json = dict[str, Any]


class TokenTexts:
    """How single tokens are written, in lists of log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._knows_bytes = tokenizer.token_bytes() is not None

    def bytes_of(self, token: int) -> list[int] | None:
        """The UTF-8 bytes of a token, which may be part of a character; None if the tokenizer changes text."""
        return list(self._tokenizer.decode_bytes([token])) if self._knows_bytes else None

    def text_of(self, token: int) -> str:
        """The text of a token; part of a character is written as OpenAI does: `bytes:\\xe2\\x80`."""
        if not self._knows_bytes:
            return self._tokenizer.decode([token])
        found = self._tokenizer.decode_bytes([token])
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


class Answer(ABC):
    """The objects of one answer, which share id, time and model."""

    kind, chunk_kind, start = "", "", ""

    def __init__(self, *, model: str, fingerprint: str, texts: TokenTexts, prompt_tokens: int) -> None:
        self._head: Json = {"id": f"{self.start}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._head["system_fingerprint"] = fingerprint
        self._texts, self._prompt_tokens = texts, prompt_tokens

    def usage(self, generated: int) -> Json:
        """The numbers of tokens of the prompts and of all choices."""
        total = self._prompt_tokens + generated
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": generated, "total_tokens": total}

    def whole(self, choices: Sequence[Json], generated: int) -> Json:
        """The answer in one object."""
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage(generated)}

    def chunk(self, choices: Sequence[Json], **more: Any) -> Json:
        """A part of a streamed answer."""
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    @abstractmethod
    def choice(self, index: int, pieces: Sequence[Piece], *, with_logprobs: bool) -> Json:
        """A choice from all its pieces."""

    def first_delta(self, index: int) -> Json | None:
        """What is streamed of a choice before its text; None for nothing."""
        return None

    @abstractmethod
    def delta(self, index: int, piece: Piece, *, with_logprobs: bool) -> Json:
        """A piece of a choice as it is streamed."""


class CompletionAnswer(Answer):
    """Objects of `/v1/completions`."""

    kind = chunk_kind = "text_completion"
    start = "cmpl"

    def choice(self, index: int, pieces: Sequence[Piece], *, with_logprobs: bool) -> Json:
        return self.delta(index, joined(pieces), with_logprobs=with_logprobs)

    def delta(self, index: int, piece: Piece, *, with_logprobs: bool) -> Json:
        logprobs = self._logprobs(piece.tokens) if with_logprobs else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json:
        write = self._texts.text_of
        return {
            "tokens": [write(each.token) for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [_by_text(each, write) for each in tokens],
            "text_offset": [each.offset for each in tokens],
        }


def _by_text(token: TokenLogprob, write: Callable[[int], str]) -> dict[str, float] | None:
    """The best tokens by their text, and the token itself; of several with the same text, the best one."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for other, logprob in (*token.top, (token.token, token.logprob)):
        found.setdefault(write(other), logprob)
    return found


class ChatAnswer(Answer):
    """Objects of `/v1/chat/completions`."""

    kind, chunk_kind, start = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, pieces: Sequence[Piece], *, with_logprobs: bool) -> Json:
        whole = joined(pieces)
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {"index": index, "message": message, **self._rest(whole, with_logprobs)}

    def first_delta(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, **self._rest(Piece(), with_logprobs=False)}

    def delta(self, index: int, piece: Piece, *, with_logprobs: bool) -> Json:
        return {"index": index, "delta": {"content": piece.text}, **self._rest(piece, with_logprobs)}

    def _rest(self, piece: Piece, with_logprobs: bool) -> Json:
        content = [
            {**self._one(*each[:2]), "top_logprobs": [self._one(*pair) for pair in each.top]} for each in piece.tokens
        ]
        logprobs = {"content": content, "refusal": None} if with_logprobs else None
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _one(self, token: int, logprob: float | None) -> Json:
        return {"token": self._texts.text_of(token), "logprob": logprob, "bytes": self._texts.bytes_of(token)}


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    reason = next((piece.finish_reason for piece in pieces if piece.finish_reason), None)
    return Piece("".join(piece.text for piece in pieces), tokens, reason)
