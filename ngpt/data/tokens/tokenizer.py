"""Tokenizers: a sentencepiece model trained on the corpus, or a given one of any family.

Every tokenizer knows the number of UTF-8 bytes of each id. They add up to the bytes of the text exactly, which makes
bits per byte comparable between tokenizers.

Trained models are BPE, not unigram: BPE merges by integer counts, so every machine learns the same vocabulary.
"""

import hashlib
import io
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.config.base import ConfigError, unknown_message
from ngpt.data.text.documents import read_file
from ngpt.data.tokens.formats import token_dtype
from ngpt.data.tokens.gpt2_bpe import gpt2_identity, gpt2_vocab_size, load_gpt2
from ngpt.data.tokens.hf_tokenizer import TOKENIZER_JSON, HFTokenizer, parse_tokenizer_json, read_hf, vocab_size_of
from ngpt.data.tokens.shards import MAX_VOCAB
from ngpt.data.tokens.tiktoken_bpe import (
    MAX_VOCAB_FILE_BYTES,
    RANKS_FILE,
    TiktokenTokenizer,
    check_argument,
    load_tiktoken,
    looks_like_ranks,
    ranks_path,
    tiktoken_sha256,
    tiktoken_vocab_size,
)
from ngpt.system.atomic_files import write_atomic

MODEL_FILE = "tokenizer.model"
# By kind of spec: the file that a prepared corpus and a checkpoint keep, so that they need no other.
MODEL_FILES = {"sentencepiece": MODEL_FILE, "model": MODEL_FILE, "hf": TOKENIZER_JSON, "tiktoken": RANKS_FILE}
META = "\u2581"  # how sentencepiece writes a space
SPECS = ("sentencepiece:SIZE", "PATH.model", "gpt2", "gpt2:DIR", "tokenizer.json", "hf:DIR", "tiktoken:NAME")
SAMPLE_BLOCK = 4096  # characters
SAMPLE_BLOCKS = 512  # so training uses at most 2 MB of text
# What tokenizers tend to lose: leading and double spaces, line ends, ligatures, unknown characters.
PROBE = "  two  spaces\n\n\tTab\r\n\ufb01 \u2163 \xe9 e\u0301 \xa0\u3000 \u65e5\u672c \U0001f600\ue000 end "


class SentencePieceTokenizer:
    """A sentencepiece model. Models trained here are lossless; others may change text.

    `document_separator` is the id of the token that starts a document; None if there is no such token.
    """

    def __init__(self, model: bytes, name: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self.name = name
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._model: Any = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)  # the constructor accepts an empty model
        except RuntimeError:
            hint = f": it is a file of tiktoken ranks, write tiktoken:llama3:{name}" if looks_like_ranks(model) else ""
            raise ConfigError(f"{name} is not a sentencepiece model{hint}") from None
        self.vocab_size: int = self._model.vocab_size()
        marks = [index for index in (self._model.bos_id(), self._model.eos_id()) if index >= 0]
        self.document_separator: int | None = marks[0] if marks else None
        self._pieces = [_piece_bytes(self._model, index) for index in range(self.vocab_size)]
        self._token_bytes = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        # A literal META would decode to a space, and a space to META if the training text had none. Both are encoded as
        # bytes instead.
        lacks_space = self._model.is_unknown(self._model.piece_to_id(META))
        self._spelt = {
            sign: [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in sign.encode()]
            for sign in ((META, " ") if lacks_space else (META,))
        }
        self._apart = re.compile(f"([{''.join(self._spelt)}])")
        self._by_line = False
        encoded = self.decode_bytes(self.encode(PROBE))
        self._lossless = encoded == PROBE.encode()
        # As in LLaMA, the first word of a text gets a space before it.
        self._adds_space = encoded == b" " + PROBE.encode() and self.document_separator is not None
        if self._adds_space:
            self._token_bytes[self.document_separator] = -1
        # If no piece crosses a line end, lines can be encoded separately, which is four times as fast.
        self._by_line = self._lossless and not any(b"\n" in piece for piece in self._pieces if piece != b"\n")

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, (N,) as `token_dtype` says, without the document separator."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int) -> list[np.ndarray]:
        """`encode` for several texts, in native threads."""
        parts = [list(self._parts(text)) for text in texts]
        flat = [part for text in parts for part in text if part not in self._spelt]
        encoded = iter(self._model.encode(flat, num_threads=threads))
        ids = ((self._spelt[part] if part in self._spelt else next(encoded) for part in text) for text in parts)
        return [np.fromiter(chain.from_iterable(text), dtype=token_dtype(self.vocab_size)) for text in ids]

    def _parts(self, text: str) -> Iterator[str]:
        """Splits text into characters that are encoded as bytes, and the lines or text between them."""
        for part in self._apart.split(text):
            if self._by_line and part not in self._spelt:
                yield from io.StringIO(part, newline="\n")
            else:
                yield part

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        if self._lossless:
            return self.decode_bytes(ids).decode(errors="replace")
        return self._model.decode([int(index) for index in ids])  # the changed text

    def token_bytes(self) -> np.ndarray | None:
        """Returns the UTF-8 bytes of each id, (V,) int64; None if the tokenizer changes text.

        The document separator has 0 bytes, or -1 to offset the space that some models add before a text.
        """
        return self._token_bytes if self._lossless or self._adds_space else None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the UTF-8 bytes of `ids`, which need not be whole characters, if the tokenizer loses nothing."""
        return b"".join(self._pieces[index] for index in ids)

    def special_tokens(self) -> dict[str, int]:
        """Returns the tokens that no text is encoded to, by their text."""
        model = self._model
        return {model.id_to_piece(index): index for index in range(self.vocab_size) if model.is_control(index)}

    def begins_texts(self) -> bool:
        """Whether the tokenizer's own program puts a special token before every text, as those of Llama do."""
        return self._model.bos_id() >= 0


