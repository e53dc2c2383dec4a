"""`hold: seconds`: speeds are measured once and kept in the journal; they determine the steps of every arm."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import override
from ngpt.model.flops import flops_per_token
from ngpt.training.config import TrainConfig, resolved
from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, strict, write_file
from tune.campaign import load_campaign
from tune.planning.equal_time import step_time_key, steps_of_equal_time
from tune.planning.plan import preview
from tune.storage.journal import read_journal
from tune.trials.trial import TrialResult, TrialSpec

PHASES = """
  - name: size
    vary: {n_layer: [1, 4], alpha: [0.3]}
  - name: width
    inherit: size
    vary: {batch_size: [2], optim.name: [muon]}
"""


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    path = write_file(tmp_path, corpus, phases=PHASES, steps=30)
    path.write_text(path.read_text() + "hold: seconds\n")
    return path


def layers_cost_time(config: TrainConfig) -> float:
    """Tokens per second: 1200 with one layer; Muon takes twice as long."""
    return 1200.0 / config.model.n_layer / (2 if config.optim.name == "muon" else 1)


def run(file: Path, root: Path, speed: Any, *, most: int | None = None) -> tuple[list[TrialSpec], list[str]]:
    """Runs one session, interrupted after `most` trials; returns what it trained and its messages."""
    said: list[str] = []
    with session_on(file, root, timer=speed) as session:
        session.message = said.append
        given_out = drive(begun(session), one_layer_wins, most=most)
        session.end()
    return given_out, said


def one_layer_wins(spec: TrialSpec) -> TrialResult:
    result = pretend(spec)
    loss = spec.config.model.n_layer + result.metrics["val_loss"]
    return TrialResult(**vars(result) | {"metrics": result.metrics | {"val_loss": loss}})


def test_a_slower_arm_gets_proportionally_fewer_steps(file: Path, tmp_path: Path) -> None:
    given_out, said = run(file, tmp_path / "r", layers_cost_time)
    steps = {(spec.phase, spec.arm): spec.config.steps for spec in given_out}
    assert steps == {
        ("size", "baseline"): 30,
        ("size", "n_layer=1"): 60,
        ("size", "n_layer=4"): 15,
        ("size", "alpha=0.3"): 30,
        ("width", "baseline"): 60,  # one layer again, on other seeds
        ("width", "batch_size=2"): 120,  # half of the tokens in a step, on top of one layer
        ("width", "optim.name=muon"): 30,
    }
    assert "phase size: n_layer=4 trains 300 tokens/s, so it gets 15 steps" in said
    summary = strict((tmp_path / "r/width/summary.json").read_text())
    assert summary["base"] == {"model.n_layer": 1}


def test_a_phase_can_override_the_hold_of_its_campaign(tmp_path: Path, corpus: Path) -> None:
    phases = """
  - {name: tokens, vary: {batch_size: [2], n_layer: [4]}}
  - {name: steps, hold: steps, vary: {batch_size: [2], n_layer: [4]}}
  - {name: seconds, hold: seconds, vary: {batch_size: [2], n_layer: [4]}}
"""
    file = write_file(tmp_path, corpus, phases=phases, steps=30)
    given_out, _ = run(file, tmp_path / "r", layers_cost_time)
    steps = {(spec.phase, spec.arm): spec.config.steps for spec in given_out}
    assert steps == {
        ("tokens", "baseline"): 30,
        ("tokens", "batch_size=2"): 60,
        ("tokens", "n_layer=4"): 30,
        ("steps", "batch_size=2"): 30,
        ("seconds", "n_layer=4"): 15,
    }  # an arm of an earlier phase is not trained again


def test_speeds_are_measured_once_so_a_resumed_campaign_trains_the_same_trials(file: Path, tmp_path: Path) -> None:
    whole, _ = run(file, tmp_path / "whole", layers_cost_time)
    for most in (1, 5, 9):
        root = tmp_path / f"after-{most}"
        first, _ = run(file, root, layers_cost_time, most=most)

        def another_machine(config: TrainConfig) -> float:
            return 7.0 * layers_cost_time(config)

        rest, _ = run(file, root, another_machine)
        assert [spec.trial_id for spec in first + rest] == [spec.trial_id for spec in whole]
        events = [event for event in read_journal(root / "journal.jsonl") if event["event"] == "speeds_measured"]
        assert [event["phase"] for event in events] == ["size", "width"]
        assert not events[0]["speeds"].keys() & events[1]["speeds"].keys()


def test_flop_counts_are_used_until_speeds_are_measured(file: Path) -> None:
    phase = preview(load_campaign(file))[0]
    base, deep = (next(arm for arm in phase.arms if arm.name == name) for name in ("baseline", "n_layer=4"))
    work = [flops_per_token(arm.trials[0].config.model) for arm in (base, deep)]
    assert deep.trials[0].config.steps == round(30 * work[0] / work[1]) < 30


@given(
    steps=st.integers(1, 10_000),
    batch=st.integers(1, 64),
    other=st.integers(1, 64),
    speeds=st.tuples(st.floats(1, 1e7), st.floats(1, 1e7)),
)
def test_arm_and_baseline_train_equally_long_up_to_half_a_step(
    tiny: TrainConfig, steps: int, batch: int, other: int, speeds: tuple[float, float]
) -> None:
    reference = resolved(override(tiny, {"steps": steps, "batch_size": batch}))
    config = override(reference, {"batch_size": other, "n_layer": 3})
    known = {step_time_key(reference): speeds[0], step_time_key(config): speeds[1]}
    found = steps_of_equal_time(reference, config, known)
    per_step, seconds = other * 16 / speeds[1], steps * batch * 16 / speeds[0]
    assert found == 1 or abs(found * per_step - seconds) <= per_step * (0.5 + 1e-9)
    assert steps_of_equal_time(reference, reference, known) == steps


@pytest.mark.parametrize(
    ("change", "is_shared"),
    [
        ({"alpha": 0.9, "logit_scale": 3.0, "optim.lr": 1.0, "steps": 99, "seed": 5, "eval_every": 1}, True),
        ({"n_layer": 1}, False),
        ({"block_size": 8}, False),
        ({"batch_size": 5}, False),
        ({"micro_batch_size": 2}, False),
        ({"dtype": "bfloat16"}, False),
        ({"mlp": "relu2"}, False),
        ({"optim.name": "muon"}, False),
        ({"project_every": 7}, False),
    ],
)
def test_configs_with_equal_step_times_share_a_key(tiny: TrainConfig, change: dict[str, Any], is_shared: bool) -> None:
    base = resolved(tiny)
    assert (step_time_key(override(base, change)) == step_time_key(base)) is is_shared


def test_the_key_never_changes() -> None:
    """Journals contain it, and the steps of a resumed campaign depend on it."""
    assert step_time_key(TrainConfig()) == "a5c14fd5d8"
