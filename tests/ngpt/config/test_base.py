"""Settings as types: what is accepted, how a mistake is answered, and what two equal configs have in common."""

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from ngpt.config.base import (
    Config,
    ConfigError,
    Problem,
    build,
    content_hash,
    dotted_name,
    flatten,
    invalid_setting,
    is_identity,
    one_of,
    override,
    resolve,
    runtime_setting,
    settings,
    unknown_message,
)

FLAVOURS = {"vanilla": 1, "chocolate": 2}


class Engine(Config):
    name: str = "diesel"
    power: Annotated[float, Field(gt=0)] = 100.0
    ratios: tuple[float, ...] = (3.5, 2.0)


class Ice(Config):
    name: Annotated[str, one_of(FLAVOURS, "flavour")] = "vanilla"
    scoops: Annotated[int, Field(ge=1)] = 1
    cone: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "Ice":
        if self.cone and self.scoops > 3:
            raise invalid_setting(f"{self.scoops} scoops do not fit a cone", "cone", "scoops")
        return self


class Van(Config):
    seats: int = 2
    plate: str | None = None
    colour: str = runtime_setting("white")
    engine: Engine = Engine()
    ice: Ice = Ice()


NAMES = [
    "seats",
    "plate",
    "colour",
    "engine.name",
    "engine.power",
    "engine.ratios",
    "ice.name",
    "ice.scoops",
    "ice.cone",
]

finite = st.floats(min_value=1e-3, max_value=1e6)
van_settings = st.fixed_dictionaries(
    {},
    optional={
        "seats": st.integers(),
        "plate": st.none() | st.text(max_size=5),
        "colour": st.sampled_from(["white", "red"]),
        "engine.name": st.text(max_size=5),
        "engine.power": finite,
        "engine.ratios": st.lists(finite, max_size=3).map(tuple),
        "ice.name": st.sampled_from(sorted(FLAVOURS)),
        "ice.scoops": st.integers(1, 3),
        "ice.cone": st.booleans(),
    },
)


def problems(call: Callable[..., object], *arguments: Any) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return [(dotted_name(problem.location), problem.message) for problem in caught.value.problems]


def test_settings_are_listed_by_dotted_name_in_reading_order() -> None:
    assert list(settings(Van)) == NAMES


def test_a_config_cannot_be_changed() -> None:
    van: Any = Van()
    with pytest.raises(ValueError, match="frozen"):
        van.seats = 3


def test_an_integer_is_accepted_as_a_float_and_null_for_an_optional_setting() -> None:
    van = build(Van, {"engine.power": 3, "plate": None})
    assert van.engine.power == 3.0 and isinstance(van.engine.power, float)
    assert van.plate is None


@pytest.mark.parametrize(
    ("setting", "value", "kind"),
    [
        ("seats", True, "valid integer"),
        ("seats", "3", "valid integer"),
        ("seats", 3.0, "valid integer"),
        ("engine.power", True, "valid number"),
        ("engine.power", "1e3", "valid number"),
        ("engine.power", float("nan"), "finite number"),
        ("engine.power", float("inf"), "finite number"),
        ("ice.cone", "yes", "valid boolean"),
        ("ice.cone", 1, "valid boolean"),
        ("plate", 3, "valid string"),
    ],
)
def test_nothing_is_silently_converted(setting: str, value: object, kind: str) -> None:
    advice = "; put it in quotes, since it must be a text" if kind == "valid string" else ""
    assert problems(build, Van, {setting: value}) == [(setting, f"input should be a {kind}, got {value!r}{advice}")]


def test_all_problems_are_reported_at_once_with_their_locations() -> None:
    found = problems(build, Van, {"ice.name": "vanila", "engine.power": -1.0, "seats": "3", "ice.scopes": 2})
    assert sorted(found) == [
        ("engine.power", "input should be greater than 0, got -1.0"),
        ("ice.name", "unknown flavour 'vanila', did you mean 'vanilla'? Allowed: chocolate, vanilla"),
        ("ice.scopes", "unknown setting, did you mean 'ice.scoops'?"),
        ("seats", "input should be a valid integer, got '3'"),
    ]


def test_a_problem_with_an_item_of_a_list_has_its_index() -> None:
    found = problems(build, Van, {"engine.ratios": (1.0, "2", 3.0)})
    assert found == [("engine.ratios[1]", "input should be a valid number, got '2'")]


