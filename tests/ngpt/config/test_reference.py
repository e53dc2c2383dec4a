"""The reference of settings: names, types, defaults and meanings, as a class declares them."""

from typing import Annotated

from pydantic import Field

from ngpt.config.base import Config, one_of, runtime_setting
from ngpt.config.reference import reference


class Engine(Config):
    kind: Annotated[str, one_of(("petrol", "diesel"), "kind")] = "diesel"
    """What it burns."""
    ratios: tuple[float, ...] = (3.5, 2.0)
    """Of the gears,
    lowest first."""
    undescribed: bool = True


class Van(Config):
    seats: Annotated[int, Field(ge=1, le=5000)]
    """Places to sit."""
    load: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the room."""
    radio: bool = runtime_setting(False)
    """Whether it plays."""
    engine: Engine = Engine()
    spare: Engine | None = None


def test_settings_are_described_by_their_types_and_docstrings() -> None:
    file = f"{__name__.replace('.', '/')}.py"
    seats, load, radio, kind, ratios, undescribed, *spare = reference(Van)
    assert seats == ("seats", "whole number from 1 to 5,000", "required", "Places to sit.", file, False)
    assert load[1:4] == ("number above 0 to below 1 or null", "null", "Share of the room.")
    assert radio[1:] == ("true or false", "false", "Whether it plays.", file, True)
    assert kind[:4] == ("engine.kind", "diesel, petrol", "diesel", "What it burns.")
    assert ratios[1:4] == ("list of number", "[3.5, 2.0]", "Of the gears, lowest first.")
    assert undescribed.meaning == ""
    assert [setting.name for setting in spare] == ["spare.kind", "spare.ratios", "spare.undescribed"]
