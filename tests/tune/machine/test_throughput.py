"""Measured speeds: which trials they come from, how they are stored, and that a damaged file never raises."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.base import override
from ngpt.training.config import TrainConfig, resolved
from tune.campaign import load_campaign
from tune.machine.concurrency_benchmark import ThroughputPoint
from tune.machine.throughput import (
    ROUNDS,
    device_key,
    known_curve,
    known_speeds,
    measure_for_equal_time,
    measure_speeds,
    measure_tokens_per_second,
    remember_curve,
    remember_speeds,
)
from tune.planning.equal_time import step_time_key
from tune.planning.plan import PlannedTrial, preview
from tune.spec.schema import Campaign
from tune.storage.state import CampaignState, replay

STEPS = 10
TOKENS = STEPS * 4 * 8
WORK = TOKENS + 4 * 16  # a trial's tokens, and a third of 48 at each of steps 0, 4, 8 and 10


@pytest.fixture
def campaign(tmp_path: Path, corpus: Path) -> Campaign:
    """Two trials of a tiny model: 10 steps of 4 windows of 8 tokens, or 5 of 8; evaluated every 4 on 48 tokens."""
    shape = "n_layer: 1, n_head: 2, n_embd: 16, block_size: 8, vocab_size: 400"
    data = f"corpus: '{corpus}', tokenizer: 'sentencepiece:400', device: cpu"
    base = f"base: {{{shape}, {data}, steps: {STEPS}, batch_size: 4, eval_every: 4, eval_tokens: 48}}"
    path = tmp_path / "c.yaml"
    path.write_text(f"campaign: c\n{base}\nseeds: [1]\nvary: {{batch_size: [8]}}\n", encoding="utf-8")
    return load_campaign(path)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of measurements, in a cache of this test's own."""
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "speeds.jsonl"


@pytest.fixture
def device(campaign: Campaign) -> str:
    return device_key(campaign.base, campaign.resources.cpus_per_trial)


def row(speed: Any, config: TrainConfig, device: str) -> str:
    record = {"device": device, "shape": step_time_key(config), "together": 1, "tokens_per_second": speed}
    return json.dumps(record) + "\n"


def ended(trial: PlannedTrial, *, seconds: float = 2.0) -> dict[str, Any]:
    """The event of a trial's end."""
    end = {"event": "trial_finished", "trial_id": trial.trial_id, "status": "finished", "attempt": 1}
    return end | {"seconds": seconds, "metrics": {"tokens": TOKENS}, "provenance": {}}


def session(*events: dict[str, Any], earlier: bool = False) -> CampaignState:
    """The state after these events in a session, or in an `earlier` one."""
    start = {"event": "campaign_started"}
    order = [*events, start] if earlier else [start, *events]
    times = (f"2026-01-01T00:00:{n:02d}.000+00:00" for n in range(99))
    return replay([{"time": time, **event} for time, event in zip(times, order, strict=False)])


def test_a_device_is_known_by_host_torch_and_threads(tiny: TrainConfig) -> None:
    key = device_key(tiny, 3)
    assert f"torch {torch.__version__}" in key and os.uname().nodename in key and "3 threads" in key


def test_real_steps_are_timed(tiny: TrainConfig) -> None:
    assert measure_tokens_per_second(tiny, threads=1) > 100.0
    assert torch.get_num_threads() == 1


def test_each_shape_is_timed_once_per_number_of_trials_in_a_process(
    campaign: Campaign, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[int, int]] = []

    def alone(config: TrainConfig, **_: int) -> dict[str, float]:
        timed.append((config.batch_size, 1))
        return {"tokens_per_second": 10.0}

    def together(config: TrainConfig, count: int, **_: int) -> float:
        timed.append((config.batch_size, count))
        return 10.0 * count

    monkeypatch.setattr("tune.machine.throughput.measure_step", alone)
    monkeypatch.setattr("tune.machine.throughput.measure_step_together", together)
    base, wide = campaign.base, override(campaign.base, {"batch_size": 8})
    measure_speeds([(base, 1), (override(base, {"seed": 2}), 1), (base, 3), (wide, 3)], threads=1)
    assert sorted(timed) == [(4, 1), (4, 3), (8, 3)]
    keys = step_time_key(base), step_time_key(wide)
    assert known_speeds(device) == {(keys[0], 1): 10.0, (keys[0], 3): 30.0, (keys[1], 3): 30.0}


def test_a_later_measurement_is_scaled_to_the_first_by_the_base(tiny: TrainConfig) -> None:
    base, wide = resolved(tiny), resolved(override(tiny, {"batch_size": 9}))
    missing = {step_time_key(wide): wide}
    asked: list[TrainConfig] = []

    def slower_each_round(config: TrainConfig) -> float:
        asked.append(config)
        return {base: 50.0, wide: 80.0}[config] - (len(asked) - 1) // 2

    scaled = measure_for_equal_time(base, missing, {step_time_key(base): 100.0}, slower_each_round)
    assert scaled == {step_time_key(wide): 2.0 * 80.0}
    assert asked == [base, wide] * ROUNDS
    first = measure_for_equal_time(base, missing, {}, {base: 3.0, wide: 4.0}.__getitem__)
    assert first == {step_time_key(base): 3.0, step_time_key(wide): 4.0}


# ---- speeds of finished trials ---------------------------------------------------------------------------------------


def test_the_speed_of_a_finished_trial_is_stored_for_its_shape(campaign: Campaign, device: str) -> None:
    base, wide = preview(campaign)[0].trials
    state = session(ended(base, seconds=2.0), ended(wide, seconds=4.0))
    remember_speeds(campaign, state, {trial.trial_id: trial.config for trial in (base, wide)})
    assert known_speeds(device) == {
        (step_time_key(base.config), 1): WORK / 2,
        (step_time_key(wide.config), 1): (TOKENS + 3 * 16) / 4,
    }


