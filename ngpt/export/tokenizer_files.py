"""Tokenizers as tokenizer.json, where that encodes every text alike, with what transformers reads beside it."""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ngpt.config.base import printable
from ngpt.data.tokens.end_tokens import end_tokens
from ngpt.data.tokens.hf_tokenizer import TOKENIZER_JSON, HFTokenizer
from ngpt.data.tokens.tiktoken_bpe import ENCODINGS, GPT2_PATTERN, TiktokenTokenizer
from ngpt.data.tokens.tokenizer import META, MODEL_FILE, PROBE, SentencePieceTokenizer, Tokenizer
from ngpt.downstream.special_tokens import prefix_token, puts_prefix

TOKENIZER_CONFIG = "tokenizer_config.json"
SAMPLE_CHARACTERS = 100_000  # of Python's documentation
LITERAL_META = f"a {META}b {META}{META}"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces: sentencepiece_model.proto, SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
SCRIPTS = (
    "def f(x):\n\treturn x**2  # 3.14159 1234567890 0x1F\r\n\r\n"
    "Ünïcödé straße \ufb01 İstanbul \u017f Ελληνικά русский עברית العربية हिन्दी 日本語 한국어 ไทย "
    "🙂\U0001f469\u200d\U0001f467 \u00a0\u3000\u200b\u2028\n\n\n"
    "don't DON'T we'll I'M it's <s> </s> <unk> <|endoftext|> <0x0A> e\u0301 \x00\x7f\x85 ...!?   "
)


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer by name, and the ids of tokens with a meaning.

    `missing` says in one line what the exported folder lacks; empty: nothing.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    missing: str = ""

    @property
    def ids(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def tokenizer_files(tokenizer: Tokenizer | None, content: bytes | None, *, context: int) -> TokenizerFiles:
    """Returns the files of a tokenizer; without a tokenizer.json if that would encode a text otherwise.

    Args:
        tokenizer: that of the model; None: it was trained on token ids.
        content: the file of the tokenizer, if it has one: a tokenizer.json, or a model of sentencepiece.
        context: `block_size` of the model.
    """
    if tokenizer is None:
        return TokenizerFiles(missing="a tokenizer: the model was trained on token ids")
    separator = tokenizer.document_separator
    ends = [*end_tokens(tokenizer)]
    ids: dict[str, Any] = {"bos_token_id": separator, "pad_token_id": separator}
    ids["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    text, reason = _tokenizer_json(tokenizer, content)
    if text is not None and (difference := first_difference(tokenizer, text)):
        text, reason = None, difference
    if text is None:
        is_model = isinstance(tokenizer, SentencePieceTokenizer)
        beside = f"; {MODEL_FILE} is there, for sentencepiece" if is_model else ""
        files = {MODEL_FILE: content} if is_model and content is not None else {}
        return TokenizerFiles(files, **ids, missing=f"{TOKENIZER_JSON}: {reason}{beside}")
    settings = json.loads(text)
    if separator is None and isinstance(tokenizer, SentencePieceTokenizer):
        ids["pad_token_id"] = next((t["id"] for t in settings["added_tokens"] if t["content"] == "<unk>"), None)
    if not isinstance(tokenizer, HFTokenizer) and puts_prefix(tokenizer):
        settings["post_processor"] = _beginning(settings, prefix_token(tokenizer))
        text = _dumped(settings)
    config = json.dumps(_config(settings, ids, context), indent=1).encode()
    is_exact = not first_difference(tokenizer, text, [LITERAL_META])
    missing = "" if is_exact else f"exactness for texts with the sign {META} (U+2581), which are encoded otherwise"
    return TokenizerFiles({TOKENIZER_JSON: text, TOKENIZER_CONFIG: config}, **ids, missing=missing)


def first_difference(tokenizer: Tokenizer, content: bytes, texts: Iterable[str] | None = None) -> str:
    """Returns how a tokenizer.json encodes one of `texts` otherwise than a tokenizer; empty if it does not."""
    from tokenizers import Tokenizer as Reader

    other: Any = Reader.from_str(content.decode())
    other.encode_special_tokens = True  # those that a text spells stay text
    for token in json.loads(content).get("added_tokens") or ():
        if other.token_to_id(token["content"]) != token["id"]:
            return f"it would give {printable(token['content'])} another id"
    for text in sample_texts() if texts is None else texts:
        ours, theirs = np.asarray(tokenizer.encode(text)), other.encode(text, add_special_tokens=False).ids
        if not np.array_equal(ours, theirs):
            same = min(len(ours), len(theirs))
            place = int(np.argmax(np.append(ours[:same] != np.array(theirs[:same]), True)))
            return f"it would encode a sample text otherwise, from token {place} on"
    return ""


@functools.cache
def sample_texts() -> tuple[str, ...]:
    """Returns texts to compare tokenizers with: documentation of Python, many scripts, spaces and special tokens."""
    from pydoc_data.topics import topics

    return (PROBE, SCRIPTS, "\n".join(topics[name] for name in sorted(topics))[:SAMPLE_CHARACTERS])


def _tokenizer_json(tokenizer: Tokenizer, content: bytes | None) -> tuple[bytes | None, str]:
    """Returns a tokenizer.json, or None and why there is none."""
    if isinstance(tokenizer, HFTokenizer):
        return content, ""
    if isinstance(tokenizer, TiktokenTokenizer):
        return _from_ranks(tokenizer), ""
    return (None, "there is no file of the tokenizer") if content is None else _from_sentencepiece(content)


def _from_ranks(tokenizer: TiktokenTokenizer) -> bytes:
    """Writes byte-level BPE as tiktoken computes it: any two neighbours merge whose bytes are a token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    sizes, pieces = tokenizer.token_bytes(), [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    ranks = {piece: index for index, piece in enumerate(pieces) if sizes[index]}
    special = {piece.decode(): index for index, piece in enumerate(pieces) if piece and not sizes[index]}

    def spelt(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(spelt(left), spelt(right)) for token in ranks for left, right in _splits(token, ranks)]
    vocab = {spelt(token): index for token, index in ranks.items()}
    # The library numbers what the vocabulary lacks without gaps. No text has a whole word like the added ones.
    vocab |= special
    taken = set(vocab.values())
    vocab |= {f"<|unused_{index}|>": index for index in range(max(taken)) if index not in taken}
    # The regular expressions of the library have no possessive {1,3}+; a greedy one matches the same here.
    name = tokenizer.name.removeprefix("tiktoken:")
    pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", ENCODINGS[name].pattern if name in ENCODINGS else GPT2_PATTERN)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _json(
        added=[(index, token, True) for token, index in special.items()],
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        decoder=byte_level,
        model={"ignore_merges": True, "vocab": vocab},
        merges=merges,
    )


def _from_sentencepiece(model: bytes) -> tuple[bytes | None, str]:
    """Writes a BPE model of sentencepiece. Its pieces have real spaces, so that a literal U+2581 is spelt as bytes."""
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2
    proto = schema.ModelProto()
    proto.ParseFromString(model)
    if proto.trainer_spec.model_type != BPE:
        return None, "the sentencepiece model is not BPE"
    if proto.normalizer_spec.precompiled_charsmap or proto.normalizer_spec.remove_extra_whitespaces:
        return None, "the sentencepiece model changes texts before it encodes them"
    pieces = [(piece.piece.replace(META, " "), piece.score, piece.type) for piece in proto.pieces]
    vocab = {text: index for index, (text, _, _) in enumerate(pieces)}
    if len(vocab) < len(pieces):
        return None, "the sentencepiece model has the same piece twice"
    joined = {text for text, _, kind in pieces if kind == NORMAL}
    ranked = sorted((index for index in range(len(pieces)) if pieces[index][2] == NORMAL), key=lambda i: -pieces[i][1])
    merges = [pair for index in ranked for pair in _splits(pieces[index][0], joined)]
    unknown = next((text for text, _, kind in pieces if kind == UNKNOWN), None)
    marks = [
        (index, text, kind != USER_DEFINED)
        for index, (text, _, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    adds_space = proto.normalizer_spec.add_dummy_prefix
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if adds_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _json(
        added=marks,
        normalizer={"type": "Prepend", "prepend": " "} if adds_space else None,
        decoder={"type": "Sequence", "decoders": decoders},
        model={"unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "vocab": vocab},
        merges=merges,
    ), ""


def _splits(token: Any, tokens: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields the pairs of tokens that join to `token`."""
    for place in range(1, len(token)):
        if token[:place] in tokens and token[place:] in tokens:
            yield token[:place], token[place:]


def _json(
    *,
    added: list[tuple[int, str, bool]],
    model: Mapping[str, Any],
    merges: list[tuple[str, str]],
    decoder: Mapping[str, Any],
    normalizer: Mapping[str, Any] | None = None,
    pre_tokenizer: Mapping[str, Any] | None = None,
) -> bytes:
    """Returns the content of a tokenizer.json with a BPE model; `added` has id, text and whether it is special."""
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    bpe |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    tokens = [{"id": index, "content": text, "special": special} | FLAGS for index, text, special in sorted(added)]
    settings = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens}
    settings |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder}
    settings["model"] = bpe | dict(model) | {"merges": merges}
    return _dumped(settings)


def _dumped(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings, ensure_ascii=False).encode()


def _beginning(settings: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns the post-processor that puts a token before every text, as the tokenizer's own program does.

    It also says which token separates documents, for whoever reads the file again.
    """
    name = next(token["content"] for token in settings["added_tokens"] if token["id"] == index)
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": number}} for number, part in enumerate("AB"))
    special = {name: {"id": name, "ids": [index], "tokens": [name]}}
    single = [begin, first]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, second], "special_tokens": special}


def _config(settings: Mapping[str, Any], ids: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Returns the tokenizer_config.json: no text is cleaned up, and special tokens that it spells stay text."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": context,
    }
    names = {token["id"]: token["content"] for token in settings.get("added_tokens") or ()}
    vocab = settings["model"]["vocab"]
    for name, value in ids.items():
        index = value[0] if isinstance(value, list) else value  # a tokenizer names one end
        if index is not None and index not in names:
            names |= {number: text for text, number in vocab.items()} if isinstance(vocab, dict) else {}
        if index in names:
            config[name.removesuffix("_id")] = names[index]
    if isinstance(unknown := settings["model"].get("unk_token"), str):
        config["unk_token"] = unknown
    return config
