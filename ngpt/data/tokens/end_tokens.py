"""The tokens that end a text."""

from ngpt.data.tokens.tokenizer import SentencePieceTokenizer, Tokenizer

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what the families of tokenizers call the end of a text


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens after which nothing more of a text follows: the ends of a text, then the document separator.

    A model that was trained here ends a text with the separator, which starts the next one. One from elsewhere may have
    learned a token of its own for that, such as `</s>` beside the `<s>` that starts a text.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        named = [index for index in [tokenizer._model.eos_id()] if index >= 0]
    else:
        special = tokenizer.special_tokens()
        named = [special[name] for name in ENDS if name in special]
    separator = tokenizer.document_separator
    return tuple(dict.fromkeys([*named, *([] if separator is None else [separator])]))