Tokenizer = SentencePieceTokenizer | TiktokenTokenizer | HFTokenizer


def load_tokenizer(spec: str, folder: Path | None) -> Tokenizer:
    """Loads a tokenizer, first from its file in `folder` of a prepared corpus. ConfigError if it cannot."""
    kind, argument = parse_spec(spec)
    kept = folder / MODEL_FILES[kind] if folder and kind in MODEL_FILES else None
    content = read_file(kept, max_bytes=MAX_VOCAB_FILE_BYTES) if kept and kept.is_file() else read_model(spec)
    if kind == "gpt2":
        loaded: Tokenizer = load_gpt2(_path(argument))
    elif kind == "tiktoken":
        loaded = load_tiktoken(argument, content)
    elif content is None:
        raise ConfigError(f"{spec} is trained on a corpus: {folder or 'no folder'} has no {MODEL_FILE}")
    else:
        loaded = HFTokenizer(content, spec, PROBE) if kind == "hf" else SentencePieceTokenizer(content, spec)
    _check_vocab(loaded.name, loaded.vocab_size)
    return loaded


def read_model(spec: str) -> bytes | None:
    """Reads the file that a spec names, as a prepared corpus keeps it; None if it names none."""
    kind, argument = parse_spec(spec)
    if kind == "hf":
        return read_hf(Path(os.path.expanduser(argument)))
    path = _file(kind, argument)
    return None if path is None else read_file(path, max_bytes=MAX_VOCAB_FILE_BYTES)


def model_sha256(spec: str, content: bytes) -> str:
    """The `sha256` of the tokenizer that has this file."""
    kind, argument = parse_spec(spec)
    return tiktoken_sha256(argument, content) if kind == "tiktoken" else hashlib.sha256(content).hexdigest()


def with_path(spec: str, change: Callable[[Path], Path]) -> str:
    """Returns a spec whose path, if it has one, is changed, for example made absolute. ConfigError for a bad spec."""
    kind, argument = parse_spec(spec)
    if kind == "tiktoken":
        path = ranks_path(argument)
        return spec if path is None else f"tiktoken:{argument.partition(':')[0]}:{change(path)}"
    if kind == "sentencepiece" or not argument:
        return spec
    path = str(change(Path(os.path.expanduser(argument))))
    return path if kind == "model" else f"{kind}:{path}"