@pytest.mark.parametrize(
    ("given_settings", "blamed"),
    [
        ({"ice.scoops": 4}, "ice.scoops"),
        ({"ice.scoops": 4, "ice.cone": True}, "ice.cone"),
    ],
)
def test_inconsistent_settings_blame_the_first_one_that_was_set(given_settings: dict[str, Any], blamed: str) -> None:
    assert problems(build, Van, given_settings) == [(blamed, "4 scoops do not fit a cone")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seets", "unknown setting, did you mean 'seats'?"),
        ("powr", "unknown setting, did you mean 'power'?"),
        ("engine.powr", "unknown setting, did you mean 'engine.power'?"),
        ("name", "ambiguous setting, write one of engine.name, ice.name"),
        ("qqq", "unknown setting; choose one of " + ", ".join(sorted(NAMES))),
    ],
)
def test_an_unknown_name_gets_the_nearest_name_or_the_full_list(name: str, message: str) -> None:
    assert problems(resolve, Van, name) == [("", message)]


def test_a_last_part_is_enough_if_it_is_unique() -> None:
    assert [resolve(Van, name) for name in ("seats", "power", "engine.power", "ice.name")] == [
        "seats",
        "engine.power",
        "engine.power",
        "ice.name",
    ]


def test_an_unknown_choice_without_a_similar_one_lists_all() -> None:
    assert unknown_message("flavour", "q", FLAVOURS) == "unknown flavour 'q'; choose one of chocolate, vanilla"


def test_override_changes_only_the_named_settings() -> None:
    van = build(Van, {"seats": 5, "engine.name": "petrol"})
    changed = override(van, {"power": 7, "ice.name": "chocolate"})
    assert flatten(changed) == flatten(van) | {"engine.power": 7.0, "ice.name": "chocolate"}
    assert flatten(van)["engine.power"] == 100.0


def test_override_reports_all_unknown_names_as_they_were_written() -> None:
    assert problems(override, Van(), {"seets": 1, "seats": 2, "engine.nam": "x"}) == [
        ("seets", "unknown setting, did you mean 'seats'?"),
        ("engine.nam", "unknown setting, did you mean 'engine.name'?"),
    ]


@given(van_settings, van_settings)
def test_flatten_returns_what_was_built_or_overridden(first: dict[str, Any], second: dict[str, Any]) -> None:
    config = build(Van, first)
    assert {name: flatten(config)[name] for name in first} == first
    assert build(Van, flatten(config)) == config
    assert flatten(override(config, second)) == flatten(config) | second


@given(van_settings, st.randoms())
def test_the_hash_does_not_depend_on_order_defaults_or_runtime_settings(chosen: dict[str, Any], random: Any) -> None:
    shuffled = list(chosen.items())
    random.shuffle(shuffled)
    expected = content_hash(build(Van, chosen))
    assert content_hash(build(Van, dict(shuffled))) == expected
    assert content_hash(override(build(Van, chosen), {"colour": "black"})) == expected
    assert content_hash(build(Van, flatten(Van()) | chosen)) == expected


@given(van_settings, van_settings)
def test_two_configs_have_one_hash_only_if_they_compute_the_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    one, other = build(Van, first | {"colour": "red"}), build(Van, second | {"colour": "red"})
    assert (content_hash(one) == content_hash(other)) == (one == other)


def test_the_hash_is_the_same_on_every_machine_and_in_every_session() -> None:
    text = (
        '{"engine.name": "diesel", "engine.power": 100.0, "engine.ratios": [3.5, 2.0], "ice.cone": true,'
        ' "ice.name": "vanilla", "ice.scoops": 1, "plate": null, "seats": 2}'
    )
    assert content_hash(Van()) == hashlib.sha256(text.encode()).hexdigest()[:10]


def test_the_hash_can_leave_out_settings_and_take_in_other_facts() -> None:
    van, other = Van(), Van(seats=9)
    assert content_hash(van) != content_hash(other)
    assert content_hash(van, leave_out={"seats"}) == content_hash(other, leave_out={"seats"})
    assert content_hash(van, extra={"data": "a"}) != content_hash(van, extra={"data": "b"}) != content_hash(van)


def test_only_runtime_settings_are_left_out_of_the_identity() -> None:
    assert [name for name in settings(Van) if not is_identity(Van, name)] == ["colour"]


def test_a_location_is_shown_with_dots_and_brackets() -> None:
    assert dotted_name(("phases", 0, "vary", "alpha", 12)) == "phases[0].vary.alpha[12]"
    assert str(Problem(("a", 1), "is wrong")) == "a[1]: is wrong"
    assert str(ConfigError([Problem((), "one"), Problem(("b",), "two")])) == "one\nb: two"
