"""`--plan`: what a campaign would take, counted by hand here, and what it must not do: start or write anything."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import run_campaign
from ngpt.config.base import flatten, override
from ngpt.training.config import TrainConfig
from ngpt.training.loop import train
from tune.analysis.noise import compare_arms
from tune.campaign import load_campaign
from tune.machine.estimate import Estimate, Noise, PhaseEstimate, estimate, expected_placement
from tune.machine.throughput import device_key, known_speeds
from tune.planning.equal_time import step_time_key
from tune.planning.forecast import phase_planned_event
from tune.planning.plan import PlannedPhase, PlannedTrial, inherited_overrides, plan_phase, preview
from tune.spec.schema import Campaign
from tune.storage.journal import Journal
from tune.storage.state import CampaignState
from tune.terminal.plan_view import plan_view

SHAPE = "n_layer: 1, n_head: 2, n_embd: 16, block_size: 8, vocab_size: 400"
PHASES = """\
seeds: [1, 2]
resources: {workers: 2}
phases:
  - {name: a, vary: {alpha: [0.1, 0.2]}}
  - {name: b, inherit: a, seeds: [1, 2], vary: {batch_size: [2, 8]}}
"""

Load = Callable[[str], Campaign]
Write = Callable[[list[dict[str, Any]]], Path]


@pytest.fixture
def load(tmp_path: Path, corpus: Path) -> Load:
    """A campaign of a tiny model: 10 steps of 4 windows of 8 tokens, evaluated 4 times on 48 tokens."""

    def read(rest: str) -> Campaign:
        data = f"corpus: '{corpus}', tokenizer: 'sentencepiece:400', device: cpu"
        base = f"base: {{{SHAPE}, {data}, steps: 10, batch_size: 4, eval_every: 4, eval_tokens: 48}}"
        path = tmp_path / "c.yaml"
        path.write_text(f"campaign: c\n{base}\n{rest}", encoding="utf-8")
        return load_campaign(path)

    return read


@pytest.fixture(autouse=True)
def speeds_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measured speeds are kept, in a cache of this test's own; a matrix product takes no time here."""
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tune.machine.estimate.gemm_flops", lambda *_: 4e9)
    return tmp_path / "cache" / "speeds.jsonl"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a journal; returns its folder."""

    def events(rows: list[dict[str, Any]]) -> Path:
        (tmp_path / "results").mkdir()
        journal = Journal(tmp_path / "results" / "journal.jsonl")
        for row in rows:
            journal.append(**row)
        journal.close()
        return tmp_path / "results"

    return events


def row(speed: float, config: TrainConfig, device: str, together: int = 1) -> str:
    record = {"device": device, "shape": step_time_key(config), "together": together, "tokens_per_second": speed}
    return json.dumps(record) + "\n"


def store(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def ended(
    trial: PlannedTrial, status: str = "finished", *, seconds: float = 2.0, attempt: int = 1, loss: float | None = None
) -> dict[str, Any]:
    """The event of a trial's end."""
    return {
        "event": "trial_finished",
        **trial.identity,
        "config": flatten(trial.config),
        "error": None,
        "started_at": None,
        "status": status,
        "attempt": attempt,
        "seconds": seconds,
        "metrics": {"tokens": 320, "val_loss": loss},
        "provenance": {},
    }


def one_row(estimated: Estimate, phase: str) -> PhaseEstimate:
    return next(row for row in estimated.phases if row.phase == phase)


def device_of(campaign: Campaign) -> str:
    return device_key(campaign.base, campaign.resources.cpus_per_trial)


# ---- counts --------------------------------------------------------------------------------------------------------


def test_trials_and_tokens_are_counted_once_each(load: Load, tmp_path: Path) -> None:
    estimated = estimate(load(PHASES), tmp_path / "results")
    a, b = estimated.phases
    assert (a.phase, a.arms, a.seeds, a.trials, a.to_run) == ("a", 3, 2, 6, 6)
    assert (b.phase, b.arms, b.seeds, b.trials, b.to_run) == ("b", 3, 2, 6, 4)
    assert (estimated.trials, estimated.to_run) == (10, 10)
    assert (a.tokens, b.tokens, estimated.tokens) == (6 * 320, 4 * 320, 10 * 320)
    assert [row.guessed for row in estimated.phases] == [False, True]
    assert estimated.results == str(tmp_path / "results")


