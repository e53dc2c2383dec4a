"""A tuple of typed rows that becomes a data frame, and shows itself in a terminal and in a notebook."""

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tune import format as fmt
from tune.storage.summaries import arrow_table, fitting_number

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow
    from rich.console import RenderableType

Row = TypeVar("Row", covariant=True)

JSON = "json"  # kind of a column: any value, as JSON text
MOST_SHOWN = 12  # rows that are printed


def attribute(row: Any, name: str) -> Any:
    """The value of a column: the attribute `name`, or for `delta.mean` that of an attribute; None without one."""
    for part in name.split("."):
        row = getattr(row, part, None)
    return row


class Table(tuple[Row, ...]):
    """Rows as typed objects, in order.

    `to_pandas()`, `to_polars()` and `to_arrow()` return all columns, one row for each object. The values are copies.
    """

    columns: Mapping[str, str]  # name to the name of its Arrow type; `json` for text with any value
    _value: Callable[[Any, str], Any]
    _shown: Sequence[str]

    def __new__(
        cls,
        rows: Iterable[Row] = (),
        columns: Mapping[str, str] | None = None,
        *,
        value: Callable[[Any, str], Any] = attribute,
        shown: Sequence[str] = (),
    ) -> Self:
        """Makes a table; `value` gives the value of a row in a column, and `shown` are the columns to print."""
        self = super().__new__(cls, rows)
        self.columns, self._value = dict(columns or {}), value
        self._shown = tuple(shown) or tuple(self.columns)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """So that copies and pickles are tables, too."""
        return _rebuild, (type(self), tuple(self), self.columns, self._value, self._shown)

    def to_arrow(self) -> "pyarrow.Table":
        """The rows as an Arrow table; the types of the columns do not depend on the values."""
        kinds = {name: "string" if kind == JSON else kind for name, kind in self.columns.items()}
        return arrow_table([self._cells(row) for row in self], kinds)

    def to_pandas(self) -> "pandas.DataFrame":
        """The rows as a pandas data frame. A column of whole numbers with gaps becomes one of floats.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas  # noqa: F401  (Arrow uses it)
        except ModuleNotFoundError:
            raise missing("to_pandas", "pandas") from None
        return self.to_arrow().to_pandas()

    def to_polars(self) -> "polars.DataFrame":
        """The rows as a Polars data frame.

        Raises:
            ModuleNotFoundError: Polars is not installed.
        """
        try:
            import polars
        except ModuleNotFoundError:
            raise missing("to_polars", "polars") from None
        return polars.DataFrame(polars.from_arrow(self.to_arrow()))

    def __repr__(self) -> str:
        header, rows = self._texts()
        return "\n".join([aligned([header, *rows]) if self else "", self._footer()]).lstrip("\n")

    def _repr_html_(self) -> str:
        """The rows as a notebook shows them."""
        header, rows = self._texts()
        return html_table(header, rows, footer=self._footer())

    def _cells(self, row: Any) -> dict[str, Any]:
        return {name: cell(self._value(row, name), kind) for name, kind in self.columns.items()}

    def _texts(self) -> tuple[list[str], list[list[str]]]:
        """The header and the first rows, as texts."""
        rows = [[text(self._value(row, name)) for name in self._shown] for row in self[:MOST_SHOWN]]
        return list(self._shown), rows

    def _footer(self) -> str:
        more = f"; {MOST_SHOWN} are shown" if len(self) > MOST_SHOWN else ""
        hidden = len(self.columns) - len(self._shown)
        columns = f"{fmt.counted(len(self.columns), 'column')}{f', {hidden} not shown' if hidden else ''}"
        return f"{fmt.counted(len(self), 'row')}{more}; {columns}"


def _rebuild(cls: type[Table[Any]], rows: Any, columns: Any, value: Any, shown: Any) -> Table[Any]:
    return cls(rows, columns, value=value, shown=shown)


def missing(method: str, package: str) -> ModuleNotFoundError:
    """The error of a method whose package is not installed."""
    message = f"{method}() needs {package}: pip install 'ngpt-campaign[{package}]'"
    return ModuleNotFoundError(message, name=package)


def kind_of(values: Iterable[Any]) -> str:
    """The kind of a column that holds these values."""
    types = {type(value) for value in values if value is not None}
    if types == {bool}:
        return "bool"
    if types == {int}:
        return "int64"
    if types and types <= {int, float}:
        return "float64"
    return "string" if types == {str} else JSON


def cell(value: Any, kind: str) -> Any:
    """The value as a column of this kind holds it; None if it does not fit, since files may come from others."""
    if kind == JSON:
        return None if value is None else json.dumps(value)
    if kind in ("int64", "float64"):
        return fitting_number(value, kind)
    if kind == "list<string>":
        return None if value is None else [str(part) for part in value]
    if kind == "bool":
        return value if isinstance(value, bool) else None
    return None if value is None else str(value)


def text(value: Any) -> str:
    """A value as it is shown, in visible form."""
    if isinstance(value, float):
        return fmt.digits(value, 6)
    if isinstance(value, Mapping):
        return fmt.settings(value)
    if isinstance(value, list | tuple):
        return fmt.listing(map(fmt.plain, value)) or fmt.MISSING
    return fmt.MISSING if value is None else fmt.plain(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines with the cells of each column at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, footer: str = "") -> str:
    """A table; notebooks bring its style."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    note = html_line(footer) if footer else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def html_line(text: str, tag: str = "p") -> str:
    """A line of text."""
    return f"<{tag}>{escape(text)}</{tag}>"


def rendered(view: "RenderableType", *, width: int = 100) -> str:
    """What a terminal of so many columns shows, as text without colours."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, force_jupyter=False, highlight=False)
    with console.capture() as capture:
        console.print(view)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
