"""Sliding windows: each token is scored once, and sees the tokens right before it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ngpt.data.windows import Passage, take, windows

texts = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), max_size=4)  # lengths of the passages of each


def passages_of(lengths: list[list[int]]) -> list[Passage]:
    """Texts of several passages in which all tokens differ, so that a value identifies its position."""
    passages, at = [], 0
    for text in lengths:
        for index, length in enumerate(text):
            passages.append(Passage(np.arange(at, at + length, dtype=np.uint16), starts=index == 0))
            at += length
    return passages


@given(texts, st.integers(1, 12), st.data())
def test_each_token_is_scored_once_with_all_the_context_that_a_stride_leaves(
    lengths: list[list[int]], block_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, block_size))
    found: dict[int, list[int]] = {}  # by token, what stands before it in the window that scores it
    for window in windows(passages_of(lengths), block_size=block_size, stride=stride):
        assert 0 < window.n_scored < len(window.tokens) <= block_size + 1
        for index in range(len(window.tokens) - window.n_scored, len(window.tokens)):
            token = int(window.tokens[index])
            assert token not in found
            found[token] = window.tokens[:index].tolist()
    at, expected = 0, set()
    for text in lengths:
        end = at + sum(text)
        expected |= {*range(at + 1, end)}
        for token in range(at + 1, end):
            # Windows start at multiples of the stride; the first that reaches the token scores it.
            number = max(0, -(-(token - at - block_size) // stride))
            assert found[token] == [*range(at + number * stride, token)]
            assert len(found[token]) >= min(token - at, block_size - stride)
        at = end
    assert found.keys() == expected


def test_windows_that_do_not_overlap_are_blocks() -> None:
    cut = list(windows([Passage(np.arange(11), True)], block_size=4, stride=4))
    assert [window.tokens.tolist() for window in cut] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10]]
    assert [(window.n_scored, window.starts) for window in cut] == [(4, True), (4, False), (2, False)]


@given(texts, st.integers(1, 100))
def test_the_start_of_a_text_has_as_many_scored_tokens_as_were_asked_for(lengths: list[list[int]], count: int) -> None:
    def scored(passages: list[Passage]) -> list[int]:
        return [int(t) for w in windows(passages, block_size=5, stride=2) for t in w.tokens[-w.n_scored :]]

    whole = scored(passages_of(lengths))
    assert scored(list(take(passages_of(lengths), count))) == whole[:count]
