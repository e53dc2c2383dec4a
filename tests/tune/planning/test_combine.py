"""Joining the better arms of earlier phases in order of their gains: each arm adds one."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import ConfigError
from tests.helpers.tiny_campaign import begun, drive, pretend, records, session_on, strict, write_file
from tune.campaign import load_campaign
from tune.planning.combine import join_better_arms
from tune.planning.plan import plan_phase, preview
from tune.storage.records import BetterArm
from tune.trials.trial import TrialResult, TrialSpec

PHASES = """
  - name: last
    inherit: joined
    vary: {optim.lr: [3e-2]}
  - name: joined
    combine: {from: [alpha, steps_apart]}
    seeds: [5, 6]
  - name: alpha
    vary: {alpha: [0.1, 0.4, 0.5]}
  - name: steps_apart
    vary: {project_every: [3], logit_scale: [15.0], batch_size: [5]}
"""
# The effect of each change on the loss; with hardly any noise, two seeds detect all of them.
GAINS = {"project_every": {3: -0.3}, "logit_scale": {15.0: 0.2}, "batch_size": {5: -0.1}}


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus, phases=PHASES)


def additive(spec: TrialSpec) -> TrialResult:
    """Gains add up; a longer alpha gains its length."""
    result, config = pretend(spec), spec.config
    shift = GAINS["project_every"].get(config.project_every, 0.0)
    shift += GAINS["logit_scale"].get(config.model.logit_scale or 0.0, 0.0)
    shift += GAINS["batch_size"].get(config.batch_size, 0.0)
    loss = result.metrics["val_loss"]
    assert loss is not None
    return TrialResult(**vars(result) | {"metrics": result.metrics | {"val_loss": loss + shift}})


def run(file: Path, root: Path, *, most: int | None = None) -> list[TrialSpec]:
    with session_on(file, root) as session:
        given_out = drive(begun(session), additive, most=most)
        session.end()
    return given_out


def test_every_prefix_of_the_better_arms_is_an_arm_and_the_verdicts_pick_the_winner(file: Path, tmp_path: Path) -> None:
    run(file, tmp_path / "r")
    summary = strict((tmp_path / "r/joined/summary.json").read_text())
    arms = {arm["arm"]: arm["overrides"] for arm in summary["arms"]}
    best = {"project_every": 3}
    base = load_campaign(file).base.model.alpha
    assert base < 0.4  # so alpha=0.5 gains more than 0.4, which changes the same setting
    order = [("project_every=3", best), ("alpha=0.5", {"model.alpha": 0.5}), ("batch_size=5", {"batch_size": 5})]
    order.sort(key=lambda item: -{"project_every=3": 0.3, "alpha=0.5": 0.5 - base, "batch_size=5": 0.1}[item[0]])
    names, joined = [], {}
    expected: dict[str, Any] = {"baseline": {}}
    for name, overrides in order:
        names.append(name)
        joined = joined | overrides
        expected[" + ".join(names)] = joined
    assert arms == expected
    assert summary["winner"] == " + ".join(names)
    assert strict((tmp_path / "r/last/summary.json").read_text())["base"] == joined


@pytest.mark.slow
def test_a_resumed_campaign_joins_the_same_arms(file: Path, tmp_path: Path) -> None:
    whole = [spec.trial_id for spec in run(file, tmp_path / "whole")]
    n_before = sum(1 for record in records(tmp_path / "whole") if record["phase"] in ("alpha", "steps_apart"))
    for most in (1, n_before - 1, n_before + 1, len(whole) - 1):
        root = tmp_path / f"after-{most}"
        assert [spec.trial_id for spec in run(file, root, most=most) + run(file, root)] == whole
        assert [(r["phase"], r["arm"], r["trial_id"], r["metrics"]) for r in records(root)] == [
            (r["phase"], r["arm"], r["trial_id"], r["metrics"]) for r in records(tmp_path / "whole")
        ]


def test_only_the_baseline_is_planned_if_no_arm_was_better(file: Path) -> None:
    campaign = load_campaign(file)
    phase = next(phase for phase in campaign.phases if phase.name == "joined")
    assert phase.needs == {"alpha", "steps_apart"}
    assert [arm.name for arm in plan_phase(campaign, phase, {}, {"alpha": [], "steps_apart": []}).arms] == ["baseline"]


def test_an_arm_that_cannot_be_joined_is_skipped_and_the_next_one_is_tried(file: Path) -> None:
    campaign = load_campaign(file)
    phase = next(phase for phase in campaign.phases if phase.name == "joined")
    heads, width = BetterArm("heads", {"model.n_head": 4}, 3.0), BetterArm("width", {"model.n_embd": 18}, 2.0)
    found = {"alpha": [width, BetterArm("lr", {"optim.lr": 1.0}, 1.0)], "steps_apart": [heads]}
    planned = plan_phase(campaign, phase, {}, found)
    assert [arm.name for arm in planned.arms] == ["baseline", "heads", "heads + lr"]
    assert [arm.sources for arm in planned.arms] == [(), ("steps_apart",), ("alpha", "steps_apart")]


def test_settings_that_the_phase_pins_are_not_joined(tmp_path: Path, corpus: Path) -> None:
    phases = PHASES.replace("    seeds: [5, 6]\n", "    seeds: [5, 6]\n    set: {steps: 9}\n")
    campaign = load_campaign(write_file(tmp_path, corpus, phases=phases))
    phase = next(phase for phase in campaign.phases if phase.name == "joined")
    found = [BetterArm("long", {"steps": 99}, 2.0), BetterArm("both", {"steps": 99, "optim.lr": 0.5}, 1.0)]
    planned = plan_phase(campaign, phase, {}, {"alpha": found, "steps_apart": []})
    assert {arm.name: dict(arm.overrides) for arm in planned.arms} == {"baseline": {}, "both": {"optim.lr": 0.5}}
    assert {trial.config.steps for trial in planned.trials} == {9}


def test_a_preview_joins_the_first_arms(file: Path) -> None:
    joined = next(phase for phase in preview(load_campaign(file)) if phase.name == "joined")
    assert [arm.name for arm in joined.arms] == ["baseline", "alpha=0.1", "alpha=0.1 + project_every=3"]


SETTINGS = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 3), min_size=1, max_size=3)
ARMS = st.builds(BetterArm, st.text("xyz", min_size=1), SETTINGS, st.floats(0.01, 1.0))
FOUND = st.lists(ARMS, unique_by=lambda better: better.arm)


@given(found=FOUND, order=st.randoms())
def test_joins_add_whole_arms_by_gain_in_any_order_of_the_input(found: list[BetterArm], order: Any) -> None:
    arms = join_better_arms(found)
    shuffled = list(found)
    order.shuffle(shuffled)
    assert join_better_arms(shuffled) == arms
    by_name = {better.arm: better for better in found}
    assert bool(arms) == bool(found)
    previous: dict[str, Any] = {}
    for i, arm in enumerate(arms, 1):
        parts = [by_name[name] for name in arm.name.split(" + ")]
        assert len(parts) == i
        assert [part.gain for part in parts] == sorted((part.gain for part in parts), reverse=True)
        assert dict(arm.overrides) == previous | dict(parts[-1].overrides)
        assert previous.keys().isdisjoint(parts[-1].overrides)
        previous = dict(arm.overrides)
    for better in found:  # no arm that could be added is missing
        assert not previous.keys().isdisjoint(better.overrides)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{from: [alhpa]}", ":20:22: phases[1].combine.from[0]: unknown phase 'alhpa', did you mean 'alpha'?"),
        ("{from: [alpha, alpha]}", "phases[1].combine.from[1]: phase 'alpha' is listed twice"),
        ("{from: []}", "phases[1].combine: expected `{from: [PHASE, ...]}`, the phases to join, got {'from': []}"),
        ("[alpha]", "phases[1].combine: expected `{from: [PHASE, ...]}`, the phases to join, got ['alpha']"),
        ("{from: [last]}", "phases inherit from each other in a cycle: last -> joined -> last"),
    ],
)
def test_an_error_is_reported_with_its_location(tmp_path: Path, corpus: Path, written: str, message: str) -> None:
    phases = PHASES.replace("{from: [alpha, steps_apart]}", written)
    with pytest.raises(ConfigError) as caught:
        load_campaign(write_file(tmp_path, corpus, phases=phases))
    assert message in str(caught.value)