@pytest.mark.parametrize(
    "change",
    [
        *({"status": "failed"}, {"status": "diverged"}, {"attempt": 2}, {"seconds": 0.0}),
        {"provenance": {"packed": 1, "vectorised": 4}},
    ],
    ids=str,
)
def test_only_a_whole_trial_alone_in_its_process_counts(
    campaign: Campaign, change: dict[str, Any], store: Path
) -> None:
    trial = next(preview(campaign)[0].trials)
    remember_speeds(campaign, session(ended(trial) | change), {trial.trial_id: trial.config})
    assert not store.exists()


def test_trials_of_an_earlier_session_do_not_count(campaign: Campaign, store: Path) -> None:
    trial = next(preview(campaign)[0].trials)
    remember_speeds(campaign, session(ended(trial), earlier=True), {trial.trial_id: trial.config})
    assert not store.exists()


# ---- the store -------------------------------------------------------------------------------------------------------


def test_the_newest_speed_of_a_device_counts(campaign: Campaign, store: Path) -> None:
    config = campaign.base
    assert known_speeds("here") == {}
    store.write_text(row(1.0, config, "here") + row(2.0, config, "here") + row(3.0, config, "elsewhere"))
    assert known_speeds("here") == {(step_time_key(config), 1): 2.0}
    assert known_speeds("elsewhere") == {(step_time_key(config), 1): 3.0}
    assert known_speeds("nowhere") == {}


def points(*speeds: float) -> list[ThroughputPoint]:
    return [ThroughputPoint(n, 1, speed, 1 << 30, 32) for n, speed in enumerate(speeds, 1)]


def test_the_newest_curve_of_a_device_and_shape_counts(campaign: Campaign) -> None:
    remember_curve("gpu", "shape", points(1, 2), max_trials=2)
    remember_curve("gpu", "shape", points(1, 3), max_trials=2)
    newest = known_curve("gpu", "shape", max_trials=2)
    assert newest is not None and newest.curve == points(1, 3)
    assert known_curve("another", "shape", max_trials=2) is None
    assert known_curve("gpu", "another", max_trials=2) is None
    assert known_curve("gpu", "shape", max_trials=3) is None  # measured with at most two


def curve_line(**changes: Any) -> str:
    point = {"trials": 1, "threads": 1, "tokens_per_second": 5.0, "memory_bytes": 1 << 30, "room": 3} | changes
    record = {"device": "here", "shape": "ab", "together": 1, "code": "c", "max_trials": 9, "measured_at": ""}
    return json.dumps(record | {"curve": [point]})


@pytest.mark.parametrize(
    "damage",
    [
        '{"device": "here", "sha',
        "\x00\x00",
        "[1]",
        "3",
        '{"device": "here"}',
        '{"device": "here", "shape": "ab", "tokens_per_second": 9.0}',  # of an earlier version
        '{"device": "here", "shape": "ab", "together": 1, "tokens_per_second": 0}',
        '{"device": "here", "shape": "ab", "together": 1, "tokens_per_second": null}',
        '{"device": "here", "shape": "ab", "together": 1, "tokens_per_second": Infinity}',
        '{"device": "here", "shape": "ab", "together": 1, "tokens_per_second": "9"}',
        '{"device": "here", "shape": "ab", "together": 1, "tokens_per_second": 9.0, "dtype": "x"}',
        "[" * 200_000,
        '{"device": "here", "shape": "ab", "max_trials": 9, "measured_at": "", "curve": []}',
        '{"device": "here", "shape": "ab", "max_trials": 9, "measured_at": "", "curve": [{"trials": 1}]}',
        curve_line(trials=0),
        curve_line(tokens_per_second=0.0),
        curve_line(memory_bytes=0),
        curve_line(newer=1),
    ],
)
def test_a_line_that_cannot_be_used_is_skipped_with_a_warning(
    campaign: Campaign, store: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = step_time_key(campaign.base)
    remember_curve("here", "ab", points(5), max_trials=1)
    store.write_text(row(5.0, campaign.base, "here") + store.read_text() + damage)
    remember_curve("here", "cd", points(7), max_trials=1)
    assert known_speeds("here") == {(key, 1): 5.0}
    assert known_curve("here", "ab", max_trials=2) is None
    assert all(known_curve("here", shape, max_trials=1) for shape in ("ab", "cd"))
    (record,) = caplog.records
    assert f"{store}: ignored what cannot be used: line 3: not a record of this version" in record.getMessage()


def refuse(path: Path) -> bool:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("problem", ["not writable", "not readable", "not a folder"])
def test_a_cache_that_cannot_be_used_costs_only_the_speeds_and_one_warning(
    campaign: Campaign,
    device: str,
    store: Path,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ngpt.system.cache._warned", set())
    if problem == "not writable":
        store.mkdir()
    elif problem == "not readable":  # not by its mode, which root ignores
        monkeypatch.setattr(Path, "is_file", lambda path: refuse(path) if path == store else os.path.isfile(path))
    else:
        store.parent.rmdir()
        store.parent.touch()
    trial = next(preview(campaign)[0].trials)
    for _ in range(2):
        remember_speeds(campaign, session(ended(trial)), {trial.trial_id: trial.config})
        assert known_speeds(device) == {}
        assert known_curve(device, "shape", max_trials=1) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("the cache of measured speeds is not used: ")
    assert record.getMessage().endswith("; set NGPT_CACHE to a folder that only you can write")
