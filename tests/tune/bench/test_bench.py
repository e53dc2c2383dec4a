"""The benchmarks of campaigns run the real thing; their arithmetic is checked on times that are known."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import ConfigError
from tune.bench import __main__ as command
from tune.bench import campaigns, gpu
from tune.bench.campaigns import ServiceTime, campaign, scaling, times_of
from tune.bench.gpu import PARTS, Part, experiments, half_billion, production
from tune.bench.packing import packing
from tune.planning.plan import preview


def event(name: str, second: float, pid: int = 1, step_seconds: float = 5.0) -> dict[str, Any]:
    """Something in a journal, so many seconds after ten o'clock."""
    metrics = {"tokens": 1000, "tokens_per_second": 1000 / step_seconds}
    time = f"2026-11-21T10:00:{second:06.3f}+00:00"
    return {"event": name, "time": time, "metrics": metrics, "provenance": {"pid": pid}}


def test_all_of_the_workers_time_is_accounted_for() -> None:
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
    """Stands in for campaigns that took exactly this long."""
    remaining = list(results)
    return lambda trials, *, steps, workers: remaining.pop(0)


def test_an_extra_trial_costs_what_a_worker_spends_on_it_besides_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"seconds": 34.0, "step_seconds": 60.0, "between_seconds": 5.8, "worker_start_seconds": 1.0}
    times |= {"idle_seconds": 1.2, "startup_seconds": 6.0, "service_cpu_seconds": 2.0}
    monkeypatch.setattr(campaigns, "run_tiny", runs(times))
    figures = campaign(trials=60, steps=10, workers=2)
    assert figures["seconds_per_extra_trial"] == pytest.approx(0.1)  # 58 trials came after another one
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
    services = ServiceTime()
    with services.view(lambda: None):
        sum(range(3_000_000))
    assert services.seconds > 0


@pytest.mark.slow
def test_the_campaign_benchmark_measures_a_real_campaign_on_ray(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["campaign", "--trials", "6", "--steps", "4", "--workers", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["trials"], figures["workers"], figures["steps_per_trial"]) == (6, 2, 4)
    shares = ("efficiency", "between_share", "worker_start_share", "idle_share")
    assert sum(figures[share] for share in shares) == pytest.approx(1.0)
    assert all(0 <= figures[share] < 1 for share in shares)
    assert figures["service_cpu_seconds"] > 0


def test_an_option_that_a_benchmark_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["campaign", "--rounds", "3"]) == 2
    said = capsys.readouterr().err
    assert said == "--rounds is not an option of campaign, which has --trials, --seconds, --steps, --workers\n"


@pytest.mark.slow
def test_packing_on_a_cpu_divides_the_cores(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    """Real processes, on a machine that says it has two cores."""
    monkeypatch.setattr("tune.bench.packing.usable_cpus", lambda: 2)
    shape = ["n_layer=1", "n_head=2", "n_embd=16", "block_size=16", "batch_size=4", "device=cpu"]
    figures = packing(set=[*shape, f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400"], seconds=0.2)
    assert [(point["trials"], point["threads"]) for point in figures["curve"]] == [(1, 2), (2, 1)]
    speeds = {point["trials"]: point["tokens_per_second"] for point in figures["curve"]}
    assert figures["tokens_per_second"] == speeds[figures["best"]]
    assert figures["gain"] == pytest.approx(speeds[figures["best"]] / speeds[1])


# ---- one GPU in ten minutes ------------------------------------------------------------------------------------------


def test_the_shapes_are_those_that_the_targets_are_about() -> None:
    small, large = production(False), half_billion(False)
    assert (small.batch_size, small.model.block_size, small.project_every) == (48, 128, 7)
    assert (small.model.n_layer, small.model.n_embd, small.model.vocab_size) == (8, 384, 50257)
    assert (small.model.alpha, small.model.alpha_kind, small.model.logit_scale) == (0.28, "scalar", 15)
    assert (large.batch_size, large.model.block_size, large.model.n_layer) == (8, 1024, 24)
    assert {(config.dtype, config.compile) for config in (small, large)} == {("bfloat16", True)}
    trials = {trial.trial_id: trial.config for phase in preview(experiments(False)) for trial in phase.trials}
    assert len(trials) == 39 and {config.steps for config in trials.values()} == {200}


def test_a_small_gpu_benchmark_returns_the_figures_of_its_targets(
    monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    """All parts but the packed one and the campaign, which start processes: those are below."""
    monkeypatch.setattr(gpu, "TEXT", (f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400"))
    for name in ("single", "half_billion", "projection"):
        assert PARTS[name].figure in PARTS[name].measure(True), name


def test_a_part_that_fails_leaves_an_error_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part is a program here: one that answers, one that dies, one that hangs, one that breaks."""
    programs = {
        "answers": "print('{\"seconds\": 3.0}')",
        "dies": "import os; os.kill(os.getpid(), 9)",
        "hangs": "import time; time.sleep(60)",
        "breaks": "raise ValueError('no such kernel')",
    }
    parts = {name: Part(lambda tiny: {}, 20.0, "seconds", 5.0, at_most=True) for name in programs}
    parts["hangs"] = Part(lambda tiny: {}, 0.5, "seconds", 5.0, at_most=True)
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "_command", lambda name, tiny: [sys.executable, "-c", programs[name]])
    figures = gpu.gpu()
    assert figures["answers"] == {"seconds": 3.0}
    assert figures["dies"]["error"] == "exit code -9"
    assert figures["hangs"]["error"] == "not over after 0 s"
    assert "no such kernel" in figures["breaks"]["stderr"]
    assert {name: row["met"] for name, row in figures["targets"].items()} == {
        "answers": True, "dies": False, "hangs": False, "breaks": False
    }  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "gpu 1/4: answers ..."
    assert lines[1].startswith("gpu 1/4: answers seconds 3 (at most 5: met), ")
    assert lines[3].startswith("gpu 2/4: dies failed (exit code -9), ")


def test_a_part_may_be_measured_alone_and_a_wrong_name_is_answered() -> None:
    with pytest.raises(ConfigError, match="did you mean 'single'"):
        gpu.gpu(part="singel", tiny=True)


@pytest.mark.slow
def test_the_whole_gpu_benchmark_runs_at_a_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--tiny", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    errors = {name: figures[name] for name in PARTS if "error" in figures[name]}
    assert errors == {}
    assert figures["experiments"]["trials"]["finished"] >= 39
    assert all(row["value"] is not None for row in figures["targets"].values())
