"""Requests and errors of OpenAI's API: which fields there are, what they may be, and which ones are not supported.

A field of OpenAI's that the server does not support is refused, unless its value asks for nothing. Fields that change
no answer, such as `user`, are ignored. All other fields are unknown and refused, as OpenAI does.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ngpt.config.base import MAX_MESSAGE_LENGTH, Config, ConfigError, build, dotted_name, printable, unknown_message

INVALID = "invalid_request_error"  # types of errors
RATE_LIMIT = "rate_limit_error"
SERVER = "server_error"
MOST_STOPS = 4  # strings, as OpenAI
LONGEST_STOP = 1000  # characters of one
MOST_LOGPROBS = 5  # alternatives of a token in a completion, as OpenAI
MOST_TOP_LOGPROBS = 20  # the same in a chat
SEEDS = (-(2**63), 2**63 - 1)
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Fields of OpenAI that are not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {"logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,)}
UNSUPPORTED_COMPLETION: dict[str, tuple[Any, ...]] = {"suffix": ("",)}
UNSUPPORTED_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_options": (),
}


class ApiError(Exception):
    """An answer other than 200. The message is one line; `param` is the field of the request that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self._error = {"message": printable(message, MAX_MESSAGE_LENGTH), "type": kind, "param": param, "code": code}

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": self._error}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong; the same request is refused again."""
    return ApiError(400, message, param=param, code=code)


def _stops(value: Any) -> list[str]:
    """Reads `stop`: a string, a list of them, or null."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise PydanticCustomError("invalid", "{text}", {"text": "must be a string or a list of strings"})
    if len(stops) > MOST_STOPS or any(not 0 < len(each) <= LONGEST_STOP for each in stops):
        text = f"must be at most {MOST_STOPS} strings of 1 to {LONGEST_STOP:,} characters"
        raise PydanticCustomError("invalid", "{text}", {"text": text})
    return stops


def _prompts(value: Any) -> Sequence[str | list[int]]:
    """Reads `prompt`: a string, a list of strings, the token ids of a prompt, or a list of such; null is empty."""
    if value is None or isinstance(value, str):
        return [value or ""]
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return value
        prompts = [value] if _are_ids(value) else value
        if all(isinstance(each, list) and each and _are_ids(each) for each in prompts):
            return prompts
    text = "must be a string, a list of strings, a list of token ids, or a list of lists of token ids; none empty"
    raise PydanticCustomError("invalid", "{text}", {"text": text})


def _are_ids(value: list[Any]) -> bool:
    return all(type(each) is int for each in value)


def _content(value: Any) -> str:
    """Reads the content of a message: a string, or a list of parts of text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [each for each in value if isinstance(each, dict) and set(each) == {"type", "text"}]
        texts = [each["text"] for each in parts if each["type"] == "text" and isinstance(each["text"], str)]
        if len(texts) == len(value):
            return "".join(texts)
    text = "must be a string, or a list of parts of the type 'text'; others are not supported"
    raise PydanticCustomError("invalid", "{text}", {"text": text})


class StreamOptions(Config):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # random padding; there is none here

    def __bool__(self) -> bool:
        return bool(self.include_usage)


class Request(Config):
    """Fields that completions and chats share; None is the default."""

    model: str
    n: Annotated[int, Field(ge=1, le=10_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] | None = None
    stop: Annotated[Any, BeforeValidator(_stops)] = Field(default_factory=list)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @abstractmethod
    def logprob_count(self) -> int | None:
        """How many alternatives of each token the answer has, besides its own logprob; None without logprobs."""

    @abstractmethod
    def token_limit(self) -> int | None:
        """How many tokens are generated at most; None if the request leaves it open."""


class CompletionRequest(Request):
    """The body of `/v1/completions`."""

    prompt: Annotated[Any, AfterValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    def logprob_count(self) -> int | None:
        return self.logprobs

    def token_limit(self) -> int | None:
        return self.max_tokens


def _message(value: Any) -> Any:
    """Leaves out what is null, as in messages that a client has received."""
    if not isinstance(value, dict):
        return value
    given = {name: each for name, each in value.items() if each is not None}
    if unknown := [name for name in given if name not in Message.model_fields]:
        text = f"the field {printable(unknown[0])} of a message is not supported by this server"
        raise PydanticCustomError("invalid", "{text}", {"text": text})
    return given


class Message(Config):
    """A message of a chat."""

    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: Annotated[Any, AfterValidator(_content)]
    name: str | None = None


class ChatRequest(Request):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Annotated[Message, BeforeValidator(_message)]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def token_limit(self) -> int | None:
        limits = [each for each in (self.max_tokens, self.max_completion_tokens) if each is not None]
        return min(limits, default=None)


RequestT = TypeVar("RequestT", bound=Request)


def parse_json(body: bytes) -> dict[str, Any]:
    """Reads the object of a body. Unlike Python's reader, it refuses NaN, a name twice, and halves of characters.

    Raises:
        ApiError: with status 400.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        values = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_twice)
        if "\\u" in text:  # a lone surrogate, which is no character, has to be spelt
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid("the body is not JSON: a string has half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise invalid("the body is not JSON of this API: it is nested too deeply") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise invalid("the body must be a JSON object")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def read_request(kind: type[RequestT], values: dict[str, Any]) -> RequestT:
    """Checks the fields of a request.

    Raises:
        ApiError: with status 400, about the first field that is wrong.
    """
    own = UNSUPPORTED_CHAT if kind is ChatRequest else UNSUPPORTED_COMPLETION
    unsupported = UNSUPPORTED | own
    known = {}
    for name, value in values.items():
        if name in unsupported:
            if value is not None and not any(_is_same(value, neutral) for neutral in unsupported[name]):
                raise invalid(f"{name} is not supported by this server", name, "unsupported_parameter")
        elif name in kind.model_fields:
            known[name] = value
        elif name not in IGNORED:
            message = unknown_message("field", name, [*kind.model_fields, *unsupported])
            raise invalid(f"Unrecognized request argument supplied: {message}", "model" if name == "" else name)
    try:
        request = build(kind, known)
    except ConfigError as error:
        problem = error.problems[0]
        raise invalid(problem.line(), dotted_name(problem.location) or None) from None
    _check_together(request)
    return request


def _is_same(value: object, neutral: object) -> bool:
    """Equality that tells false from 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _check_together(request: Request) -> None:
    """Raises ApiError for fields that do not fit each other."""
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is only allowed with stream: true", "stream_options")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if isinstance(request, CompletionRequest):
        if request.best_of not in (None, request.n or 1):
            raise invalid("best_of other than n is not supported by this server", "best_of", "unsupported_parameter")
        if request.max_tokens == 0 and not request.echo:
            raise invalid("max_tokens: 0 generates nothing; it is allowed with echo: true", "max_tokens")


def check_model(request: Request, name: str) -> None:
    """Raises ApiError with status 404 if the request is for another model than the one that is served."""
    if request.model != name:
        message = f"the model {request.model!r} does not exist; this server has {name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
