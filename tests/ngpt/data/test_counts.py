"""Tokens, bytes, words and documents of scored text, against the text itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.data.counts import ScoredCounts
from ngpt.data.tokens.tokenizer import Tokenizer, load_tokenizer
from ngpt.data.windows import Passage, windows
from tests.helpers.vocabularies import write_gpt2, write_llama

# White space of one and of three bytes, which byte-level tokens divide, and letters around it.
words = st.text(st.sampled_from("the t\n\u3000\u2003\xa0\xe9\U0001f600"), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(f"gpt2:{write_gpt2(tmp_path_factory.mktemp('gpt2'))}", None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(write_llama(tmp_path_factory.mktemp("llama") / "small.model")), None)


def count(tokenizer: Tokenizer, passages: list[Passage], *, stride: int = 3) -> ScoredCounts:
    counts = ScoredCounts(vocab_size=tokenizer.vocab_size, token_bytes=tokenizer.token_bytes(), tokenizer=tokenizer)
    for window in windows(passages, block_size=5, stride=stride):
        counts.add(window)
    return counts


def marked(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.append([tokenizer.document_separator], tokenizer.encode(text)).astype(np.int64)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@given(documents=st.lists(words, min_size=1, max_size=4), stride=st.integers(1, 5))
def test_documents_after_their_marks_count_as_their_texts_do(
    kind: str, documents: list[str], stride: int, request: pytest.FixtureRequest
) -> None:
    """In one stream, and each alone."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = [marked(tokenizer, text) for text in documents]
    n_tokens, n_bytes = sum(map(len, ids)), sum(len(text.encode()) for text in documents)
    n_words = sum(len(text.split()) for text in documents)
    joined = count(tokenizer, [Passage(np.concatenate(ids), True)], stride=stride)
    if n_tokens > 1:
        assert (joined.tokens, joined.bytes, joined.words) == (n_tokens - 1, n_bytes, n_words)
        assert joined.documents == len(documents)
    alone = count(tokenizer, [Passage(document, True) for document in ids], stride=stride)
    assert (alone.tokens, alone.bytes, alone.words) == (n_tokens - len(documents), n_bytes, n_words)
    assert alone.documents == sum(len(document) > 1 for document in ids)


def test_without_a_mark_the_first_token_does_not_count(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("the theatre")
    counts = count(gpt2, [Passage(ids, True)])
    assert gpt2.decode(ids[:1]) == "the"
    assert (counts.tokens, counts.bytes, counts.words) == (len(ids) - 1, len(" theatre"), 1)


def test_tokens_without_a_tokenizer_are_only_counted() -> None:
    counts = ScoredCounts(vocab_size=300, token_bytes=None, tokenizer=None)
    for window in windows([Passage(np.arange(12), True)], block_size=5, stride=5):
        counts.add(window)
    assert (counts.tokens, counts.bytes, counts.words) == (11, None, None)
