"""GPT-2's tokenizer through tiktoken (extra `gpt2`), which downloads it or reads encoder.json and vocab.bpe."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError
from ngpt.data.text.documents import read_file
from ngpt.data.tokens.tiktoken_bpe import END_OF_TEXT, GPT2_PATTERN, MAX_VOCAB_FILE_BYTES, TiktokenTokenizer

VOCAB_SIZE = 50257
# SHA-256 as published in tiktoken_ext/openai_public.py.
FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def load_gpt2(folder: Path | None) -> TiktokenTokenizer:
    """Loads the tokenizer from a folder, or through tiktoken's download; raises ConfigError if it cannot."""
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ModuleNotFoundError:
        advice = "pip install 'ngpt-campaign[gpt2]', or take sentencepiece:SIZE"
        raise ConfigError(f"tokenizer gpt2 needs tiktoken: {advice}") from None
    if folder is None:
        try:
            return _tokenizer(tiktoken.get_encoding("gpt2"), None)
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
    special = {END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return _tokenizer(encoding, folder)


def gpt2_vocab_size(folder: Path | None) -> int:
    """Returns the vocabulary size without tiktoken. ConfigError if the folder has no readable encoder.json."""
    if folder is None:
        return VOCAB_SIZE
    path = folder / "encoder.json"
    try:
        return len({END_OF_TEXT, *json.loads(read_file(path, max_bytes=MAX_VOCAB_FILE_BYTES))})
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a vocabulary: {error}") from None


def gpt2_identity(folder: Path | None) -> str:
    """Hashes the two files, without tiktoken or network; a local copy and the download have the same hash."""
    hashes = FILES if folder is None else _hashes(folder)
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def _tokenizer(encoding: Any, folder: Path | None) -> TiktokenTokenizer:
    return TiktokenTokenizer(encoding, name="gpt2", sha256=gpt2_identity(folder), separator=END_OF_TEXT)


def _hashes(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(read_file(folder / name, max_bytes=MAX_VOCAB_FILE_BYTES)).hexdigest() for name in FILES
    }
