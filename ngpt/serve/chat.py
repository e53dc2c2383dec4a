"""Chats as prompts: a template in Jinja's language, as those of Hugging Face's models, in a sandbox."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ngpt.config.base import ConfigError
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.generation.text import encode_prompt
from ngpt.serve.schema import Message, invalid

LARGEST_TEMPLATE = 1 << 20  # bytes
# What a template means by these variables: the first of the tokens that the tokenizer has.
NAMED_TOKENS = {
    "bos_token": ("<|begin_of_text|>", "<|bos|>", "<s>", "<bos>", "<|endoftext|>"),
    "eos_token": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>"),
}


class ChatTemplate:
    """A template with the variables `messages`, `add_generation_prompt`, `bos_token` and `eos_token`.

    It runs in Jinja's sandbox, which can reach neither files nor attributes of Python's objects, and with the options
    of `transformers`: blocks leave no white space behind, and `raise_exception` refuses a chat. Special tokens that the
    template spells become these tokens; messages that spell one are refused, since they could fake other messages.
    """

    def __init__(self, path: Path) -> None:
        """Reads a template. ConfigError if the file is none."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            with path.open("rb") as file:
                content = file.read(LARGEST_TEMPLATE + 1)
            if len(content) > LARGEST_TEMPLATE:
                raise ConfigError(f"--chat-template {path}: larger than {LARGEST_TEMPLATE:,} bytes")
            text = content.decode()
            self._template = environment.from_string(text)
            self._variables = meta.find_undeclared_variables(environment.parse(text))
        except (FileNotFoundError, IsADirectoryError):
            raise ConfigError(f"--chat-template {path}: no such file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"--chat-template {path} is not UTF-8: {error.reason} at byte {error.start}") from None
        except TemplateSyntaxError as error:
            raise ConfigError(f"--chat-template {path}, line {error.lineno}: {error.message}") from None
        self._path = path
        self.special: dict[str, int] = {}
        self._named: dict[str, str] = {}

    def use(self, tokenizer: Tokenizer) -> None:
        """Sets the tokenizer. ConfigError if the template needs a special token that it does not have."""
        self.special = tokenizer.special_tokens()
        for name, tokens in NAMED_TOKENS.items():
            if found := [token for token in tokens if token in self.special]:
                self._named[name] = found[0]
            elif name in self._variables:
                text = f"uses {name}, but {tokenizer.name} has none of {', '.join(tokens)}; spell the token instead"
                raise ConfigError(f"--chat-template {self._path} {text}")

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the prompt of a chat.

        Raises:
            ApiError: the template refuses these messages, or cannot be rendered with them.
        """
        values = [each.model_dump(exclude_none=True) for each in messages]
        for value in values:
            if found := next((token for text in value.values() for token in self.special if token in text), None):
                raise invalid(f"a message spells the special token {found!r}, which only the template may", "messages")
        try:
            return self._template.render(messages=values, add_generation_prompt=True, **self._named)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise invalid(f"the chat template does not take these messages: {error}", "messages") from None

    def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Returns the tokens of a prompt; ConfigError if the tokenizer has none for it."""
        if not self.special:
            return encode_prompt(text, tokenizer)
        pattern = "|".join(re.escape(token) for token in sorted(self.special, key=len, reverse=True))
        parts = [part for part in re.split(f"({pattern})", text) if part]
        ids = [[self.special[part]] if part in self.special else encode_prompt(part, tokenizer) for part in parts]
        return [index for part in ids for index in part] or encode_prompt("", tokenizer)


def _refuse(message: Any) -> NoReturn:
    raise TemplateError(str(message))
