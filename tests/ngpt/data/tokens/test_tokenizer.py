"""Tokenizers: text survives them, and the bytes of the tokens add up to those of the text."""

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import ConfigError
from ngpt.data.tokens.gpt2_bpe import gpt2_identity
from ngpt.data.tokens.tokenizer import (
    Tokenizer,
    load_tokenizer,
    parse_spec,
    tokenizer_identity,
    tokenizer_vocab_size,
    train_sentencepiece,
)
from tests.helpers.vocabularies import ENGLISH, write_gpt2, write_llama

# What sentencepiece treats specially, next to any text at all.
tricky = st.sampled_from(["\n", "\n\n", "\t", "\r\n", "  ", "\u2581", "<unk>", "<0x0A>", "<s>", "\0", "the ", "é"])
texts = st.lists(st.text(max_size=8) | tricky, max_size=12).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("trained")
    train_sentencepiece([ENGLISH], 330, folder / "tokenizer.model")
    return load_tokenizer("sentencepiece:330", folder)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies in /tmp
        return load_tokenizer(f"gpt2:{gpt2_folder}", None)


def check_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    sizes = tokenizer.token_bytes()
    assert ids.dtype == np.uint16 and sizes is not None and sizes.shape == (tokenizer.vocab_size,)
    assert tokenizer.decode(ids) == text
    assert sizes[ids].sum() == len(text.encode())


@given(texts)
def test_any_text_survives_a_trained_tokenizer_and_its_bytes_add_up(trained: Tokenizer, text: str) -> None:
    check_lossless(trained, text)


@given(texts)
def test_any_text_survives_a_gpt2_tokenizer_and_its_bytes_add_up(gpt2: Tokenizer, text: str) -> None:
    check_lossless(gpt2, text)