@pytest.mark.parametrize(("every", "spare"), [(100, 0), (3, 1)])
def test_the_disk_estimate_is_what_a_trial_really_writes_if_its_best_checkpoint_is_an_old_one(
    load: Load, tmp_path: Path, every: int, spare: int
) -> None:
    text = load("seeds: [1]\nresources: {workers: 1}\nvary: {alpha: [0.1]}\n").text
    sizes = "n_embd: 64, mlp_ratio: 8.0, checkpoint.keep_last: 2, checkpoint.every:"
    (tmp_path / "c.yaml").write_text(text.replace("n_embd: 16,", f"{sizes} {every},"))
    campaign = load_campaign(tmp_path / "c.yaml")
    for _ in train(campaign.base, tmp_path / "run"):
        pass
    written = {path: path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()}
    newest = sum(size for path, size in written.items() if "step_0000010" in path.parts)
    expected = estimate(campaign, tmp_path / "results").disk_bytes / 2
    assert expected == pytest.approx(sum(written.values()) + spare * newest, rel=0.1)


def test_what_the_journal_holds_is_not_counted(load: Load, write: Write) -> None:
    campaign = load(PHASES)
    trials = list(preview(campaign)[0].trials)
    statuses = ["finished", "diverged", "failed"]
    root = write([ended(trial, status) for trial, status in zip(trials, statuses, strict=False)])
    estimated = estimate(campaign, root)
    # Two of the six have a result; one of them is the first phase's stand-in for a winner, which the second one shares.
    assert (estimated.trials, estimated.to_run) == (10, 8)
    assert one_row(estimated, "a").to_run == 4
    assert estimated.tokens == 8 * 320


def finished_phase(phase: PlannedPhase, winner: str) -> list[dict[str, Any]]:
    """The events of a phase from its plan to its end."""
    end = {"phase": phase.name, "winner": winner, "winner_overrides": dict(inherited_overrides(phase, winner))}
    return [
        {"event": "phase_planned", **phase_planned_event(phase)},
        *(ended(trial, loss=5 - (trial.arm == winner) + 0.1 * trial.seed) for trial in phase.trials),
        {"event": "phase_finished", **end},
    ]


def test_a_winner_that_the_journal_knows_is_not_guessed(load: Load, write: Write) -> None:
    campaign = load(PHASES)
    first = preview(campaign)[0]
    second = plan_phase(campaign, campaign.phases[1], {"a": {"model.alpha": 0.2}})
    root = write([*finished_phase(first, "alpha=0.2"), *finished_phase(second, "baseline")])
    estimated = estimate(campaign, root)
    assert [row.guessed for row in estimated.phases] == [False, False]
    assert (estimated.to_run, estimated.tokens, estimated.disk_bytes, estimated.seconds) == (0, 0, 0, 0)


def test_a_winner_of_a_phase_that_has_changed_since_is_guessed_again(load: Load, write: Write) -> None:
    root = write(finished_phase(preview(load(PHASES))[0], "alpha=0.2"))
    estimated = estimate(load(PHASES.replace("[0.1, 0.2]", "[0.1, 0.2, 0.3]")), root)
    assert [row.guessed for row in estimated.phases] == [False, True]
    assert one_row(estimated, "a").to_run == 2


# ---- time ----------------------------------------------------------------------------------------------------------

WORK = 320 + 4 * 16  # a trial's tokens, and a third of 48 at each of steps 0, 4, 8 and 10


def test_time_comes_from_the_speed_that_this_device_has_shown(load: Load, tmp_path: Path, speeds_file: Path) -> None:
    campaign = load("seeds: [1, 2]\nresources: {workers: 4}\nvary: {alpha: [0.1]}\n")
    store(speeds_file, row(WORK / 10, campaign.base, device_of(campaign)))
    estimated = estimate(campaign, tmp_path / "results")
    assert estimated.seconds_source == "from steps measured earlier on this machine"
    assert one_row(estimated, "main").seconds == pytest.approx(4 * (10 + 0.1) / 4)
    assert estimated.seconds == pytest.approx(10.1 + 8)
    assert estimated.workers == 4


