"""The benchmarks of campaigns: their arithmetic on known times, and one real run each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tune.bench import __main__ as command
from tune.bench import campaigns
from tune.bench.campaigns import campaign, scaling, service_cpu_seconds, times_of
from tune.bench.packing import packing
from tune.bench.sequential import WORLDS, sequential


def event(name: str, second: float, pid: int = 1, step_seconds: float = 5.0) -> dict[str, Any]:
    """An event of a journal, `second` seconds after ten o'clock."""
    metrics = {"tokens": 1000, "tokens_per_second": 1000 / step_seconds}
    time = f"2026-11-21T10:00:{second:06.3f}+00:00"
    return {"event": name, "time": time, "metrics": metrics, "provenance": {"pid": pid}}


def test_the_times_add_up_to_the_time_of_all_workers() -> None:
    """Two workers: one is ready after 3 s and runs two trials, the other after 4 s and runs one."""
    events = [event("trial_started", 1), event("trial_started", 1)]
    events += [event("trial_finished", 9, 1), event("trial_finished", 10, 2), event("trial_finished", 14.25, 1)]
    times = times_of(events)
    assert times["seconds"] == pytest.approx(13.25)
    assert times["step_seconds"] == pytest.approx(15.0)
    assert times["worker_start_seconds"] == pytest.approx(3.0 + 4.0)
    assert times["between_seconds"] == pytest.approx(0.25)
    assert times["idle_seconds"] == pytest.approx(4.25)
    names = ("step_seconds", "worker_start_seconds", "between_seconds", "idle_seconds")
    assert sum(times[name] for name in names) == pytest.approx(2 * times["seconds"])


def runs(*results: dict[str, float]) -> Callable[..., dict[str, float]]:
    """Replaces `run_tiny`: returns these times, one after the other."""
    remaining = list(results)
    return lambda trials, *, steps, workers: remaining.pop(0)


def test_an_extra_trial_costs_the_time_between_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"seconds": 34.0, "step_seconds": 60.0, "between_seconds": 5.8, "worker_start_seconds": 1.0}
    times |= {"idle_seconds": 1.2, "startup_seconds": 6.0, "service_cpu_seconds": 2.0}
    monkeypatch.setattr(campaigns, "run_tiny", runs(times))
    figures = campaign(trials=60, steps=10, workers=2)
    assert figures["seconds_per_extra_trial"] == pytest.approx(0.1)  # 58 trials followed another one on their worker
    assert figures["efficiency"] == pytest.approx(60 / 68)
    shares = ("efficiency", "between_share", "worker_start_share", "idle_share")
    assert sum(figures[share] for share in shares) == pytest.approx(1.0)


def test_scaling_compares_one_worker_with_two(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"seconds": 38.0, "startup_seconds": 4.0, "tokens_per_second": 10.0, "service_cpu_seconds": 1.0}
    two = {"seconds": 20.0, "startup_seconds": 4.0, "tokens_per_second": 9.5, "service_cpu_seconds": 1.0}
    monkeypatch.setattr(campaigns, "run_tiny", runs(one, two))
    figures = scaling(rounds=1, steps=10)
    assert figures["speedup"] == pytest.approx(1.9)
    assert figures["speedup_with_startup"] == pytest.approx(42 / 24)
    assert figures["speedup_of_steps"] == pytest.approx(1.9)
    assert figures["service_cpu_share"] == pytest.approx(1 / 20)


def test_the_processor_time_of_the_driver_is_counted() -> None:
    before = service_cpu_seconds()
    sum(range(3_000_000))
    assert sum(service_cpu_seconds().values()) > sum(before.values())


@pytest.mark.slow
def test_the_campaign_benchmark_measures_a_real_campaign_on_ray(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["campaign", "--trials", "6", "--steps", "4", "--workers", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["trials"], figures["workers"], figures["steps_per_trial"]) == (6, 2, 4)
    shares = ("efficiency", "between_share", "worker_start_share", "idle_share")
    assert sum(figures[share] for share in shares) == pytest.approx(1.0)
    assert all(0 <= figures[share] < 1 for share in shares)
    assert figures["service_cpu_seconds"] > 0


def test_an_option_of_another_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["campaign", "--rounds", "3"]) == 2
    said = capsys.readouterr().err
    assert said == "campaign has no option --rounds; its options are --trials, --seconds, --steps, --workers\n"


@pytest.mark.slow
def test_packing_on_a_cpu_divides_the_cores(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    """Real processes, on a machine with apparently two cores."""
    monkeypatch.setattr("tune.bench.packing.usable_cpus", lambda: 2)
    shape = ["n_layer=1", "n_head=2", "n_embd=16", "block_size=16", "batch_size=4", "device=cpu"]
    figures = packing(set=[*shape, f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400"], seconds=0.2)
    assert [(point["trials"], point["threads"]) for point in figures["curve"]] == [(1, 2), (2, 1)]
    speeds = {point["trials"]: point["tokens_per_second"] for point in figures["curve"]}
    assert figures["tokens_per_second"] == speeds[figures["best"]]
    assert figures["gain"] == pytest.approx(speeds[figures["best"]] / speeds[1])


def test_simulated_looks_have_a_row_for_each_world_and_for_fixed_designs() -> None:
    found = sequential(trials=2, arms=6, start=3, most=4)
    fixed = found.pop("fixed")
    assert list(found) == list(WORLDS)
    assert list(fixed) == ["18", "48", "60", "72", "84", "96", "120"]
    for world, row in found.items():
        assert 18 <= row["trials"] <= 24
        assert (row["power"] is None) == world.startswith("none")
