"""Tokenizers of Hugging Face's library `tokenizers` (extra `hf`): tokenizer.json, or vocab.json with merges.txt."""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.config.base import ConfigError
from ngpt.data.text.documents import read_file
from ngpt.data.tokens.formats import token_dtype
from ngpt.data.tokens.tiktoken_bpe import MAX_VOCAB_FILE_BYTES

TOKENIZER_JSON, VOCAB_JSON, MERGES_TXT = "tokenizer.json", "vocab.json", "merges.txt"
PARALLELISM = "TOKENIZERS_PARALLELISM"  # the library reads it at each call
META = "\u2581"  # how pieces that come from sentencepiece write a space
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
# Which special token separates documents where no post-processor says so; the first one that there is.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>", "<s>", "<bos>")
# Special tokens of GPT-2, RoBERTa and their kin, which vocab.json does not tell from others.
SPECIAL = ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>")


class HFTokenizer:
    """A tokenizer.json, with the methods of `SentencePieceTokenizer`; special tokens in a text are plain text.

    `document_separator` is the token that its post-processor puts before a text, else the one that ends a text.
    """

    def __init__(self, content: bytes, name: str, probe: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise ConfigError(f"{name} needs tokenizers: pip install 'ngpt-campaign[hf]'") from None
        settings = parse_tokenizer_json(content, name)
        self.name = name
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer: Any = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{name} is not a tokenizer: {' '.join(str(error).split())}") from None
        # A text is encoded as it is: whole, the same every time, and without the special tokens that it spells.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        if settings["model"].get("dropout"):
            self._tokenizer.model.dropout = None
        self.vocab_size = vocab_size_of(settings)
        self._dtype = token_dtype(self.vocab_size)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special}
        self.document_separator = self._separator(special)
        self._pieces = self._find_pieces(settings, special)
        self._token_bytes = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        joined = [self.decode_bytes(self.encode(text)) for text in (probe, "end")]
        # Normal form C either leaves a text as it is or changes the number of its bytes, which preparation checks.
        normal = [unicodedata.normalize("NFC", text).encode() for text in (probe, "end")]
        self._lossless = joined in ([probe.encode(), b"end"], normal)
        # As in LLaMA, the first word of a text gets a space before it.
        spaced = joined == [b" " + probe.encode(), b" end"]
        self._adds_space = spaced and self.document_separator is not None
        if self._adds_space:
            self._token_bytes[self.document_separator] = -1

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int) -> list[np.ndarray]:
        with _parallelism(threads > 1):
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=self._dtype) for each in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        if self._lossless:
            return self.decode_bytes(ids).decode(errors="replace")
        return self._tokenizer.decode([int(index) for index in ids])

    def token_bytes(self) -> np.ndarray | None:
        return self._token_bytes if self._lossless or self._adds_space else None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the UTF-8 bytes of `ids`, which need not be whole characters, if the tokenizer loses nothing."""
        return b"".join(self._pieces[int(index)] for index in ids)

    def special_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def begins_texts(self) -> bool:
        return bool(self._tokenizer.encode("", add_special_tokens=True).ids)

    def _separator(self, special: set[int]) -> int | None:
        added = [index for index in self._tokenizer.encode("", add_special_tokens=True).ids if index in special]
        named = [self._tokenizer.token_to_id(name) for name in SEPARATORS]
        return next((index for index in (*added, *named) if index is not None), None)

    def _find_pieces(self, settings: dict[str, Any], special: set[int]) -> list[bytes]:
        """The bytes of each id; empty for special tokens, and for ids without a token."""
        kinds = set(_types(settings.get("decoder")))
        added = set(self._tokenizer.get_added_tokens_decoder())
        unknown = settings["model"].get("unk_id", settings["model"].get("unk_token"))
        unknown = self._tokenizer.token_to_id(unknown) if isinstance(unknown, str) else unknown
        letters = _byte_letters() if "ByteLevel" in kinds else None
        pieces = []
        for index in range(self.vocab_size):
            piece = self._tokenizer.id_to_token(index)
            if piece is None or index in special or index == unknown:
                pieces.append(b"")
            elif index in added:
                pieces.append(piece.encode())
            elif letters is not None:
                is_spelt = all(letter in letters for letter in piece)
                pieces.append(bytes(letters[letter] for letter in piece) if is_spelt else piece.encode())
            elif byte := BYTE_PIECE.fullmatch(piece):
                pieces.append(bytes([int(byte[1], 16)]))
            else:
                pieces.append(piece.replace(META, " ").encode())
        return pieces


def read_hf(path: Path) -> bytes:
    """Returns the tokenizer.json at `path`, a file or its folder, or one made from vocab.json and merges.txt there.

    Raises ConfigError if there is none.
    """
    if path.is_dir():
        path = path / (TOKENIZER_JSON if (path / TOKENIZER_JSON).is_file() else VOCAB_JSON)
        if not path.is_file():
            raise ConfigError(f"{path.parent} has neither {TOKENIZER_JSON} nor {VOCAB_JSON} with {MERGES_TXT}")
    content = read_file(path, max_bytes=MAX_VOCAB_FILE_BYTES)
    found = _parse(content, path)
    if "model" in found and not isinstance(found["model"], int):
        return content
    if not found or not all(isinstance(index, int) for index in found.values()):
        raise ConfigError(f"{path} is neither a tokenizer.json nor a vocabulary of tokens and their ids")
    return _from_merges(found, read_file(path.with_name(MERGES_TXT), max_bytes=MAX_VOCAB_FILE_BYTES), path)


def parse_tokenizer_json(content: bytes, name: object) -> dict[str, Any]:
    """Parses a tokenizer.json. ConfigError if it is none."""
    settings = _parse(content, name)
    if not isinstance(settings.get("model"), dict) or "vocab" not in settings["model"]:
        raise ConfigError(f"{name} is not a tokenizer.json: it has no vocabulary")
    return settings


def vocab_size_of(settings: dict[str, Any]) -> int:
    """The largest id plus one. There may be fewer tokens than that."""
    vocab = settings["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return max(*ids, *(token["id"] for token in settings.get("added_tokens") or ()), 0, 0) + 1


def _parse(content: bytes, name: object) -> dict[str, Any]:
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name} is not a tokenizer: it holds no JSON object")
    return found


def _from_merges(vocab: dict[str, int], merges: bytes, path: Path) -> bytes:
    """Writes the tokenizer.json of a byte-level BPE such as GPT-2's or RoBERTa's."""
    if missing := [letter for letter in _byte_letters() if letter not in vocab]:
        reason = f"{len(missing)} of 256 bytes have no token"
        raise ConfigError(f"{path} is not a byte-level vocabulary such as GPT-2's: {reason}; give its {TOKENIZER_JSON}")
    try:
        lines = merges.decode("utf-8-sig").splitlines()
        pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        unknown = next((pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocab), None)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.with_name(MERGES_TXT)} is not UTF-8 text: {error.reason}") from None
    if unknown is not None:
        raise ConfigError(f"{path.with_name(MERGES_TXT)} and {VOCAB_JSON} do not match: {' '.join(unknown)!r}")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    settings = {
        "version": "1.0",
        "added_tokens": sorted(
            ({"id": vocab[token], "content": token} | flags for token in SPECIAL if token in vocab),
            key=lambda token: token["id"],
        ),
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model | {"vocab": vocab, "merges": [" ".join(pair) for pair in pairs]},
    }
    return json.dumps(settings, ensure_ascii=False).encode()


def _types(part: Any) -> Iterator[str]:
    """The types of a decoder and of those inside it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.get("decoders") or ():
            yield from _types(inner)


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level BPE, as in GPT-2's encoder.py: `bytes_to_unicode`."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


@contextmanager
def _parallelism(wanted: bool) -> Iterator[None]:
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = str(wanted).lower()
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before