def test_without_a_measured_speed_time_comes_from_the_flop_count_and_says_so(load: Load, tmp_path: Path) -> None:
    campaign = load("seeds: [1]\nresources: {workers: 1}\nvary: {alpha: [0.1]}\n")
    estimated = estimate(campaign, tmp_path / "results")
    assert estimated.seconds_source == "estimated from the FLOP count at 1 GFLOP/s; --measure times real steps"
    flops = WORK * (6 * (4 * 16 * 16 + 3 * 16 * 64 + 400 * 16) + 12 * 16 * 8)
    assert one_row(estimated, "main").seconds == pytest.approx(2 * (flops / 1e9 + 0.1))


def test_a_plan_says_that_a_dtype_is_only_emulated_and_shows_small_rates(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune.machine.estimate.gemm_flops", lambda *_: 1.8e9)
    monkeypatch.setattr("ngpt.system.timing.bfloat16_slowdown", lambda: 39.6)
    note = "bfloat16 is emulated on this CPU: 40 x slower than float32; set dtype: float32"
    page = shown(estimate(load("vary: {dtype: [bfloat16]}\n"), tmp_path / "results"))
    assert note in page and "at 0.45 GFLOP/s" in page
    assert estimate(load("vary: {alpha: [0.1]}\n"), tmp_path / "results").slow_dtype is None


def test_a_speed_holds_for_one_shape_only(load: Load, tmp_path: Path, speeds_file: Path) -> None:
    campaign = load("seeds: [1]\nvary: {batch_size: [4, 8], alpha: [0.1]}\n")
    store(speeds_file, row(100.0, campaign.base, device_of(campaign)))
    source = estimate(campaign, tmp_path / "results").seconds_source
    assert source.startswith("estimated from the FLOP count for 1 of 3 trials at 1 GFLOP/s")


def test_measuring_times_each_shape_once_and_is_remembered(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[TrainConfig] = []

    def step(config: TrainConfig, **_: Any) -> dict[str, Any]:
        measured.append(config)
        return {"tokens_per_second": 64.0 * config.batch_size}

    monkeypatch.setattr("tune.machine.throughput.measure_step", step)
    campaign = load("seeds: [1, 2]\nresources: {workers: 1}\nvary: {batch_size: [4, 8], alpha: [0.1]}\n")
    estimated = estimate(campaign, tmp_path / "results", measure=True)
    assert sorted(config.batch_size for config in measured) == [4, 8]
    assert estimated.seconds_source == "measured just now"
    # Four trials of batch 4, and two of batch 8 with 5 steps, so evaluated at 0, 4 and 5.
    expected = 4 * (WORK / 256 + 0.1) + 2 * ((320 + 3 * 16) / 512 + 0.1)
    assert one_row(estimated, "main").seconds == pytest.approx(expected)
    again = estimate(campaign, tmp_path / "results")
    assert again == replace(estimated, seconds_source="from steps measured earlier on this machine")


def test_measuring_runs_real_steps(load: Load, tmp_path: Path, speeds_file: Path) -> None:
    campaign = load("seeds: [1]\nvary: {alpha: [0.1]}\n")
    estimated = estimate(campaign, tmp_path / "results", measure=True)
    assert estimated.seconds > 8
    assert known_speeds(device_of(campaign))[step_time_key(campaign.base), 1] > 0
    assert not (tmp_path / "results").exists()


def test_trials_at_once_in_a_worker_take_their_share_of_its_time(load: Load, tmp_path: Path, speeds_file: Path) -> None:
    rest = "seeds: [1, 2]\nresources: {workers: 1, vectorise: 3}\nphases: [{name: a, vary: {alpha: [0.1, 0.2, 0.3]}}]\n"
    campaign = load(rest)
    device = device_of(campaign)
    store(speeds_file, row(WORK / 10, campaign.base, device))
    estimated = estimate(campaign, tmp_path / "results")
    assert (estimated.workers, estimated.together) == (1, 3)
    assert one_row(estimated, "a").seconds == pytest.approx(8 * 10.1)  # two groups of three, one of two
    alone = "from steps measured earlier on this machine, treating concurrent trials as sequential"
    assert estimated.seconds_source == f"{alone}; --measure times real steps"
    store(speeds_file, row(WORK / 4, campaign.base, device, 3) + row(WORK / 6, campaign.base, device, 2))
    estimated = estimate(campaign, tmp_path / "results")
    assert one_row(estimated, "a").seconds == pytest.approx(6 * 4.1 + 2 * 6.1)
    assert estimated.seconds_source == "from steps measured earlier on this machine"
    assert "3 trials at once in each of 1 worker; time from" in shown(estimated)


def test_measuring_times_real_steps_of_trials_at_once(load: Load, tmp_path: Path) -> None:
    campaign = load("seeds: [1]\nresources: {workers: 1, vectorise: 2}\nvary: {alpha: [0.1, 0.2], batch_size: [8]}\n")
    estimated = estimate(campaign, tmp_path / "results", measure=True)
    assert estimated.seconds_source == "measured just now"
    base, wide = campaign.base, override(campaign.base, {"batch_size": 8})
    assert known_speeds(device_of(campaign)).keys() == {
        (step_time_key(base), 1),
        (step_time_key(base), 2),
        (step_time_key(wide), 1),
    }


def test_what_cannot_be_trained_at_once_is_not_expected_to_be(load: Load, tmp_path: Path) -> None:
    rest = "seeds: [1, 2]\nresources: {vectorise: 4}\nphases: [{name: a, set: {compile: true}, vary: {lr: [1]}}]\n"
    assert estimate(load(rest), tmp_path / "results").together == 1


def test_as_many_trials_run_at_once_as_there_are_cpus_for_them(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.machine.placement.usable_cpus", lambda: 8)
    for resources, workers in [("cpus_per_trial: 1", 8), ("cpus_per_trial: 3", 2), ("cpus_per_trial: 9", 1)]:
        assert (
            expected_placement(load(f"resources: {{{resources}}}\nvary: {{lr: [1]}}\n"), CampaignState()).workers
            == workers
        )
    assert expected_placement(load("resources: {workers: 5}\nvary: {lr: [1]}\n"), CampaignState()).workers == 5


# ---- on the screen -------------------------------------------------------------------------------------------------


def shown(estimated: Estimate) -> str:
    page = io.StringIO()
    Console(file=page, width=120, color_system=None).print(plan_view(estimated))
    return page.getvalue()


def test_the_plan_shows_every_phase_and_where_its_time_comes_from(load: Load, tmp_path: Path) -> None:
    estimated = estimate(load(PHASES), tmp_path / "results")
    lines = [" ".join(line.split()) for line in shown(estimated).splitlines()]
    assert lines[0] == "plan of c"
    assert any(line.startswith("a 3 2 6 6 1.92k ") for line in lines)
    assert any(line.startswith("b * 3 2 6 4 1.28k ") for line in lines)
    assert any(line.startswith("total 10 10 3.20k ") for line in lines)
    assert "2 trials of later phases are the same as earlier ones and are trained once" in lines
    assert any(line.startswith("2 trials at once; time estimated from the FLOP count at 1 GFLOP/s") for line in lines)
    assert any(line.startswith("* starts from a winner that is not known yet") for line in lines)


def test_a_plan_without_guesses_has_no_footnotes(load: Load, tmp_path: Path) -> None:
    text = shown(estimate(load("vary: {lr: [1]}\n"), tmp_path / "results"))
    assert "*" not in text and "trained once" not in text


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def everything(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("smoke", [[], ["--smoke"]], ids=["whole", "smoke"])
def test_a_plan_is_strict_json_and_writes_nothing(
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    smoke: list[str],
) -> None:
    campaign = load(PHASES)
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    assert run_campaign.main(["c.yaml", "--plan", "--json", "--out", "results", *smoke]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out, parse_constant=no_constant)
    assert err == ""
    root = tmp_path / "results" / ("c-smoke" if smoke else "c")
    assert printed["results"] == str(root)
    if not smoke:
        assert printed == asdict(estimate(campaign, root))
    assert everything(tmp_path) == before
    assert not (tmp_path / "results").exists()


def test_a_plan_is_a_table_without_json(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load(PHASES)
    monkeypatch.chdir(tmp_path)
    assert run_campaign.main(["c.yaml", "--plan"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("plan of c")
    assert "results in " in out
    assert not (tmp_path / "results").exists()


# ---- what a campaign can find --------------------------------------------------------------------------------------


def share_found(effect: float, *, sd: float, seeds: int, arms: int, phases: int = 1000) -> float:
    """In how many of some simulated phases an arm with this effect passes Holm's first step and `min_effect`."""
    found = 0
    for y in np.random.default_rng(1).normal(5.0, sd, (phases, arms, seeds)):
        y[1] -= effect
        contrasts = compare_arms({str(arm): dict(enumerate(y[arm])) for arm in range(arms)}, "0").contrasts
        found += contrasts["1"].p < 0.05 / (arms - 1) and abs(contrasts["1"].difference) >= 0.005
    return found / phases


@pytest.mark.slow
def test_a_plan_says_the_smallest_effect_that_each_phase_would_find(load: Load, tmp_path: Path) -> None:
    estimated = estimate(load(f"noise: 0.02\n{PHASES}"), tmp_path)
    assert estimated.noise == Noise(0.02, "paired", "set by `noise:`")
    least = one_row(estimated, "a").smallest_detectable
    assert share_found(least, sd=0.02, seeds=2, arms=3) == pytest.approx(0.8, abs=0.05)
    text = shown(estimated)
    assert "finds" in text and f"{least:.2g}" in text
    assert "from a spread between seeds of 0.02, set by `noise:`" in text


def test_the_noise_is_that_of_the_newest_phase_that_has_finished_here(load: Load, write: Write) -> None:
    phase = preview(load(PHASES))[0]
    events = finished_phase(phase, "alpha=0.2")
    losses = iter([3.0, 2.9, 2.7, 3.2, 3.15, 2.93])
    for event in events:
        if event["event"] == "trial_finished":
            event["metrics"] = event["metrics"] | {"val_loss": next(losses)}
    estimated = estimate(load(PHASES), write(events))
    y = np.array([[3.0, 3.2], [2.9, 3.15], [2.7, 2.93]])
    rest = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    assert estimated.noise.sd == pytest.approx(np.sqrt((rest**2).sum() / 2))
    assert estimated.noise.source == "measured in phase a"
    assert one_row(estimated, "b").smallest_detectable > 0


def test_without_a_noise_a_plan_promises_nothing(load: Load, tmp_path: Path) -> None:
    estimated = estimate(load(PHASES), tmp_path)
    assert estimated.noise is None and one_row(estimated, "a").smallest_detectable is None
    assert "finds" not in shown(estimated)


def test_a_plan_names_the_seeds_of_each_phase_or_says_that_they_are_not_drawn(load: Load, tmp_path: Path) -> None:
    phases = "seeds: [1, 2]\nphases:\n  - {name: a, vary: {alpha: [0.1, 0.2]}}\n"
    phases += "  - {name: b, inherit: a, vary: {lr: [0.1]}}\n  - {name: c, seeds: fresh 3, vary: {lr: [0.2]}}\n"
    phases += "  - {name: d, seeds: fresh, runs: [{arm: winner, inherit: b}]}\n"
    estimated = estimate(load(phases), tmp_path / "results")
    assert [row.which_seeds for row in estimated.phases] == [
        "1 and 2",
        "1001 and 1002",
        "3 fresh ones, drawn when the phase starts",
        "4 to 30 fresh ones, drawn when the phase starts",
    ]
    assert "seeds: a 1 and 2; b 1001 and 1002; c 3 fresh ones" in " ".join(shown(estimated).split())
