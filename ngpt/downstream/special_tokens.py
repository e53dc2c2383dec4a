"""The tokens that a prompt starts with."""

from ngpt.data.tokens.hf_tokenizer import HFTokenizer
from ngpt.data.tokens.tokenizer import SentencePieceTokenizer, Tokenizer
from ngpt.generation.text import encode_prompt

LLAMA3_BEGIN = b"<|begin_of_text|>"


def prefix_token(tokenizer: Tokenizer) -> int:
    """Returns the token that an empty prompt stands for: the document separator, or a newline if there is none."""
    return encode_prompt("", tokenizer)[-1]


def puts_prefix(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's own program puts a special token before every text, as those of Llama do.

    In `transformers` the post-processor of tokenizer.json says so. A sentencepiece model has a BOS token for this.
    """
    if isinstance(tokenizer, HFTokenizer):
        return bool(tokenizer._tokenizer.encode("", add_special_tokens=True).ids)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer._model.bos_id() >= 0
    separator = tokenizer.document_separator
    return separator is not None and tokenizer._pieces[separator] == LLAMA3_BEGIN
