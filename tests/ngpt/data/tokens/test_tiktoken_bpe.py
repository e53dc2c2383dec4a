"""Files of tiktoken ranks are read as the library's own encodings read them, and never by a guess."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public as public

from ngpt.config.base import ConfigError
from ngpt.data.tokens.tiktoken_bpe import ENCODINGS, load_tiktoken, tiktoken_vocab_size
from ngpt.data.tokens.tokenizer import load_tokenizer, parse_spec, tokenizer_identity, tokenizer_vocab_size
from tests.helpers.vocabularies import RANKS, write_ranks

TEXT = "The the  dog's DOG'S 1000000\r\n\n  x = {a}/b\t\n caf\u00e9 \u65e5\u672c \U0001f600 <|endoftext|> "


def published(name: str) -> tiktoken.Encoding:
    """The encoding of the library, with our ranks instead of those that it downloads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: RANKS)
        settings = public.ENCODING_CONSTRUCTORS[name]()
    settings.pop("explicit_n_vocab", None)
    return tiktoken.Encoding(**settings)


@pytest.mark.parametrize("name", ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_a_file_of_ranks_encodes_as_the_library_does(tmp_path: Path, name: str) -> None:
    content, reference = write_ranks(tmp_path / "a.tiktoken").read_bytes(), published(name)
    tokenizer = load_tiktoken(f"{name}:{tmp_path / 'a.tiktoken'}", content)
    ids, sizes = tokenizer.encode(TEXT), tokenizer.token_bytes()
    assert ids.tolist() == reference.encode_ordinary(TEXT) and tokenizer.decode(ids) == TEXT
    assert sizes[ids].sum() == len(TEXT.encode()) and len(sizes) == tokenizer.vocab_size == reference.n_vocab
    assert tokenizer.document_separator == reference.eot_token not in ids and sizes[reference.eot_token] == 0
    assert tokenizer.decode([tokenizer.vocab_size - 1, 1000]) == reference.decode(
        [tokenizer.vocab_size - 1]
    )  # 1000: none


def test_the_vocabularies_of_published_encodings_are_known_without_a_download() -> None:
    sizes = {name: encoding.vocab_size for name, encoding in ENCODINGS.items()}
    assert {name: tiktoken_vocab_size(name, None) for name in sizes} == sizes
    assert sizes["cl100k_base"] == 100_277 and sizes["o200k_base"] == 200_019 and sizes["llama3"] == 128_000 + 256
    assert sizes["r50k_base"] == tokenizer_vocab_size("tiktoken:r50k_base") == 50_257


def test_special_tokens_of_llama_3_and_qwen_follow_the_ranks_of_their_file(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "tokenizer.model")
    for name, special in (("llama3", 256), ("qwen", 208)):
        tokenizer = load_tokenizer(f"tiktoken:{name}:{path}", None)
        assert tokenizer.vocab_size == len(RANKS) + special == tokenizer_vocab_size(f"tiktoken:{name}:{path}")
        assert tokenizer.document_separator == len(RANKS) and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    digits = [len(load_tokenizer(f"tiktoken:{name}:{path}", None).encode("0000")) for name in ("llama3", "qwen")]
    assert digits == [3, 4]  # groups of three digits, single digits


def test_a_file_alone_is_the_encoding_that_published_it_or_has_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_ranks(tmp_path / "a.tiktoken")
    with pytest.raises(ConfigError, match=rf"write tiktoken:NAME:{path} with one of r50k_base, .*llama3"):
        load_tokenizer(str(path), None)
    monkeypatch.setitem(ENCODINGS, "r50k_base", ENCODINGS["r50k_base"]._replace(sha256=sha256_of(path)))
    named = f"tiktoken:r50k_base:{path}"
    assert load_tokenizer(str(path), None).sha256 == load_tokenizer(named, None).sha256
    assert tokenizer_identity(str(path)) == tokenizer_identity(named) == tokenizer_identity("tiktoken:r50k_base")
    assert tokenizer_identity(named) != tokenizer_identity(f"tiktoken:p50k_base:{path}")  # the pattern may differ


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_ranks_under_the_name_of_a_sentencepiece_model_are_recognised(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=rf"is a file of tiktoken ranks, write tiktoken:llama3:{path}"):
        load_tokenizer(str(path), None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"dGhl\n"), "line 268 is not a token in base64"),
        (lambda path: path.write_bytes(path.read_bytes() + b"d!hl 9\n"), "line 268 is not a token in base64"),
        (lambda path: write_ranks(path, {b"a": 0}), "not a byte-level vocabulary"),
        (lambda path: write_ranks(path, RANKS | {b"zz": 3}), "not a byte-level vocabulary"),
        (lambda path: write_ranks(path, RANKS | {b"zz": 50256}), "not those of r50k_base: 50256 is the id of"),
    ],
)
def test_a_damaged_file_of_ranks_is_one_line(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    path = write_ranks(tmp_path / "a.tiktoken")
    spoil(path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(f"tiktoken:r50k_base:{path}", None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tiktoken:cl100k", "did you mean 'cl100k_base'"),
        ("tiktoken:llama3", "give its file as tiktoken:llama3:FILE"),
        ("tiktoken:", "unknown tokenizer"),
    ],
)
def test_an_encoding_that_cannot_be_had_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(spec)


def test_without_network_or_library_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_encoding(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(ConfigError, match=r"cannot download the r50k_base tokenizer .*tiktoken:r50k_base:FILE"):
        load_tokenizer("tiktoken:r50k_base", None)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ConfigError, match=r"pip install 'ngpt-campaign\[gpt2\]'"):
        load_tokenizer("tiktoken:r50k_base", None)
