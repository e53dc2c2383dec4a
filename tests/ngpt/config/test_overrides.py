"""Settings as people write them: sections, dotted names, last words, and sections in files of their own."""

from pathlib import Path

import pytest

from ngpt.config.base import Config, Problem
from ngpt.config.overrides import named_settings


class Engine(Config):
    name: str = "diesel"
    power: float = 100.0
    ratios: tuple[float, ...] = (3.5, 2.0)


class Ice(Config):
    name: str = "vanilla"
    scoops: int = 1
    cone: bool = True


class Van(Config):
    seats: int = 2
    engine: Engine = Engine()
    ice: Ice = Ice()


def test_settings_may_be_written_as_sections_dotted_names_or_last_parts() -> None:
    data = {"seats": 3, "engine": {"power": 4}, "ice.cone": False, "scoops": 2}
    found, wrong = named_settings(Van, data, ("base",))
    assert wrong == []
    assert found == {
        "seats": (3, ("base", "seats")),
        "engine.power": (4, ("base", "engine", "power")),
        "ice.cone": (False, ("base", "ice.cone")),
        "ice.scoops": (2, ("base", "scoops")),
    }


def test_a_setting_given_twice_in_any_spelling_is_a_problem() -> None:
    _, wrong = named_settings(Van, {"engine": {"power": 4}, "power": 5, "engine.power": 6})
    assert wrong == [
        Problem(("power",), "engine.power is given twice"),
        Problem(("engine.power",), "engine.power is given twice"),
    ]


def test_a_section_knows_only_its_own_settings() -> None:
    found, wrong = named_settings(Van, {"engine": {"seats": 4, "powr": 1, "ratios": (1.0,)}})
    assert list(found) == ["engine.ratios"]
    assert wrong == [
        Problem(("engine", "seats"), "unknown setting; choose one of name, power, ratios"),
        Problem(("engine", "powr"), "unknown setting, did you mean 'power'?"),
    ]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"engine": 3}, Problem(("engine",), "must be a mapping of settings, got 3")),
        ([1], Problem((), "must be a mapping of settings, got [1]")),
        (None, Problem((), "must be a mapping of settings, got None")),
        ({"engin": {"power": 3}}, Problem(("engin",), "unknown section 'engin', did you mean 'engine'?")),
        ({"name": "x"}, Problem(("name",), "ambiguous setting, write one of engine.name, ice.name")),
    ],
)
def test_anything_but_a_mapping_of_settings_is_a_problem(data: object, problem: Problem) -> None:
    assert named_settings(Van, data) == ({}, [problem])


def test_a_section_may_be_a_file_of_its_settings(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("power: 250\nratios: [4, 1]\n")
    found, wrong = named_settings(Van, {"engine": f"{tmp_path}/big.yaml", "seats": 9}, ("base",))
    assert wrong == []
    assert found == {
        "engine.power": (250, ("base", "engine")),
        "engine.ratios": ([4, 1], ("base", "engine")),
        "seats": (9, ("base", "seats")),
    }


@pytest.mark.parametrize("beside", [{"power": 7}, {"engine.power": 7}])
def test_settings_beside_a_section_file_override_it(beside: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("power: 250\nname: petrol\n")
    file = {"engine": f"{tmp_path}/big.yaml"}
    for data in (file | beside, beside | file):
        found, wrong = named_settings(Van, data)
        assert wrong == []
        assert {name: value for name, (value, _) in found.items()} == {"engine.power": 7, "engine.name": "petrol"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("powr: 3\n", "{file}:1:1: powr: unknown setting, did you mean 'power'?"),
        ("name: x\nseats: 3\n", "{file}:2:1: seats: unknown setting; choose one of name, power, ratios"),
        ("- 3\n", "{file}:1:1: must be a mapping of settings, got [3]"),
        ("power: [\n", "{file}:2:1: not valid YAML: "),
        (None, "{file}: No such file or directory"),
    ],
)
def test_a_mistake_in_a_section_file_is_reported_with_its_position(
    text: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "engine.yaml"
    if text is not None:
        file.write_text(text)
    found, (problem,) = named_settings(Van, {"engine": str(file)}, ("base",))
    assert problem.location == ("base", "engine")
    assert problem.message.startswith(message.format(file=file))
    assert set(found) <= {"engine.name"}  # what is sound is kept, so that all mistakes are found at once


def test_the_path_of_a_section_file_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "big.yaml").write_text("power: 250\n")
    found, wrong = named_settings(Van, {"engine": "engines/big.yaml"}, folder=tmp_path)
    assert (found, wrong) == ({"engine.power": (250, ("engine",))}, [])