def names_file(spec: str) -> bool:
    """Whether a spec has the path of a file or folder."""
    kind, argument = parse_spec(spec)
    return kind in ("model", "hf") or (kind == "gpt2" and argument != "") or _file(kind, argument) is not None


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a lossless BPE vocabulary on a uniform sample of `texts` and writes the model, deterministically.

    Text is not normalized, line ends are separate tokens, and rare characters are encoded as bytes. Raises ConfigError
    if there is no text, or `vocab_size` is too small for its characters or too large for its length.
    """
    from sentencepiece import SentencePieceTrainer

    lines = [line for block in _sample(texts) for line in block.split("\n") if line]
    if not lines:
        raise ConfigError("the corpus has no text to train a tokenizer on")
    model = io.BytesIO()
    train: Any = SentencePieceTrainer.train
    try:
        train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation is one token
            byte_fallback=True,
            user_defined_symbols=["\n"],
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * SAMPLE_BLOCK,  # bytes; no line of a block is longer
            num_threads=1,  # the number is written into the model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, vocab_size) from None
    write_atomic(path, model.getvalue())


def parse_spec(spec: str) -> tuple[str, str]:
    """Returns kind and argument of a spec; ConfigError for another.

    | spec | kind, argument |
    |---|---|
    | `sentencepiece:2048` | sentencepiece, 2048 |
    | `PATH.model` | model, PATH.model |
    | `gpt2`, `gpt2:DIR` | gpt2, empty or DIR |
    | `PATH.json`, `hf:PATH` | hf, PATH of a file or folder |
    | `tiktoken:NAME`, `tiktoken:NAME:FILE`, `FILE.tiktoken` | tiktoken, `NAME`, `NAME:FILE` or `:FILE` |
    """
    kind, _, argument = spec.partition(":")
    if spec == "gpt2" or (kind in ("gpt2", "hf") and argument):
        return kind, argument
    if kind == "tiktoken" and argument:
        check_argument(argument)
        return kind, argument
    if kind == "sentencepiece" and re.fullmatch(r"[0-9]{1,9}", argument):
        _check_vocab(spec, int(argument))
        return kind, argument
    if spec.endswith(".model"):
        return "model", spec
    if spec.endswith(".json"):
        return "hf", spec
    if spec.endswith(".tiktoken"):
        return "tiktoken", f":{spec}"
    if spec.endswith(".pkl"):
        raise ConfigError(f"{spec} is a pickle, which could run any code when it is read; give its tokenizer.json")
    if os.path.isdir(os.path.expanduser(spec)):
        raise ConfigError(f"{spec} is a folder: write hf:{spec} or gpt2:{spec}, or name a file in it")
    raise ConfigError(unknown_message("tokenizer", spec, SPECS))


def tokenizer_vocab_size(spec: str) -> int:
    """Returns the vocabulary size without training or downloading. Raises ConfigError for a bad spec or file."""
    kind, argument = parse_spec(spec)
    if kind == "sentencepiece":
        return int(argument)
    if kind == "model":
        return load_tokenizer(spec, None).vocab_size
    if kind == "gpt2":
        size = gpt2_vocab_size(_path(argument))
    elif kind == "hf":
        size = vocab_size_of(parse_tokenizer_json(read_hf(Path(os.path.expanduser(argument))), spec))
    else:
        size = tiktoken_vocab_size(argument, read_model(spec))
    _check_vocab(spec, size)
    return size


def tokenizer_identity(spec: str) -> str:
    """Returns the tokenizer's part of a cache key. It depends on the vocabulary, not on the location of its files."""
    kind, argument = parse_spec(spec)
    if kind == "sentencepiece":
        return spec
    if kind == "gpt2":
        return f"gpt2:{gpt2_identity(_path(argument))}"
    if kind == "tiktoken":
        return f"tiktoken:{tiktoken_sha256(argument, read_model(spec))}"
    return f"{kind}:{hashlib.sha256(read_model(spec) or b'').hexdigest()}"


def _file(kind: str, argument: str) -> Path | None:
    if kind == "model":
        return Path(os.path.expanduser(argument))
    return ranks_path(argument) if kind == "tiktoken" else None


def _path(argument: str) -> Path | None:
    return Path(os.path.expanduser(argument)) if argument else None


def _check_vocab(name: str, size: int) -> None:
    if not 1 <= size <= MAX_VOCAB:
        raise ConfigError(f"{name} has {size} tokens; a vocabulary has 1 to {MAX_VOCAB}")


def _piece_bytes(model: Any, index: int) -> bytes:
    """The bytes of a piece; empty for control and unknown pieces."""
    piece: str = model.id_to_piece(index)
    if model.is_byte(index):
        return bytes([int(piece[3:5], 16)])  # <0xE2>
    if model.is_control(index) or model.is_unknown(index):
        return b""
    return piece.replace(META, " ").encode()


def _sample(texts: Iterable[str]) -> list[str]:
    """Samples at most SAMPLE_BLOCKS blocks uniformly in one pass."""
    sample: list[str] = []
    rng = random.Random(0)
    for index, block in enumerate(_blocks(texts)):
        if len(sample) < SAMPLE_BLOCKS:
            sample.append(block)
        elif (slot := rng.randrange(index + 1)) < SAMPLE_BLOCKS:  # reservoir sampling, algorithm R
            sample[slot] = block
    return sample


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        rest += text
        whole = len(rest) - len(rest) % SAMPLE_BLOCK
        yield from (rest[start : start + SAMPLE_BLOCK] for start in range(0, whole, SAMPLE_BLOCK))
        rest = rest[whole:]
    if rest:
        yield rest


def _explain(error: RuntimeError, vocab_size: int) -> Exception:
    """Converts the trainer's two errors about the vocabulary size to ConfigErrors; returns others unchanged."""
    spec, text = f"sentencepiece:{vocab_size}", str(error)
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return ConfigError(f"{spec} is too small for the corpus' characters: take at least {needed[1]}")
    if most := re.search(r"set it to a value <= (\d+)", text):
        return ConfigError(f"{spec} is too large for this amount of text: take at most {most[1]}")
    return error
