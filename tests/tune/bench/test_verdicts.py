"""The simulation of false verdicts: its worlds, its counting, and the limits that it checks."""

import json

import numpy as np
import pytest

from tune.analysis.verdicts import holm
from tune.bench import verdicts as simulation
from tune.bench.__main__ import main


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        ("homogeneous", [1, 1, 1, 1]),
        ("one arm 5 x", [1, 1, 25, 1]),
        ("baseline 3 x", [9, 1, 1, 1]),
        ("random slope", [1, 2, 5, 10]),
    ],
)
def test_a_world_has_the_variances_of_its_name(world: str, expected: list[float]) -> None:
    y = simulation.WORLDS[world](np.random.default_rng(1), 20_000, 4, 3)
    assert y.shape == (20_000, 4, 3)
    assert y.var((0, 2)) == pytest.approx(expected, rel=0.1)


def test_any_verdict_is_a_rejection_by_holms_method() -> None:
    p = np.random.default_rng(3).uniform(0, 0.1, (300, 5))
    p[:, 0] = np.nan
    expected = [min(holm(row[1:].tolist())) < 0.05 for row in p]
    assert simulation._any_verdict(p, None).tolist() == expected
    without = [min(np.delete(holm(row[1:].tolist()), 1)) < 0.05 for row in p]
    assert simulation._any_verdict(p, 2).tolist() == without


def test_the_command_prints_the_table_of_worlds_and_says_which_limits_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verdicts", "--phases", "150"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:8]] == ["12x3", "12x5", "12x8", "4x3", "4x5", "4x8"]
    assert "one arm diverging" in lines[1]
    assert lines[8] in ("all limits hold", "LIMITS BROKEN")


def test_a_broken_limit_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(simulation, "LIMITS", {"homogeneous": 0.0})
    monkeypatch.setattr(simulation, "POWER_LIMITS", {(12, 3): 1.0})
    assert main(["verdicts", "--phases", "300", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["limits_held"]
    assert any(text.startswith("12x3: 3 sd found in 0.") for text in found["broken"])
    assert any(text.startswith("homogeneous, ") for text in found["broken"])
