"""Tables of typed rows: the same values in every data frame, types that do not depend on them, and safe display."""

import copy
import json
import pickle
import sys
from dataclasses import dataclass
from typing import Any

import pyarrow
import pytest

from tune.terminal.table import JSON, Table, kind_of


@dataclass(frozen=True)
class Inner:
    mean: float


@dataclass(frozen=True)
class Item:
    name: str
    n: int | None = None
    delta: Inner | None = None
    settings: Any = None
    seen: bool = False


COLUMNS = {"name": "string", "n": "int64", "delta.mean": "float64", "settings": JSON, "seen": "bool"}
ITEMS = [Item("<b>\x1b[31m", 2, Inner(-0.5), {"lr": [1, 2.5]}), Item("b", None, None, None, True)]


def table(items: list[Item] = ITEMS) -> Table[Item]:
    return Table(items, COLUMNS, shown=("name", "delta.mean"))


def test_every_kind_of_frame_has_all_columns_and_rows() -> None:
    arrow = table().to_arrow()
    assert arrow.column_names == list(COLUMNS)
    first, second = arrow.to_pylist()
    settings = json.loads(first.pop("settings"))
    assert settings == {"lr": [1, 2.5]}
    assert first == {"name": "<b>\x1b[31m", "n": 2, "delta.mean": -0.5, "seen": False}
    assert second == {"name": "b", "n": None, "delta.mean": None, "settings": None, "seen": True}
    frame = table().to_pandas()
    assert (list(frame.columns), frame["delta.mean"].isna().tolist()) == (list(COLUMNS), [False, True])
    assert frame["name"].tolist() == ["<b>\x1b[31m", "b"]


def test_a_polars_frame_has_the_same_rows() -> None:
    pytest.importorskip("polars", reason="polars is an extra")
    assert table().to_polars().to_dicts() == table().to_arrow().to_pylist()


def test_columns_have_the_same_types_without_rows_and_without_values() -> None:
    assert table([]).to_arrow().schema == table().to_arrow().schema == table([Item("x")]).to_arrow().schema
    assert len(table([]).to_pandas()) == 0


def test_values_that_do_not_fit_a_column_are_left_out() -> None:
    wrong: Any = Item("x", n=2**70, seen=3)  # type: ignore[arg-type]
    (row,) = Table([wrong], COLUMNS).to_arrow().to_pylist()
    assert (row["n"], row["seen"]) == (None, None)


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as error:
        getattr(table(), f"to_{package}")()
    assert str(error.value) == f"to_{package}() needs {package}: pip install 'ngpt-campaign[{package}]'"


def test_what_is_shown_is_escaped_and_says_what_is_not_shown() -> None:
    many = table([*ITEMS * 7])
    text, page = repr(many), many._repr_html_()
    assert "\x1b" not in text + page and "<b>" not in page
    assert r"&lt;b&gt;\x1b[31m" in page and r"<b>\x1b[31m" in text
    assert text.splitlines()[0].split() == ["name", "delta.mean"]
    assert text.splitlines()[-1] == "14 rows; 12 are shown; 5 columns, 3 not shown"
    assert page.count("<tr>") == 1 + 12
    assert repr(table([])) == "0 rows; 5 columns, 3 not shown"


def test_it_is_a_tuple_that_stays_a_table_when_it_is_copied() -> None:
    for again in (pickle.loads(pickle.dumps(table())), copy.deepcopy(table()), copy.copy(table())):
        assert again == tuple(ITEMS) and again.to_arrow() == table().to_arrow() and repr(again) == repr(table())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, None], "bool"),
        ([1, None, 2], "int64"),
        ([1, 2.5], "float64"),
        (["a"], "string"),
        ([True, 1], JSON),
        ([["a"]], JSON),
        ([None], JSON),
    ],
)
def test_the_kind_of_a_column_holds_all_its_values(values: list[Any], kind: str) -> None:
    assert kind_of(values) == kind
    found = Table([Item("x", settings=value) for value in values], {"settings": kind}).to_arrow()["settings"]
    known = [value for value in values if value is not None]
    assert found.null_count == len(values) - len(known)
    assert isinstance(found, pyarrow.ChunkedArray)
