"""The tokens that end a text."""

from ngpt.data.tokens.hf_tokenizer import HFTokenizer
from ngpt.data.tokens.tiktoken_bpe import TiktokenTokenizer
from ngpt.data.tokens.tokenizer import Tokenizer

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what the families of tokenizers call the end of a text


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens after which nothing more of a text follows: the ends of a text, then the document separator.

    A model that was trained here ends a text with the separator, which starts the next one. One from elsewhere may have
    learned a token of its own for that, such as `</s>` beside the `<s>` that starts a text.
    """
    if isinstance(tokenizer, HFTokenizer):
        special = {
            token.content: index
            for index, token in tokenizer._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        named = [special[name] for name in ENDS if name in special]
    elif isinstance(tokenizer, TiktokenTokenizer):
        encoding = tokenizer._encoding
        named = [encoding.encode_single_token(name) for name in ENDS if name in encoding.special_tokens_set]
    else:
        named = [index for index in [tokenizer._model.eos_id()] if index >= 0]
    separator = tokenizer.document_separator
    return tuple(dict.fromkeys([*named, *([] if separator is None else [separator])]))
