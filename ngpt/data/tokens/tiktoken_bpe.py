"""Byte-level BPE through tiktoken (extra `gpt2`): its encodings by name, and files of ranks.

Each line of such a file has a token in base64 and its rank. How text is split and which special tokens there are is not
in the file, so it is read as the encoding that is named, or as the one that published exactly this file.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ngpt.config.base import ConfigError, unknown_message
from ngpt.data.tokens.formats import token_dtype

MAX_VOCAB_FILE_BYTES = 1 << 26  # bytes of a tokenizer file; 250,000 tokens take 5 to 20 million
RANKS_FILE = "tokenizer.tiktoken"
END_OF_TEXT = "<|endoftext|>"
LLAMA3_BEGIN = b"<|begin_of_text|>"
# GPT-2's splitting rule in the form that tiktoken uses (openai_public.py: r50k_pat_str).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Encoding(NamedTuple):
    """What a file of ranks does not say.

    `special` maps special tokens to ids, or lists those that follow the ranks. `separator` is the one that separates
    documents. `sha256` (None if not known) and `vocab_size` are those of the published file.
    """

    pattern: str
    special: Mapping[str, int] | Sequence[str]
    separator: str
    sha256: str | None
    vocab_size: int


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# The first four as in tiktoken_ext/openai_public.py. Llama 3 as in meta-llama/llama3, llama/tokenizer.py; Qwen as in
# Qwen/Qwen-7B, tokenization_qwen.py.
ENCODINGS: dict[str, Encoding] = {
    "r50k_base": Encoding(
        GPT2_PATTERN,
        {END_OF_TEXT: 50256},
        END_OF_TEXT,
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        50257,
    ),
    "p50k_base": Encoding(
        GPT2_PATTERN,
        {END_OF_TEXT: 50256},
        END_OF_TEXT,
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
        50281,
    ),
    "cl100k_base": Encoding(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        END_OF_TEXT,
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        100277,
    ),
    "o200k_base": Encoding(
        "|".join(
            [
                rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{O200K_CONTRACTIONS}",
                rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{O200K_CONTRACTIONS}",
                r"\p{N}{1,3}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
                r"\s*[\r\n]+",
                r"\s+(?!\S)",
                r"\s+",
            ]
        ),
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
        END_OF_TEXT,
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        200019,
    ),
    "llama3": Encoding(
        LLAMA3_PATTERN,
        (
            *("<|begin_of_text|>", "<|end_of_text|>"),
            *(f"<|reserved_special_token_{number}|>" for number in range(4)),
            *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
            *(f"<|reserved_special_token_{number}|>" for number in range(5, 251)),
        ),
        "<|begin_of_text|>",
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        128256,
    ),
    "qwen": Encoding(
        LLAMA3_PATTERN.replace("{1,3}", ""),  # a token for each digit
        (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))),
        END_OF_TEXT,
        None,
        151851,
    ),
}
DOWNLOADED = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")  # by tiktoken itself


class TiktokenTokenizer:
    """An encoding of tiktoken, with the methods of `SentencePieceTokenizer`; special tokens in a text are plain."""

    def __init__(self, encoding: Any, *, name: str, sha256: str, separator: str) -> None:
        self.name = name
        self.sha256 = sha256
        self.vocab_size: int = encoding.n_vocab
        self.document_separator: int = encoding.encode_single_token(separator)
        self._encoding = encoding
        special = {encoding.encode_single_token(token): token.encode() for token in encoding.special_tokens_set}
        self._pieces = [special.get(index) or _piece(encoding, index) for index in range(self.vocab_size)]
        sizes = [0 if index in special else len(piece) for index, piece in enumerate(self._pieces)]
        self._token_bytes = np.array(sizes, dtype=np.int64)
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int) -> list[np.ndarray]:
        encoded = self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)
        return [np.array(ids, dtype=self._dtype) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the UTF-8 bytes of `ids`, which need not be whole characters."""
        return b"".join(self._pieces[int(index)] for index in ids)

    def token_bytes(self) -> np.ndarray:
        return self._token_bytes

    def special_tokens(self) -> dict[str, int]:
        return {token: self._encoding.encode_single_token(token) for token in self._encoding.special_tokens_set}

    def begins_texts(self) -> bool:
        return self._pieces[self.document_separator] == LLAMA3_BEGIN


