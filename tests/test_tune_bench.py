"""The campaign benchmark runs real campaigns; its arithmetic is checked on times that are known."""

import json
from collections.abc import Callable

import pytest

from tune import bench


def runs(*results: dict[str, float]) -> Callable[..., dict[str, float]]:
    """Stands in for a campaign that took exactly this long."""
    remaining = list(results)
    return lambda trials, *, steps, workers: remaining.pop(0)


def test_an_extra_trial_costs_what_a_worker_spends_on_it_besides_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"seconds": 12.0, "step_seconds": 20.0, "startup_seconds": 5.0}
    large = {"seconds": 34.0, "step_seconds": 60.0, "startup_seconds": 6.0}
    monkeypatch.setattr(bench, "_timed", runs(small, large))
    figures = bench.campaign(trials=60, workers=2)
    # 40 more trials took 22 s of two workers: 1.1 s each, of which 1.0 s was steps.
    assert figures["seconds_per_extra_trial"] == pytest.approx(0.1)
    assert figures["efficiency"] == pytest.approx(60 / 68)
    assert figures["startup_seconds"] == 6.0


def test_scaling_compares_one_worker_with_two(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"seconds": 38.0, "startup_seconds": 4.0, "tokens_per_second": 10.0}
    two = {"seconds": 20.0, "startup_seconds": 4.0, "tokens_per_second": 9.5}
    monkeypatch.setattr(bench, "_timed", runs(one, two))
    figures = bench.scaling(rounds=1)
    assert figures["speedup"] == pytest.approx(1.9)
    assert figures["speedup_with_startup"] == pytest.approx(42 / 24)


@pytest.mark.slow
def test_the_campaign_benchmark_measures_a_real_campaign_on_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.BENCHMARKS, "campaign", lambda: bench.campaign(trials=6, steps=4))
    assert bench.main(["campaign", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["trials"] == 6
    assert 0 < figures["efficiency"] < 1
    assert figures["step_seconds_per_trial"] > 0
