"""Stop strings and the tokens of a text, against what a search in the whole text finds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.data.tokens.tokenizer import Tokenizer, load_tokenizer
from ngpt.serve.choice import Choice, StopScanner
from tests.helpers.vocabularies import write_llama

END = 2  # </s>


def first_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, by trying every end; of several the longest."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@given(
    pieces=st.lists(st.text("abé\N{GRINNING FACE}", max_size=4), max_size=12),
    stops=st.lists(st.text("abé\N{GRINNING FACE}", min_size=1, max_size=4), max_size=3),
)
def test_the_text_is_cut_where_a_search_in_all_of_it_cuts(pieces: list[str], stops: list[str]) -> None:
    scanner, text, expected = StopScanner(stops), "", first_stop("".join(pieces), stops)
    for piece in pieces:
        text += scanner.add(piece)
        assert expected.startswith(text)  # nothing is sent that a later stop string would take back
        if scanner.stopped:
            break
    assert text + scanner.end() == expected
    assert scanner.stopped == any(stop in "".join(pieces) for stop in stops)


def test_no_more_is_held_back_than_may_begin_a_stop_string() -> None:
    scanner = StopScanner(["\n\nQ:", "END"])
    assert [scanner.add(piece) for piece in ("a\n", "b", " E", "NT", "\n\nQ")] == ["a", "\nb", " ", "ENT", ""]
    assert scanner.end() == "\n\nQ"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(write_llama(tmp_path_factory.mktemp("llama") / "llama.model")), None)


@pytest.mark.parametrize(("stops", "scored"), [((), True), (("dog",), False)])
def test_the_token_that_ends_a_text_has_its_log_probability(
    llama: Tokenizer, stops: tuple[str, ...], scored: bool
) -> None:
    """Clients count on an entry for each token that was generated: lm-eval drops the last one of `max_tokens: 1`."""
    choice = Choice([1], llama, stops=stops, max_tokens=9)
    tokens = [*map(int, llama.encode("the dog")), END]
    pieces = []
    while choice.finish_reason is None:
        pieces.append(choice.add(tokens[choice.n_tokens], -float(choice.n_tokens), ()))
    found = [each for piece in pieces if piece for each in piece.tokens]
    assert choice.finish_reason == "stop"
    if scored:
        assert [each.token for each in found] == tokens and choice.n_tokens == len(tokens)
        assert [each.logprob for each in found] == [-float(place) for place in range(len(tokens))]
        assert found[-1].offset == len("the dog")
    else:
        assert END not in [each.token for each in found]
