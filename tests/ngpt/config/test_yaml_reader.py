"""YAML as plain data with positions: what is read, what is refused, and that nothing else can happen."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ngpt.config.base import ConfigError, Problem
from ngpt.config.yaml_reader import (
    MAX_FILE_BYTES,
    MAX_NODES,
    Document,
    YamlError,
    parse_assignment,
    parse_value,
    parse_yaml,
    read_yaml,
)

PATH = Path("file.yaml")
CAMPAIGN = """\
# a comment
base:
  alpha: 0.2
  model: {n_layer: 2, "n_head": 4}
phases:
  - name: first
    vary:
      lr: [1e-3,
           2e-3]
  - &second
    name: second
  - *second
"""


def refusal(text: str) -> str:
    with pytest.raises(YamlError) as caught:
        parse_yaml(text, PATH)
    return str(caught.value)


def why_no_character(code: int) -> str:
    """What this Python says about a code point beyond Unicode; its versions differ."""
    with pytest.raises((ValueError, OverflowError)) as caught:
        chr(code)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("12", 12),
        ("-7", -7),
        ("1_000", 1000),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b101", 5),
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ("=", "="),
        ("12:30", "12:30"),
        ("2026-01-31", "2026-01-31"),
        ("0o9", "0o9"),
        ("a # comment", "a"),
        ("[1, 2.0, x, {y: null}]", [1, 2.0, "x", {"y": None}]),
        ("!!str 12", "12"),
    ],
)
def test_values_follow_yaml_1_2(text: str, value: object) -> None:
    read = parse_value(text)
    assert read == value and type(read) is type(value)


def test_keys_are_strings_even_if_they_look_like_numbers() -> None:
    assert parse_value("{1: a, true: b, 1e3: c, 'x y': d}") == {"1": "a", "true": "b", "1e3": "c", "x y": "d"}


def test_an_anchor_is_expanded_and_may_be_redefined() -> None:
    assert parse_value("{a: &x [1], b: *x, c: &x 2, d: *x}") == {"a": [1], "b": [1], "c": 2, "d": 2}


def test_every_node_knows_its_line_and_column() -> None:
    document = parse_yaml(CAMPAIGN, PATH)
    assert document.data["phases"][2] == {"name": "second"}
    assert document.positions == {
        (): (2, 1),
        ("base",): (2, 1),
        ("base", "alpha"): (3, 3),
        ("base", "model"): (4, 3),
        ("base", "model", "n_layer"): (4, 11),
        ("base", "model", "n_head"): (4, 23),
        ("phases",): (5, 1),
        ("phases", 0): (6, 5),
        ("phases", 0, "name"): (6, 5),
        ("phases", 0, "vary"): (7, 5),
        ("phases", 0, "vary", "lr"): (8, 7),
        ("phases", 0, "vary", "lr", 0): (8, 12),
        ("phases", 0, "vary", "lr", 1): (9, 12),
        ("phases", 1): (10, 5),
        ("phases", 1, "name"): (11, 5),
        ("phases", 2): (10, 5),
        ("phases", 2, "name"): (11, 5),
    }


def test_a_problem_is_described_with_the_nearest_position() -> None:
    document = parse_yaml(CAMPAIGN, PATH)
    assert document.describe(Problem(("base", "alpha"), "is wrong")) == "file.yaml:3:3: base.alpha: is wrong"
    missing = Problem(("phases", 0, "seeds", 1), "is missing")
    assert document.describe(missing) == "file.yaml:6:5: phases[0].seeds[1]: is missing"
    assert document.describe(Problem((), "is wrong")) == "file.yaml:2:1: is wrong"
    assert Document(PATH, None, {}).describe(Problem(("a",), "x")) == "file.yaml:1:1: a: x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "file.yaml:3:1: duplicate key 'a'"),
        ("b: {a: 1, 'a': 2}", "file.yaml:1:11: duplicate key 'a'"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "file.yaml:3:3: YAML 1.2 has no merge key '<<', write the settings out"),
        ("a: [1, 2", "file.yaml:1:9: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a:\n\tb: 1", "file.yaml:2:1: a tab (U+0009): use spaces"),
        ("a:\n  b: 1\n \tc: 2", "file.yaml:3:2: a tab (U+0009): use spaces"),
        ("a:\n  b:\xa01\n  c: 2", "file.yaml:2:5: a no-break space (U+00A0): use spaces"),
        ("a:\n  b:\u30001\n\n  # x\n  c: 2", "file.yaml:2:5: an ideographic space (U+3000): use spaces"),
        ("a:\n\xa0\xa0b: 1", "file.yaml:2:1: a no-break space (U+00A0): use spaces"),
        ("a:\n-\xa0b: 1", "file.yaml:2:2: a no-break space (U+00A0): use spaces"),
        ("a:\tb", "file.yaml:1:3: a tab (U+0009): use spaces"),
        ("a: [1,\xa02]", "file.yaml:1:7: a no-break space (U+00A0): use spaces"),
        ("a: 1\u202f", "file.yaml:1:5: a narrow no-break space (U+202F): use spaces"),
        ("a: *x", "file.yaml:1:4: not valid YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 2", "file.yaml:2:1: not valid YAML: but found another document"),
        ("a: \x00", "file.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed"),
        ('a: "\\0"', "file.yaml:1:4: the character U+0000 is not allowed"),
        ('a: "\\ud800"', "file.yaml:1:4: the character U+D800 is not allowed"),
        ("? [a]\n: 1", "file.yaml:1:3: a key must be a word"),
        (": 1", "file.yaml:1:1: a key must be a word"),
        ("a: !!bool maybe", "file.yaml:1:4: 'maybe' is not a value of type 'bool'"),
        ("a: !!int x", "file.yaml:1:4: 'x' is not a value of type 'int'"),
        ("a: +_", "file.yaml:1:4: '+_' is not a value of type 'int'"),
        ("a: ._", "file.yaml:1:4: '._' is not a value of type 'float'"),
        ("%YAML 1.1\n---\na: on", "file.yaml:3:4: 'on' is not a value of type 'bool'"),
        ('a: "\\UFFFFFFFF"', f"file.yaml: not valid YAML: {why_no_character(0xFFFFFFFF)}"),
    ],
)
def test_anything_but_plain_yaml_is_refused_with_its_position(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    "tagged",
    [
        "!!python/object/apply:os.system ['echo gotcha']",
        "!!python/object:os.stat_result {a: 1}",
        "!!python/name:os.system ''",
        "!!set {a}",
        "!!binary aGk=",
        "!mine 3",
        "{!mine key: 3}",
    ],
)
def test_tags_are_never_followed(tagged: str) -> None:
    assert refusal(f"a: {tagged}").endswith("is not supported, only plain data")


def test_an_integer_of_five_thousand_digits_is_refused() -> None:
    shown = f"{'9' * 20}\N{HORIZONTAL ELLIPSIS}{'9' * 20}"
    assert refusal("a: " + "9" * 5000) == f"file.yaml:1:4: {shown} is too large, a whole number is at most {2**63 - 1}"


def test_whole_numbers_have_64_bits_in_every_notation() -> None:
    largest = 2**63 - 1
    for text in (f"{largest}", f"-{largest}", f"{largest:#x}", f"{largest:#b}", f"{largest:#o}", f"000{largest:_}"):
        assert abs(parse_value(text)) == largest
    for text in (
        f"{largest + 1}",
        f"-{largest + 1}",
        f"{largest + 1:#x}",
        f"{largest + 1:#b}",
        "1" + "_" * 200 + "0" * 30,
    ):
        assert "is too large, a whole number" in refusal(f"a: {text}")


@pytest.mark.parametrize("opening", ["[", "{", "- ", "? ", "[x: "])
def test_endless_nesting_is_refused(opening: str) -> None:
    assert "nested too deeply, at most 50 levels are read" in refusal(opening * 3000)


def test_at_most_fifty_levels_are_read() -> None:
    value = parse_value("[" * 50 + "]" * 50)
    for _ in range(49):
        (value,) = value
    assert value == []
    assert refusal("[" * 52 + "]" * 52) == "file.yaml:1:52: nested too deeply, at most 50 levels are read"


@pytest.mark.parametrize("text", ["&a [*a]", "&a {b: *a}", "&a [*a, *a, *a]", "x: &a\n  y: [1, *a]"])
def test_a_node_inside_of_itself_is_refused(text: str) -> None:
    assert "nested too deeply" in refusal(text)


def test_aliases_count_as_often_as_they_are_used() -> None:
    ten, many = "[" + ", ".join("x" * 10) + "]", MAX_NODES // 11
    assert len(parse_value(f"[&a {ten}" + ", *a" * (many - 2) + "]")) == many - 1
    assert f"more than {MAX_NODES} values" in refusal(f"[&a {ten}" + ", *a" * (many + 2) + "]")


def test_an_alias_bomb_is_refused() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]  # 10^20 values
    assert f"more than {MAX_NODES} values" in refusal("\n".join(levels))


def test_a_file_is_read_with_its_path_in_every_message(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("\ufeffgrüße: 1\n", encoding="utf-8")
    assert read_yaml(path) == Document(path, {"grüße": 1}, {(): (1, 1), ("grüße",): (1, 1)})
    path.write_text("a: [\n")
    with pytest.raises(YamlError, match=rf"^{path}:2:1: not valid YAML"):
        read_yaml(path)


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# only a comment\n")
    assert read_yaml(path) == Document(path, None, {})


def test_a_file_that_cannot_be_read_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    with pytest.raises(YamlError, match=rf"^{path}: No such file or directory$"):
        read_yaml(path)
    with pytest.raises(YamlError, match=rf"^{tmp_path}: Is a directory$"):
        read_yaml(tmp_path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(YamlError, match=rf"^{path}: byte 3 is not UTF-8$"):
        read_yaml(path)
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(YamlError, match=rf"^{path}: too large, at most {MAX_FILE_BYTES} bytes are read$"):
        read_yaml(path)
    path.write_bytes(b"#" * MAX_FILE_BYTES)
    assert read_yaml(path).data is None


# What YAML is made of, so that random text is more than one long word.
SIGNS = "[]{},:-?&*!|>%@`\"'#~=\\/ \n\t\ufeff\x85"
PIECES = [": ", "- ", "? ", "<<", "*a", "&a ", "!!int ", "!!float ", "!!map ", "---\n", "\n  ", "...", "%YAML 1.1\n"]
NUMBERS = ["0o9", "0b2", "1__2", "+_", ".inf", "1e9", '"\\u', '"\\x']
fragments = st.lists(st.sampled_from([*SIGNS, *PIECES, *NUMBERS]) | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30) | fragments)
@example("a: 0b2")
@example("%YAML 1." + "9" * 5000 + "\n---\na")
def test_any_text_is_a_document_or_a_yaml_error(text: str) -> None:
    try:
        document = parse_yaml(text, PATH)
    except YamlError as error:
        assert str(error).startswith("file.yaml")
        return
    lines = text.splitlines() or [""]
    assert all(1 <= line <= len(lines) + 1 for line, _ in document.positions.values())


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False)
    | st.text("abc 1.e-", max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def as_yaml(value: Any) -> str:
    """Flow style by hand: an independent writer, with every string quoted."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {as_yaml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value).replace("inf", ".inf")


@settings(deadline=None)
@given(plain)
def test_plain_data_survives_writing_and_reading(value: Any) -> None:
    assert parse_value(as_yaml(value)) == value


def test_an_assignment_is_a_name_and_a_yaml_value() -> None:
    assert parse_assignment("optim.lr=1e-3") == ("optim.lr", 0.001)
    assert parse_assignment(" tokenizer = a=b ") == ("tokenizer", "a=b")
    assert parse_assignment("softcap=") == ("softcap", None)


@pytest.mark.parametrize("text", ["alpha", "=3", " =3", ""])
def test_an_assignment_without_a_name_or_an_equals_sign_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignment(text)
    assert str(caught.value) == f"--set {text}: expected NAME=VALUE"


def test_a_bad_value_on_the_command_line_says_that_it_comes_from_there() -> None:
    with pytest.raises(ConfigError, match=r"^--set:1:3: not valid YAML"):
        parse_assignment("betas=[1")
