"""The tokens that a prompt starts with."""

from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.generation.text import encode_prompt


def prefix_token(tokenizer: Tokenizer) -> int:
    """Returns the token that an empty prompt stands for: the document separator, or a newline if there is none."""
    return encode_prompt("", tokenizer)[-1]


def puts_prefix(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's own program puts a special token before every text, as those of Llama do.

    In `transformers` the post-processor of tokenizer.json says so. A sentencepiece model has a BOS token for this.
    """
    return tokenizer.begins_texts()