@pytest.mark.parametrize("spaces", [0, 1])
def test_spaces_survive_a_tokenizer_trained_on_few_of_them(tmp_path: Path, spaces: int) -> None:
    """As in genes or Chinese, spaces are too rare for a piece of their own."""
    train_sentencepiece(["ACGTTGCAAGCTA\n" * 1000 + " " * spaces], 290, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer("sentencepiece:290", tmp_path)
    assert len(tokenizer.encode("AC GT")) == len(tokenizer.encode("AC")) + 1 + len(tokenizer.encode("GT"))
    check_lossless(tokenizer, " ACGT  TG \u2581 x\n A\n")


def test_training_learns_words_and_gives_line_ends_and_indentation_a_token(trained: Tokenizer) -> None:
    assert len(trained.encode(" the")) == 1
    assert len(trained.encode("\n")) == 1
    assert len(trained.encode("    ")) == 1
    assert trained.encode("\n\n").tolist() == trained.encode("\n").tolist() * 2


@given(st.text(alphabet="the fox\n é\t", max_size=60))
def test_encoding_by_line_equals_encoding_at_once(trained: Tokenizer, text: str) -> None:
    at_once = np.concatenate([trained.encode(line) for line in text.splitlines(keepends=True)] or [[]])
    assert trained.encode(text).tolist() == at_once.tolist()


def test_the_same_text_trains_the_same_bytes_however_it_is_cut(tmp_path: Path) -> None:
    text = "".join(f"{word} {index} of {index * 7919 % 1000}\n" for index, word in enumerate(ENGLISH.split() * 400))
    digests = set()
    for cut in (len(text), 701, 5000, 5000):
        pieces = (text[start : start + cut] for start in range(0, len(text), cut))
        train_sentencepiece(pieces, 400, tmp_path / "a.model")
        digests.add(hashlib.sha256((tmp_path / "a.model").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_training_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_sentencepiece([ENGLISH], 330, tmp_path / "a.model")
    with pytest.raises(ConfigError):
        train_sentencepiece([ENGLISH], 60000, tmp_path / "a.model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("texts", "size", "reason"),
    [
        ([ENGLISH], 270, "too small for the corpus' characters: take at least"),
        ([ENGLISH], 60000, "too large for this amount of text: take at most"),
        ([], 400, "no text"),
        (["\n\n"], 400, "no text"),
    ],
)
def test_an_unsuitable_vocabulary_size_is_one_clear_error(
    tmp_path: Path, texts: list[str], size: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        train_sentencepiece(texts, size, tmp_path / "a.model")
    assert not list(tmp_path.iterdir())


def test_a_foreign_model_that_changes_text_counts_no_bytes(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH.splitlines()), model_writer=model, vocab_size=36, minloglevel=2
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    tokenizer = load_tokenizer(str(path), None)
    assert tokenizer.token_bytes() is None
    assert tokenizer.decode(tokenizer.encode("the  quick fox")) == "the quick fox"
    assert tokenizer_vocab_size(str(path)) == 36 == tokenizer.vocab_size


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def llama(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tokenizer:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    return load_tokenizer(str(write_llama(path, model_type=request.param, vocab_size=290)), None)


@given(text=texts)
def test_any_text_survives_a_llama_model_and_its_bytes_add_up_with_the_mark(llama: Tokenizer, text: str) -> None:
    ids, sizes, mark = llama.encode(text), llama.token_bytes(), llama.document_separator
    assert sizes is not None and mark is not None and mark not in ids
    if text and "\u2581" not in text:  # sentencepiece's own sign for a space cannot be told from one
        assert llama.decode(ids) == text
        assert sizes[mark] + sizes[ids].sum() == len(text.encode())


@pytest.mark.parametrize(
    ("options", "mark"),
    [({}, 1), ({"bos_id": -1}, 2), ({"bos_id": -1, "eos_id": -1}, None), ({"bos_id": 7}, 7)],
)
def test_the_mark_of_a_document_is_the_models_start_or_else_its_end(
    tmp_path: Path, options: dict[str, Any], mark: int | None
) -> None:
    assert load_tokenizer(str(write_llama(tmp_path / "a.model", **options)), None).document_separator == mark


def test_a_llama_model_encodes_as_sentencepiece_does(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "a.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(str(path), None)
    assert tokenizer.vocab_size == 330 == tokenizer_vocab_size(str(path))
    for text in ("the fox", " the  fox\n", "caf\u00e9 42", "</s><s>"):
        assert tokenizer.encode(text).tolist() == reference.encode(text)


def test_document_marks_of_gpt2_and_trained_models(gpt2: Tokenizer, trained: Tokenizer) -> None:
    assert gpt2.document_separator == 259 and trained.document_separator is None


def test_a_folder_of_gpt2_files_is_read(gpt2: Tokenizer, gpt2_folder: Path) -> None:
    assert gpt2.encode("the the").tolist() == [257, 258]
    assert gpt2.vocab_size == 260 == tokenizer_vocab_size(f"gpt2:{gpt2_folder}")
    sizes = gpt2.token_bytes()
    assert sizes is not None and sizes[256:].tolist() == [2, 3, 4, 0]  # the special token stands for no text


def test_special_tokens_in_a_text_are_plain_text(gpt2: Tokenizer) -> None:
    assert 259 not in gpt2.encode("<|endoftext|>")


@pytest.mark.parametrize("damage", ["encoder.json", "vocab.bpe"])
def test_inconsistent_gpt2_files_are_refused(gpt2_folder: Path, tmp_path: Path, damage: str) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).write_bytes((gpt2_folder / name).read_bytes())
    text = (tmp_path / damage).read_text()
    (tmp_path / damage).write_text(text.replace("t h", "h t") if damage == "vocab.bpe" else text[:-2])
    with pytest.raises(ConfigError, match="are not a GPT-2 vocabulary"):
        load_tokenizer(f"gpt2:{tmp_path}", None)


def test_a_copy_of_the_gpt2_files_is_the_same_tokenizer(gpt2_folder: Path, tmp_path: Path) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).write_bytes((gpt2_folder / name).read_bytes())
    assert tokenizer_identity(f"gpt2:{tmp_path}") == tokenizer_identity(f"gpt2:{gpt2_folder}")
    assert tokenizer_identity("gpt2") == f"gpt2:{gpt2_identity(None)}" != tokenizer_identity(f"gpt2:{tmp_path}")


def test_a_missing_tiktoken_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ConfigError, match=r"pip install 'ngpt-campaign\[gpt2\]'"):
        load_tokenizer("gpt2", None)


def test_without_network_gpt2_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_encoding(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(ConfigError, match="gpt2:DIR"):
        load_tokenizer("gpt2", None)


@pytest.mark.parametrize(
    ("spec", "parsed", "size"),
    [("sentencepiece:2048", ("sentencepiece", "2048"), 2048), ("gpt2", ("gpt2", ""), 50257)],
)
def test_the_vocabulary_of_a_spec_is_known_without_files(spec: str, parsed: tuple[str, str], size: int) -> None:
    assert parse_spec(spec) == parsed
    assert tokenizer_vocab_size(spec) == size


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt3", "did you mean 'gpt2'"),
        ("gpt2:", "did you mean 'gpt2'"),
        ("sentencepiece", "did you mean 'sentencepiece:SIZE'"),
        ("sentencepiece:-5", "unknown tokenizer"),
        ("sentencepiece:0", "1 to 2147483648"),
        ("bert", "choose one of"),
    ],
)
def test_an_invalid_spec_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(spec)


def test_missing_and_broken_files_are_errors_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(str(tmp_path / "no.model"), None)
    with pytest.raises(ConfigError, match=r"no such file.*encoder\.json"):
        tokenizer_vocab_size(f"gpt2:{tmp_path}")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.model"):
        load_tokenizer("sentencepiece:400", tmp_path)
    for content in (b"", b"garbage"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ConfigError, match="is not a sentencepiece model"):
            load_tokenizer(str(tmp_path / "bad.model"), None)
