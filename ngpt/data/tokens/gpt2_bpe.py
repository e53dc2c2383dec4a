"""GPT-2's tokenizer through tiktoken (extra `gpt2`), which downloads it or reads encoder.json and vocab.bpe."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.config.base import ConfigError
from ngpt.data.text.documents import read_file
from ngpt.data.tokens.formats import token_dtype

VOCAB_SIZE = 50257
MAX_VOCAB_FILE_BYTES = 1 << 26  # bytes of a tokenizer file; 250,000 tokens take 5 to 20 million
SPECIAL = "<|endoftext|>"
# SHA-256 as published in tiktoken_ext/openai_public.py.
FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# GPT-2's splitting rule in the form that tiktoken uses (openai_public.py: r50k_pat_str).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, with the methods of `SentencePieceTokenizer`; special tokens in a text are plain text."""

    name = "gpt2"

    def __init__(self, encoding: Any, *, sha256: str) -> None:
        self.sha256 = sha256
        self.vocab_size: int = encoding.n_vocab
        self.document_separator: int | None = encoding.eot_token
        self._encoding = encoding
        sizes = [len(encoding.decode_single_token_bytes(index)) for index in range(encoding.n_vocab)]
        sizes[encoding.eot_token] = 0  # the document separator has no text
        self._token_bytes = np.array(sizes, dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int) -> list[np.ndarray]:
        encoded = self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)
        return [np.array(ids, dtype=token_dtype(self.vocab_size)) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(index) for index in ids])

    def token_bytes(self) -> np.ndarray:
        return self._token_bytes


def load_gpt2(folder: Path | None) -> GPT2Tokenizer:
    """Loads the tokenizer from a folder, or through tiktoken's download; raises ConfigError if it cannot."""
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ModuleNotFoundError:
        advice = "pip install 'ngpt-campaign[gpt2]', or take sentencepiece:SIZE"
        raise ConfigError(f"tokenizer gpt2 needs tiktoken: {advice}") from None
    if folder is None:
        try:
            return GPT2Tokenizer(tiktoken.get_encoding("gpt2"), sha256=gpt2_identity(None))
        except OSError as error:  # includes the errors of requests
            advice = "pass a folder with encoder.json and vocab.bpe as gpt2:DIR"
            raise ConfigError(f"cannot download the GPT-2 tokenizer ({type(error).__name__}); {advice}") from error
    hashes = _hashes(folder)
    merges, vocabulary = str(folder / "vocab.bpe"), str(folder / "encoder.json")
    try:
        # With the hashes, tiktoken uses its own cache only if it matches the files.
        ranks = data_gym_to_mergeable_bpe_ranks(merges, vocabulary, hashes["vocab.bpe"], hashes["encoder.json"])
    except (AssertionError, KeyError, ValueError):  # tiktoken's errors for inconsistent files
        raise ConfigError(f"encoder.json and vocab.bpe in {folder} are not a GPT-2 vocabulary") from None
    special = {SPECIAL: len(ranks)}
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return GPT2Tokenizer(encoding, sha256=gpt2_identity(folder))


def gpt2_vocab_size(folder: Path | None) -> int:
    """Returns the vocabulary size without tiktoken. ConfigError if the folder has no readable encoder.json."""
    if folder is None:
        return VOCAB_SIZE
    path = folder / "encoder.json"
    try:
        return len({SPECIAL, *json.loads(read_file(path, max_bytes=MAX_VOCAB_FILE_BYTES))})
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a vocabulary: {error}") from None


def gpt2_identity(folder: Path | None) -> str:
    """Hashes the two files, without tiktoken or network; a local copy and the download have the same hash."""
    hashes = FILES if folder is None else _hashes(folder)
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(read_file(folder / name, max_bytes=MAX_VOCAB_FILE_BYTES)).hexdigest() for name in FILES
    }
