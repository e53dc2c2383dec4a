"""How fast shapes train on this machine: whose word counts, and that a torn file costs no more than a line."""

import json
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import override
from ngpt.training.config import TrainConfig
from tune.campaign import load_campaign
from tune.machine.throughput import device_key, known_speeds, measure_speeds, remember_speeds
from tune.planning.plan import PlannedTrial, preview
from tune.planning.shape import shape_key
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
def speeds_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measured speeds are kept, in a cache of this test's own."""
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speeds.jsonl"


def row(speed: float, config: TrainConfig, device: str) -> str:
    return json.dumps({"device": device, "shape": shape_key(config), "tokens_per_second": speed}) + "\n"


def store(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def ended(trial: PlannedTrial, *, seconds: float = 2.0) -> dict[str, Any]:
    """The event of a trial's end."""
    end = {"event": "trial_finished", "trial_id": trial.trial_id, "status": "finished", "attempt": 1}
    return end | {"seconds": seconds, "metrics": {"tokens": TOKENS}, "provenance": {}}


def session(*events: dict[str, Any], older: bool = False) -> CampaignState:
    """The state after a session's start and these events, or after these and a session's start."""
    start = {"event": "campaign_started"}
    order = [*events, start] if older else [start, *events]
    times = (f"2026-01-01T00:00:{n:02d}.000+00:00" for n in range(99))
    return replay([{"time": time, **event} for time, event in zip(times, order, strict=False)])


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"alpha": 0.9, "logit_scale": 3.0, "optim.lr": 1.0, "steps": 99, "seed": 5, "eval_every": 1}, True),
        ({"n_layer": 2}, False),
        ({"block_size": 16}, False),
        ({"batch_size": 8}, False),
        ({"micro_batch_size": 2}, False),
        ({"dtype": "bfloat16"}, False),
        ({"mlp": "relu2"}, False),
    ],
)
def test_configs_that_take_equally_long_share_a_shape(campaign: Campaign, change: dict[str, Any], same: bool) -> None:
    base = campaign.base
    assert (shape_key(override(base, change)) == shape_key(base)) == same


def test_trials_at_once_have_a_speed_of_their_own(campaign: Campaign) -> None:
    base = campaign.base
    assert len({shape_key(base, together) for together in (1, 2, 8)}) == 3
    assert shape_key(base, 1) == shape_key(base)


def test_each_shape_is_timed_once_alone_and_once_for_each_number_at_once(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[int, int]] = []

    def step(config: TrainConfig, **_: int) -> dict[str, float]:
        timed.append((config.batch_size, 1))
        return {"tokens_per_second": 10.0}

    def measure_step_together(config: TrainConfig, count: int, **_: int) -> float:
        timed.append((config.batch_size, count))
        return 10.0 * count

    monkeypatch.setattr("ngpt.training.throughput.measure_step", step)
    monkeypatch.setattr("ngpt.ensemble.throughput.measure_step_together", measure_step_together)
    base, wide = campaign.base, override(campaign.base, {"batch_size": 8})
    measure_speeds([(base, 1), (override(base, {"seed": 2}), 1), (base, 3), (wide, 3)], campaign)
    assert sorted(timed) == [(4, 1), (4, 3), (8, 3)]
    expected = {shape_key(base): 10.0, shape_key(base, 3): 30.0, shape_key(wide, 3): 30.0}
    assert known_speeds(device_key(campaign)) == expected


def test_the_speed_of_a_finished_trial_is_remembered_for_its_shape(campaign: Campaign) -> None:
    base, wide = preview(campaign)[0].trials
    state = session(ended(base, seconds=2.0), ended(wide, seconds=4.0))
    remember_speeds(campaign, state, {trial.trial_id: trial.config for trial in (base, wide)})
    assert known_speeds(device_key(campaign)) == {
        shape_key(base.config): WORK / 2,
        shape_key(wide.config): (TOKENS + 3 * 16) / 4,
    }


@pytest.mark.parametrize(
    "change",
    [
        *({"status": "failed"}, {"status": "diverged"}, {"attempt": 2}, {"seconds": 0.0}),
        {"provenance": {"packed": 1, "vectorised": 4}},
    ],
    ids=str,
)
def test_only_a_trial_that_ran_in_one_go_says_how_fast_it_is(
    campaign: Campaign, change: dict[str, Any], speeds_file: Path
) -> None:
    trial = next(preview(campaign)[0].trials)
    remember_speeds(campaign, session(ended(trial) | change), {trial.trial_id: trial.config})
    assert not speeds_file.exists()


def test_what_an_earlier_session_ran_is_not_its_word(campaign: Campaign, speeds_file: Path) -> None:
    trial = next(preview(campaign)[0].trials)
    remember_speeds(campaign, session(ended(trial), older=True), {trial.trial_id: trial.config})
    assert not speeds_file.exists()


def test_the_newest_speed_wins_and_other_devices_do_not_count(campaign: Campaign, speeds_file: Path) -> None:
    config = campaign.base
    store(speeds_file, row(1.0, config, "here") + row(2.0, config, "here") + row(3.0, config, "elsewhere"))
    assert known_speeds("here") == {shape_key(config): 2.0}
    assert known_speeds("elsewhere") == {shape_key(config): 3.0}
    assert known_speeds("nowhere") == {}


def test_no_speeds_are_known_before_the_first_measurement(speeds_file: Path) -> None:
    assert not speeds_file.exists()
    assert known_speeds("here") == {}


@pytest.mark.parametrize("torn", ['{"device": "here", "sha', "\x00\x00", "[1]", '{"device": "here"}', "3"])
def test_a_torn_line_costs_itself_and_nothing_else(campaign: Campaign, speeds_file: Path, torn: str) -> None:
    base, wide = preview(campaign)[0].trials
    device = device_key(campaign)
    store(speeds_file, row(5.0, base.config, device) + torn)
    assert known_speeds(device) == {shape_key(base.config): 5.0}
    remember_speeds(campaign, session(ended(wide, seconds=4.0)), {wide.trial_id: wide.config})
    assert known_speeds(device) == {shape_key(base.config): 5.0, shape_key(wide.config): 92.0}