def check_argument(argument: str) -> None:
    """Checks `NAME`, `NAME:FILE` or `:FILE`, without reading the file. ConfigError if it is none of them."""
    name, _, file = argument.partition(":")
    if name not in ENCODINGS and not (file and not name):
        raise ConfigError(unknown_message("tiktoken encoding", name, ENCODINGS))
    if not file and name not in DOWNLOADED:
        raise ConfigError(f"tiktoken has no {name} of its own: give its file as tiktoken:{name}:FILE")


def ranks_path(argument: str) -> Path | None:
    """The file in `NAME:FILE` or `:FILE`."""
    file = argument.partition(":")[2]
    return Path(file).expanduser() if file else None


def encoding_name(argument: str, content: bytes | None) -> str:
    """The name in an argument, or of the encoding that published a file with this content. ConfigError if none did."""
    name, _, file = argument.partition(":")
    if name or content is None:
        return name
    sha256 = hashlib.sha256(content).hexdigest()
    known = next((known for known, encoding in ENCODINGS.items() if encoding.sha256 == sha256), None)
    if known is None:
        names = ", ".join(ENCODINGS)
        raise ConfigError(f"{file} does not say how it splits text: write tiktoken:NAME:{file} with one of {names}")
    return known


def load_tiktoken(argument: str, content: bytes | None) -> TiktokenTokenizer:
    """Loads an encoding from a file of ranks, or through tiktoken's download; ConfigError if it cannot."""
    try:
        import tiktoken
    except ModuleNotFoundError:
        raise ConfigError("tiktoken encodings need tiktoken: pip install 'ngpt-campaign[gpt2]'") from None
    name = encoding_name(argument, content)
    if content is None:
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError as error:  # includes the errors of requests
            advice = f"pass its file as tiktoken:{name}:FILE"
            raise ConfigError(f"cannot download the {name} tokenizer ({type(error).__name__}); {advice}") from error
    else:
        ranks = parse_ranks(content, str(ranks_path(argument) or name))
        special, pattern = _special_tokens(name, ranks), ENCODINGS[name].pattern
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    sha256 = tiktoken_sha256(argument, content)
    return TiktokenTokenizer(encoding, name=f"tiktoken:{name}", sha256=sha256, separator=ENCODINGS[name].separator)


def tiktoken_sha256(argument: str, content: bytes | None) -> str:
    """A hash of the name and the file of ranks, by default the published one."""
    name = encoding_name(argument, content)
    ranks = ENCODINGS[name].sha256 if content is None else hashlib.sha256(content).hexdigest()
    return hashlib.sha256(f"{name}:{ranks}".encode()).hexdigest()


def tiktoken_vocab_size(argument: str, content: bytes | None) -> int:
    """Returns the vocabulary size without tiktoken."""
    name = encoding_name(argument, content)
    if content is None:
        return ENCODINGS[name].vocab_size
    ranks = parse_ranks(content, str(ranks_path(argument) or name))
    return max(*ranks.values(), *_special_tokens(name, ranks).values()) + 1


def looks_like_ranks(content: bytes) -> bool:
    """Whether a file is one of ranks; Llama 3 publishes it under the name of a sentencepiece model."""
    try:
        return len(parse_ranks(content[:4096].rpartition(b"\n")[0], "", is_part=True)) > 1
    except ConfigError:
        return False


def parse_ranks(content: bytes, where: str, *, is_part: bool = False) -> dict[bytes, int]:
    """Parses a file of ranks. ConfigError with the line if it is none, or not a byte-level vocabulary."""
    ranks: dict[bytes, int] = {}
    lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ConfigError(f"{where}, line {number} is not a token in base64 and its rank") from None
    if not is_part:
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing or len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
            raise ConfigError(f"{where} is not a byte-level vocabulary: a byte is missing, or a rank occurs twice")
    return ranks


def _special_tokens(name: str, ranks: Mapping[bytes, int]) -> dict[str, int]:
    special = ENCODINGS[name].special
    ids = dict(special) if isinstance(special, Mapping) else {token: len(ranks) + i for i, token in enumerate(special)}
    if clashes := sorted(set(ids.values()) & set(ranks.values())):
        raise ConfigError(f"the ranks are not those of {name}: {clashes[0]} is the id of one of its special tokens")
    return ids


def _piece(encoding: Any, index: int) -> bytes:
    """The bytes of a token; empty for an id without one, as there are some between the special tokens."""
    try:
        return encoding.decode_single_token_bytes(index)
    except KeyError:
        return b""
