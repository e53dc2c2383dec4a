"""What a request asks for, as tasks of the scheduler: its prompts as tokens, checked against the limits."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ngpt.config.base import ConfigError
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.generation.sampling import Sampling
from ngpt.generation.text import encode_prompt
from ngpt.serve.chat import ChatTemplate
from ngpt.serve.choice import Choice
from ngpt.serve.engine import Engine
from ngpt.serve.scheduler import Event, Task
from ngpt.serve.schema import ChatRequest, CompletionRequest, Request, invalid

DEFAULT_TOKENS = 16  # of a completion, as OpenAI


@dataclass(frozen=True)
class Limits:
    """What a request may ask for. None: as much as the context allows."""

    prompt_tokens: int | None = None
    max_tokens: int | None = None
    body_bytes: int = 1 << 20
    seconds: float = 600.0  # from the arrival of a request to the end of its answer


class Prompt(NamedTuple):
    """A prompt as the answer repeats it, and as the model reads it."""

    text: str
    tokens: list[int]


class Work:
    """The tasks of one request, and what is new of them."""

    def __init__(
        self, request: Request, prompts: Sequence[Prompt], engine: Engine, limits: Limits, ends: Collection[int]
    ) -> None:
        """Makes the tasks; the tokens `ends` end a choice.

        Raises:
            ApiError: the request asks for more than the limits.
        """
        self.request = request
        self.echo = bool(request.echo) if isinstance(request, CompletionRequest) else False
        self.prompts = prompts
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.n = request.n or 1
        self.tasks: list[Task] = []
        given = {name: getattr(request, name) for name in Sampling.model_fields}
        sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
        logprobs = request.logprob_count()
        for prompt in prompts:
            max_tokens = token_limit(request, len(prompt.tokens), engine.context, limits)
            offset = len(prompt.text) if self.echo else 0
            scored = token_offsets(prompt.tokens, engine.tokenizer) if self.echo and logprobs is not None else None
            for index in range(self.n):
                end = {"stops": request.stop, "ends": ends, "max_tokens": max_tokens}
                choice = Choice(prompt.tokens, engine.tokenizer, offset=offset, **end)
                seed = choice_seed(request.seed, index)
                position = len(self.tasks)
                how = {"sampling": sampling, "seed": seed, "choice": choice, "logprobs": logprobs}
                more = {"scored_offsets": scored, "listener": self.events.put_nowait}
                self.tasks.append(Task(position, prompt.tokens, **how, **more))

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @property
    def generated_tokens(self) -> int:
        """The tokens that have been generated so far."""
        return sum(task.choice.n_tokens for task in self.tasks)

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of a choice."""
        return self.prompts[index // self.n]


def read_prompts(request: Request, engine: Engine, template: ChatTemplate | None) -> list[Prompt]:
    """Returns the prompts of a request as tokens. This takes a while for long ones.

    Raises:
        ApiError: a prompt cannot be read.
    """
    if isinstance(request, ChatRequest):
        if template is None:
            message = "this server has no chat template: start it with --chat-template FILE, or use /v1/completions"
            raise invalid(message, code="no_chat_template")
        return [_encoded(template.render(request.messages), engine, "messages", template.encode)]
    assert isinstance(request, CompletionRequest)
    return [_read(each, engine) for each in request.prompt]


def _read(prompt: str | list[int], engine: Engine) -> Prompt:
    tokenizer = engine.tokenizer
    if isinstance(prompt, str):
        return _encoded(prompt, engine, "prompt", encode_prompt)
    if wrong := [token for token in prompt if not 0 <= token < tokenizer.vocab_size]:
        raise invalid(f"the prompt has the token {wrong[0]}; there are 0 to {tokenizer.vocab_size - 1}", "prompt")
    return Prompt(tokenizer.decode(prompt), prompt)


def _encoded(text: str, engine: Engine, param: str, encode: Callable[[str, Tokenizer], list[int]]) -> Prompt:
    if engine.longest_token is not None and (least := len(text.encode()) // engine.longest_token) > engine.context:
        message = f"the context has {engine.context} tokens; the prompt has more than {least}"
        raise invalid(message, param, "context_length_exceeded")  # without tokenizing it, which takes long
    try:
        return Prompt(text, encode(text, engine.tokenizer))
    except ConfigError as error:  # a tokenizer that has no token for it
        raise invalid(str(error), param) from None


def token_limit(request: Request, prompt_tokens: int, context: int, limits: Limits) -> int:
    """How many tokens a choice of this request has at most.

    Raises:
        ApiError: prompt and answer together do not fit the context, or are longer than the server allows.
    """
    longest, code = limits.prompt_tokens, "context_length_exceeded"
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    if longest is not None and prompt_tokens > longest:
        raise invalid(f"the prompt has {prompt_tokens} tokens; this server takes {longest}", param, code)
    asked, most = request.token_limit(), limits.max_tokens or context
    if asked is not None and limits.max_tokens is not None and asked > limits.max_tokens:
        raise invalid(f"max_tokens is {asked}; this server generates at most {most}", "max_tokens")
    room = context - prompt_tokens
    if room < (1 if asked is None else asked):
        rest = "no room is left to generate" if asked is None else f"max_tokens is {asked}"
        raise invalid(f"the context has {context} tokens; the prompt has {prompt_tokens} and {rest}", param, code)
    default = most if isinstance(request, ChatRequest) else DEFAULT_TOKENS
    return min(default, most, room) if asked is None else asked


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of choice `index` of a prompt: the first one has that of the request, the others derive theirs."""
    if seed is None or index == 0:
        return None if seed is None else seed % 2**63
    state: Any = np.random.SeedSequence([seed % 2**64, index]).generate_state(1, np.uint64)
    return int(state[0] >> 1)


def token_offsets(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """Returns at which character of the text each token begins; one inside a character has that of the character."""
    if tokenizer.token_bytes() is None:
        return [len(tokenizer.decode(tokens[:index])) for index in range(len(tokens))]
    found, characters = [], 0  # those that have begun
    for token in tokens:
        piece = tokenizer.decode_bytes([token])
        is_inside = bool(piece) and piece[0] & 0xC0 == 0x80
        found.append(max(0, characters - is_inside))
        characters += sum(byte & 0xC0 != 0x80 for byte in piece)
    return found
