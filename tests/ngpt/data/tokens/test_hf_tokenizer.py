"""Tokenizers of the library `tokenizers` give its ids, return the text, and count its bytes."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from ngpt.config.base import ConfigError
from ngpt.data.tokens.tokenizer import load_tokenizer, tokenizer_identity, tokenizer_vocab_size
from tests.helpers.vocabularies import ENGLISH, write_gpt2

TEXTS = [
    *("", "the fox", "  two  spaces\n\n\tTab\r\n", "end ", "caf\u00e9 e\u0301 \ufb01 \u65e5\u672c \U0001f600\ue000"),
    *("<s> </s><unk> <|endoftext|>", "the quick brown fox jumps " * 50),
]
SPECIAL = [AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")]


def byte_level(**settings: Any) -> Library:
    """A BPE like GPT-2's, RoBERTa's and Llama 3's; documents start with <s>."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False, **settings
    )
    library.train_from_iterator(ENGLISH.splitlines(), trainer)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return library


def llama() -> Library:
    """A BPE like Llama 2's: a space before the text, spaces as \u2581, rare characters as bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "\u2581the", "\u2581\u2581"]
    vocab |= {piece: 259 + index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581")]
    library = Library(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(SPECIAL)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def save(library: Library, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    library.save(str(path))
    return path


@pytest.mark.parametrize("make", [byte_level, llama])
def test_ids_text_and_bytes_are_those_of_the_library(tmp_path: Path, make: Any) -> None:
    library = make()
    path = save(library, tmp_path)
    tokenizer = load_tokenizer(str(path), None)
    sizes, mark = tokenizer.token_bytes(), tokenizer.document_separator
    assert sizes is not None and mark == 1 == library.token_to_id("<s>")
    assert tokenizer.vocab_size == library.get_vocab_size() == tokenizer_vocab_size(str(path)) == len(sizes)
    library.encode_special_tokens = True  # special tokens in a text are text
    for text, batched in zip(TEXTS, tokenizer.encode_batch(TEXTS, threads=2), strict=True):
        ids = tokenizer.encode(text)
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids == batched.tolist()
        assert ids.dtype == np.uint16 and mark not in ids and tokenizer.decode(ids) == text
        if text:  # Llama's space before the text is part of its first token; the mark offsets it
            assert sizes[mark] + sizes[ids].sum() == len(text.encode())


def test_a_file_that_truncates_pads_or_drops_merges_encodes_texts_whole_and_always_the_same(tmp_path: Path) -> None:
    library = byte_level()
    expected = library.encode(TEXTS[-1], add_special_tokens=False).ids
    library.enable_truncation(4)
    library.enable_padding(length=64)
    settings = json.loads(library.to_str())
    settings["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(f"hf:{tmp_path}", None)
    assert all(tokenizer.encode(TEXTS[-1]).tolist() == expected for _ in range(3))


def test_vocab_json_and_merges_txt_are_read_as_gpt2s_files(tmp_path: Path) -> None:
    folder = write_gpt2(tmp_path)
    (folder / "vocab.json").write_bytes((folder / "encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes((folder / "vocab.bpe").read_bytes())
    reference = load_tokenizer(f"gpt2:{folder}", None)
    for spec in (f"hf:{folder}", str(folder / "vocab.json")):
        tokenizer = load_tokenizer(spec, None)
        assert (tokenizer.vocab_size, tokenizer.document_separator) == (260, 259) and tokenizer_vocab_size(spec) == 260
        assert [tokenizer.encode(text).tolist() for text in TEXTS] == [
            reference.encode(text).tolist() for text in TEXTS
        ]
        sizes, others = tokenizer.token_bytes(), reference.token_bytes()
        assert sizes is not None and others is not None and sizes.tolist() == others.tolist()
    assert tokenizer_identity(f"hf:{folder}") == tokenizer_identity(str(folder / "vocab.json"))


def test_documents_are_separated_by_the_end_of_text_where_no_post_processor_adds_a_token(tmp_path: Path) -> None:
    library = byte_level()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    assert load_tokenizer(str(save(library, tmp_path)), None).document_separator == library.token_to_id("</s>")
    library.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    assert load_tokenizer(str(save(library, tmp_path)), None).document_separator == library.token_to_id("<|endoftext|>")


def test_ids_between_the_tokens_have_no_text(tmp_path: Path) -> None:
    settings = json.loads(byte_level().to_str())
    settings["added_tokens"][-1] |= {"id": 400}
    del settings["model"]["vocab"]["</s>"]
    settings["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(f"hf:{tmp_path}", None)
    assert tokenizer.vocab_size == 401 == tokenizer_vocab_size(f"hf:{tmp_path}")
    assert tokenizer.decode([399, *tokenizer.encode("the"), 400]) == "the"


def test_a_tokenizer_that_changes_text_counts_no_bytes(tmp_path: Path) -> None:
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    assert load_tokenizer(str(save(lower, tmp_path)), None).token_bytes() is None
    words = Library(models.WordLevel({"the": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = load_tokenizer(str(save(words, tmp_path)), None)
    assert tokenizer.token_bytes() is None and tokenizer.document_separator is None
    assert tokenizer.encode("the end").tolist() == [0, 1]


def test_normal_form_c_leaves_normal_text_and_its_bytes(tmp_path: Path) -> None:
    """As Qwen's tokenizer; that a text was not normal shows in the number of its bytes."""
    library = byte_level()
    library.normalizer = normalizers.NFC()
    tokenizer = load_tokenizer(str(save(library, tmp_path)), None)
    sizes = tokenizer.token_bytes()
    assert sizes is not None
    assert sizes[tokenizer.encode("caf\u00e9")].sum() == 5 and sizes[tokenizer.encode("cafe\u0301")].sum() == 5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has neither tokenizer.json nor vocab.json with merges.txt"),
        ({"tokenizer.json": "{"}, "is not JSON"),
        ({"tokenizer.json": "[1]"}, "holds no JSON object"),
        ({"tokenizer.json": '{"version": "1.0"}'}, "neither a tokenizer.json nor a vocabulary"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "is not a tokenizer.json: it has no vocabulary"),
        ({"tokenizer.json": '{"model": {"type": "Magic", "vocab": {}}}'}, "is not a tokenizer: "),
        (
            {"vocab.json": '{"hello</w>": 0}', "merges.txt": ""},
            "256 of 256 bytes have no token; give its tokenizer.json",
        ),
        ({"vocab.json": '{"a": 0}'}, "no such file.*merges.txt|bytes have no token"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(f"hf:{tmp_path}", None)
    assert "\n" not in str(caught.value)


def test_a_folder_or_a_pickle_as_tokenizer_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"is a folder: write hf:{tmp_path}"):
        load_tokenizer(str(tmp_path), None)
    with pytest.raises(ConfigError, match="is a pickle"):
        load_tokenizer("tokenizer.pkl", None)


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(byte_level(), tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'ngpt-campaign\[hf\]'"):
        load_tokenizer(str(path), None)
