"""The tokens that a prompt starts with, and those that end a text."""

from ngpt.data.tokens.hf_tokenizer import HFTokenizer
from ngpt.data.tokens.tiktoken_bpe import TiktokenTokenizer
from ngpt.data.tokens.tokenizer import SentencePieceTokenizer, Tokenizer
from ngpt.generation.text import encode_prompt

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what the families of tokenizers call the end of a text
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


def end_tokens(tokenizer: Tokenizer) -> set[int]:
    """Returns the tokens after which nothing more of a text follows: the document separator and the ends of a text."""
    found = {tokenizer.document_separator}
    if isinstance(tokenizer, HFTokenizer):
        found |= {tokenizer._tokenizer.token_to_id(name) for name in ENDS}
    elif isinstance(tokenizer, TiktokenTokenizer):
        special = tokenizer._encoding.special_tokens_set
        found |= {tokenizer._encoding.encode_single_token(name) for name in ENDS if name in special}
    else:
        found |= {index for index in [tokenizer._model.eos_id()] if index >= 0}
    return {index for index in found if index is not None}
