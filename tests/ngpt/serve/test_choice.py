"""Stop strings and the tokens of a text, against what a search in the whole text finds."""

from hypothesis import given
from hypothesis import strategies as st

from ngpt.serve.choice import StopScanner


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
