"""Small tokenizers of the kinds that people bring along."""

import base64
import io
import json
from itertools import chain
from pathlib import Path
from typing import Any

import sentencepiece

ENGLISH = "the quick brown fox jumps over the lazy dog\n    and then it sleeps\nwhile the dog thinks of the fox\n" * 20


# Tokens of a byte-level BPE with their ranks.
MERGES = [b"th", b"the", b" the", b"00", b"\n\n", b"'s", b"'S", b"ab", b" \n", b"\r\n", b"  "]
RANKS = {bytes([byte]): byte for byte in range(256)} | {token: 256 + index for index, token in enumerate(MERGES)}


def write_gpt2(folder: Path, *, vocab_size: int = 260) -> Path:
    """A vocabulary in the format of the GPT-2 release: 256 bytes, merges (three by default), the special token last."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    space = chr(256 + others.index(32))
    merges = {"th": ("t", "h"), "the": ("th", "e"), f"{space}the": (space, "the")}
    firsts = sorted(letters, key="t".find, reverse=True)  # so that merges of three letters begin with t
    pairs = [(first, second) for first in firsts for second in letters]
    for left, right in chain(pairs, ((f"{first}{second}", third) for first, second in pairs for third in letters)):
        if len(letters) + len(merges) + 1 >= vocab_size:
            break
        merges.setdefault(left + right, (left, right))
    vocabulary = [*letters, *merges, "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({piece: index for index, piece in enumerate(vocabulary)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, merges.values()), ""]))
    return folder


def write_llama(path: Path, *, model_type: str = "bpe", vocab_size: int = 330, **options: Any) -> Path:
    """A sentencepiece model with LLaMA's settings: <unk> 0, <s> 1, </s> 2, then 256 bytes; a space goes first."""
    model = io.BytesIO()
    settings = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    train: Any = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=iter(ENGLISH.splitlines()), model_writer=model, **(settings | options))
    path.write_bytes(model.getvalue())
    return path


def write_ranks(path: Path, ranks: dict[bytes, int] = RANKS) -> Path:
    """A file of tiktoken ranks: a token in base64 and its rank on each line."""
    path.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()))
    return path


def write_marked(path: Path, *, begins: bool) -> Path:
    """A tokenizer.json with <s> 2 and </s> 3; if it `begins`, its post-processor puts <s> before each text."""
    from tokenizers import Tokenizer, models, processors

    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.save(str(path))
    return path
