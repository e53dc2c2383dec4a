"""From phases to trials: their configs, ids and seeds."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from ngpt.config.base import build, flatten, is_identity, override, settings
from ngpt.trackers.config import TrackerConfig
from ngpt.training.config import TrainConfig
from tune.planning.plan import (
    PhaseResult,
    PlannedPhase,
    arm_config,
    inherited_overrides,
    plan_phase,
    preview,
    trial_flops,
    trial_ids,
    trial_tokens,
    trial_work,
)
from tune.spec.schema import Campaign

BASE = """\
campaign: c
base: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 8, steps: 10, batch_size: 16, alpha: 0.2}
"""
TEXT = "Not everything that can be counted counts.\n" * 40

Load = Callable[[str], Campaign]


def plan(campaign: Campaign, name: str = "main", **winners: Mapping[str, Any]) -> PlannedPhase:
    """One phase of a campaign, with the winners' overrides of the phases it needs."""
    return plan_phase(campaign, next(phase for phase in campaign.phases if phase.name == name), winners)


def arms(planned: PlannedPhase) -> dict[str, Mapping[str, Any]]:
    return {arm.name: arm.overrides for arm in planned.arms}


def configs(planned: PlannedPhase) -> dict[str, TrainConfig]:
    """The config of each arm, at its first seed."""
    return {arm.name: arm.trials[0].config for arm in planned.arms}


# ---- arms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        ("vary: {lr: [1, 2], alpha: [0.5]}", ["baseline", "lr=1", "lr=2", "alpha=0.5"]),
        ("grid: {lr: [1, 2], alpha: [0.5]}", ["baseline", "lr=1, alpha=0.5", "lr=2, alpha=0.5"]),
        ("zip: {lr: [1, 2], alpha: [0.5, 1]}", ["baseline", "lr=1, alpha=0.5", "lr=2, alpha=1"]),
        ("runs: [{arm: x, lr: 1}, {arm: y, alpha: 0.5, lr: 2}]", ["baseline", "x", "y"]),
        ("runs: [{arm: x, lr: 1}, {arm: baseline}]", ["baseline", "x"]),
    ],
)
def test_a_phase_has_its_baseline_and_arms_with_every_seed(load: Load, sweep: str, names: list[str]) -> None:
    planned = plan(load(f"{BASE}seeds: [5, 6]\n{sweep}\n"))
    assert [arm.name for arm in planned.arms] == names
    assert planned.baseline == "baseline"
    trials = list(planned.trials)
    assert [(trial.seed, trial.arm) for trial in trials] == [(seed, name) for seed in (5, 6) for name in names]
    assert all(trial.config.seed == trial.seed for trial in trials)
    assert len({trial.trial_id for trial in trials}) == len(trials)


@pytest.mark.parametrize(
    ("sweep", "name", "n_arms"),
    [
        ("vary: {lr: [1, 2], alpha: [0.5, 0.2]}", "alpha=0.2", 4),
        ("grid: {mlp: [relu2, swiglu], alpha: [0.2]}", "mlp=swiglu, alpha=0.2", 2),
        ("runs: [{arm: x, lr: 1}, {arm: as usual, alpha: 0.2}]", "as usual", 2),
    ],
)
def test_an_arm_that_equals_the_baseline_replaces_it_and_keeps_its_name(
    load: Load, sweep: str, name: str, n_arms: int
) -> None:
    planned = plan(load(f"{BASE}{sweep}\n"))
    assert planned.baseline == planned.arms[0].name == name
    assert len(planned.arms) == n_arms
    assert configs(planned)[name].model.alpha == 0.2


def test_an_arm_differs_from_the_base_only_in_its_own_changes(load: Load) -> None:
    campaign = load(f"{BASE}vary: {{lr: [0.5]}}\n")
    by_name = configs(plan(campaign))
    changed, base = flatten(by_name["lr=0.5"]), flatten(by_name["baseline"])
    assert {name: value for name, value in changed.items() if base[name] != value} == {"optim.lr": 0.5}
    assert base == flatten(campaign.base) | {"seed": 1, "model.vocab_size": 2048}


def test_duplicate_arms_of_a_phase_are_planned_once(load: Load) -> None:
    campaign = load(f"{BASE}phases:\n  - {{name: a, vary: {{lr: [1]}}}}\n  - name: b\n    runs:\n"
                    "      - {arm: x, inherit: a}\n      - {arm: y, lr: 1}\n")  # fmt: skip
    assert list(arms(plan(campaign, "b", a={"optim.lr": 1}))) == ["baseline", "x"]
    assert list(arms(plan(campaign, "b", a={}))) == ["baseline", "y"]


# ---- hold ----------------------------------------------------------------------------------------------------------


def test_arms_that_hold_tokens_train_on_equally_many_tokens(load: Load) -> None:
    campaign = load(f"{BASE}hold: tokens\ngrid: {{batch_size: [1, 3, 16, 100, 2000], block_size: [8, 5]}}\n")
    for config in configs(plan(campaign)).values():
        per_step = config.batch_size * config.model.block_size
        assert config.steps == max(1, round(10 * 16 * 8 / per_step))
        assert abs(config.steps * per_step - 10 * 16 * 8) <= per_step / 2 or config.steps == 1


def test_arms_that_hold_steps_train_equally_many_steps(load: Load) -> None:
    campaign = load(f"{BASE}hold: steps\ngrid: {{batch_size: [1, 3, 100], block_size: [8, 5]}}\n")
    assert {config.steps for config in configs(plan(campaign)).values()} == {10}


def test_an_arm_that_sets_its_steps_keeps_them(load: Load) -> None:
    campaign = load(f"{BASE}runs: [{{arm: x, steps: 7}}, {{arm: y, steps: 7, batch_size: 2}}]\n")
    assert [config.steps for config in configs(plan(campaign)).values()] == [10, 7, 7]


PINNED = """\
phases:
  - {name: a, vary: {batch_size: [4]}}
  - {name: b, inherit: a, vary: {lr: [1], batch_size: [8]}}
  - {name: c, inherit: a, set: {steps: 100}, vary: {lr: [1]}}
  - {name: d, set: {steps: 100}, runs: [{arm: winner, inherit: a}]}
  - {name: e, runs: [{arm: winner, inherit: a}]}
"""


@pytest.mark.parametrize(
    ("phase", "winner", "steps"),
    [
        ("a", {}, {"baseline": 10, "batch_size=4": 40}),
        ("b", {"batch_size": 4}, {"baseline": 40, "lr=1": 40, "batch_size=8": 20}),
        ("c", {"batch_size": 4}, {"baseline": 400, "lr=1": 400}),
        ("d", {"batch_size": 4}, {"baseline": 100, "winner": 400}),
        ("e", {"batch_size": 4}, {"baseline": 10, "winner": 40}),
        ("b", {"steps": 30}, {"baseline": 30, "lr=1": 30, "batch_size=8": 60}),
        ("c", {"steps": 30}, {"baseline": 100, "lr=1": 100}),
        ("d", {"steps": 30, "optim.lr": 1}, {"baseline": 100, "winner": 100}),
        ("e", {"steps": 30}, {"baseline": 10, "winner": 30}),
    ],
)
def test_an_inherited_batch_size_keeps_the_tokens_and_inherited_steps_stay_unless_pinned(
    load: Load, phase: str, winner: dict[str, Any], steps: dict[str, int]
) -> None:
    planned = plan(load(BASE + PINNED), phase, a=winner)
    assert {name: config.steps for name, config in configs(planned).items()} == steps


def test_a_baseline_that_inherits_computes_what_won_on_other_seeds(load: Load) -> None:
    campaign = load(BASE + PINNED)
    first = plan(campaign, "a")
    second = plan(campaign, "b", a=inherited_overrides(first, "batch_size=4"))
    assert second.identities[0] == first.identities[1]
    assert (first.seeds, second.seeds) == ((1, 2, 3), (1001, 1002, 1003))


def test_seeds_that_an_inheriting_phase_lists_are_used_as_they_are(load: Load) -> None:
    campaign = load(BASE + PINNED.replace("{name: b,", "{name: b, seeds: [1, 2, 3],"))
    first = plan(campaign, "a")
    second = plan(campaign, "b", a=inherited_overrides(first, "batch_size=4"))
    assert [trial.trial_id for trial in second.arms[0].trials] == [trial.trial_id for trial in first.arms[1].trials]


# ---- inheritance ---------------------------------------------------------------------------------------------------

CHAIN = """\
phases:
  - {name: a, vary: {alpha: [0.5]}}
  - {name: b, inherit: a, set: {steps: 20}, vary: {lr: [1, 2]}}
  - {name: c, inherit: b, runs: [{arm: x, mlp: relu2}]}
  - {name: confirm, seeds: fresh 2, runs: [{arm: baseline}, {arm: winner, inherit: b}]}
"""


def test_a_phase_inherits_a_winner_without_the_settings_that_its_phase_pinned(load: Load) -> None:
    campaign = load(BASE + CHAIN)
    b = plan(campaign, "b", a={"model.alpha": 0.5})
    assert b.base == {"model.alpha": 0.5, "steps": 20}
    assert {config.steps for config in configs(b).values()} == {20}
    assert {config.model.alpha for config in configs(b).values()} == {0.5}
    assert inherited_overrides(b, "lr=2") == {"model.alpha": 0.5, "optim.lr": 2}
    assert inherited_overrides(b, "baseline") == {"model.alpha": 0.5}
    c = plan(campaign, "c", b=inherited_overrides(b, "lr=2"))
    config = configs(c)["x"]
    assert (config.steps, config.model.alpha, config.optim.lr, config.model.mlp) == (10, 0.5, 2, "relu2")
    assert c.arms[1].trials[0].overrides == {"model.alpha": 0.5, "optim.lr": 2, "model.mlp": "relu2"}


def test_an_arm_can_inherit_a_winner_of_its_own(load: Load) -> None:
    planned = plan(load(BASE + CHAIN), "confirm", b={"model.alpha": 0.5, "optim.lr": 2})
    assert arms(planned) == {"baseline": {}, "winner": {"model.alpha": 0.5, "optim.lr": 2}}
    assert (configs(planned)["baseline"].model.alpha, configs(planned)["winner"].model.alpha) == (0.2, 0.5)
    assert {arm.name: arm.sources for arm in planned.arms} == {"baseline": (), "winner": ("b",)}


@pytest.mark.parametrize("winner", [{}, {"model.alpha": 0.2}])
def test_a_phase_that_confirms_a_baseline_has_no_arms_to_compare(load: Load, winner: dict[str, Any]) -> None:
    assert list(arms(plan(load(BASE + CHAIN), "confirm", b=winner))) == ["baseline"]


def test_a_preview_assumes_that_the_first_arm_wins_until_a_winner_is_known(load: Load) -> None:
    campaign = load(BASE + CHAIN)
    guessed = {phase.name: phase for phase in preview(campaign)}
    assert guessed["c"].base == {"model.alpha": 0.5, "optim.lr": 1}
    known = {"a": PhaseResult("baseline", ()), "b": PhaseResult("lr=2", ())}
    certain = {phase.name: phase for phase in preview(campaign, lambda phase: known.get(phase.name))}
    assert certain["c"].base == {"optim.lr": 2}


def test_a_preview_applies_the_hold_of_each_phase(load: Load) -> None:
    phases = "phases:\n  - {name: a, vary: {batch_size: [8, 32]}}\n"
    phases += "  - {name: b, hold: steps, vary: {batch_size: [8, 32]}}\n"
    campaign = load(BASE + phases)
    assert preview(campaign) == [plan_phase(campaign, phase, {}) for phase in campaign.phases]
    assert preview(campaign)[0].arms[-1].trials[0].config.steps < campaign.base.steps
    assert preview(campaign)[1].arms[-1].trials[0].config.steps == campaign.base.steps


# ---- ids -----------------------------------------------------------------------------------------------------------


def text_config(tmp_path: Path, name: str = "text.txt", text: str = TEXT) -> TrainConfig:
    """A config that no change of a default leaves as it is."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text, encoding="utf-8")
    return build(TrainConfig, {"data.corpus": str(path), "data.tokenizer": "sentencepiece:300", "seed": 7})


def id_of(config: TrainConfig) -> str:
    return trial_ids(config, [config.seed])[0]


def test_the_id_of_a_fixed_config_never_changes(tmp_path: Path) -> None:
    # If this fails, every user's finished trials will be trained again.
    assert id_of(text_config(tmp_path)) == "0e10bfc090-s7"


def test_an_id_hashes_every_setting_that_decides_a_run_and_ends_with_the_seed(tmp_path: Path) -> None:
    config = text_config(tmp_path)
    text = hashlib.sha256(TEXT.encode()).hexdigest()
    data = json.dumps([1, f"sha256:{text}", "sentencepiece:300", 0.1])
    identity = {name: value for name, value in flatten(config).items() if is_identity(TrainConfig, name)}
    added = {"on_oom": "split", "nonfinite.policy": "fail", "nonfinite.max": 10}  # later, so only where they change
    added |= {"init_from": None, "init_sha256": None, "distributed.gradient_dtype": "float32"}
    added |= {"model.rope_trained": None, "model.value_residual": 0.0, "model.qkv_bias": False, "model.norm_eps": None}
    identity = {name: value for name, value in identity.items() if name not in added or added[name] != value}
    identity = {name: value for name, value in identity.items() if name != "seed" and not name.startswith("data.")}
    identity["data"] = hashlib.sha256(data.encode()).hexdigest()[:12]
    digest = hashlib.sha256(json.dumps(dict(sorted(identity.items()))).encode()).hexdigest()
    assert id_of(config) == f"{digest[:10]}-s7"


def another(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    return 3 if value is None else tuple(map(another, value)) if isinstance(value, tuple) else value + 1


def changed(config: Any, name: str) -> Any:
    """The config with another value of one setting, unchecked."""
    section, _, rest = name.partition(".")
    value = getattr(config, section)
    return config.model_copy(update={section: changed(value, rest) if rest else another(value)})


RUNTIME = ["init_from", "device", "distributed.strategy", "data.path", "checkpoint.every", "checkpoint.keep_last"]
RUNTIME += [f"tracker.{name}" for name in settings(TrackerConfig)]
RUNTIME += ["activation_checkpointing"]  # gradients are equal bit for bit


@pytest.mark.parametrize("name", [name for name in settings(TrainConfig) if not name.startswith("data.")])
def test_an_id_changes_with_every_setting_that_affects_the_computation(tmp_path: Path, name: str) -> None:
    config = text_config(tmp_path)
    assert (id_of(changed(config, name)) == id_of(config)) == (name in RUNTIME)


def test_an_id_changes_with_the_content_tokenizer_and_split_of_the_data(tmp_path: Path) -> None:
    config = text_config(tmp_path)
    others = [
        text_config(tmp_path, "other.txt", TEXT + "!"),
        override(config, {"data.tokenizer": "sentencepiece:301"}),
        override(config, {"data.val_fraction": 0.2}),
        override(config, {"data.corpus": "python-docs"}),
    ]
    assert len({id_of(other) for other in [config, *others]}) == 5


def test_an_id_changes_with_the_data_file(tmp_path: Path) -> None:
    config = text_config(tmp_path)
    before = id_of(config)
    text_config(tmp_path, text=TEXT + "one more line\n")
    assert id_of(config) != before


def test_an_id_does_not_depend_on_the_location_of_the_data(
    tmp_path: Path, load: Load, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    shutil.copy(corpus, tmp_path / "deep/er/copy.txt")
    monkeypatch.chdir(tmp_path / "deep")
    ids = [
        {trial.trial_id for trial in plan(load(f"{BASE}vary: {{corpus: ['{path}']}}\n")).trials}
        for path in (corpus, "er/copy.txt", tmp_path / "deep/er/copy.txt")
    ]
    assert ids[0] == ids[1] == ids[2]


def test_no_two_configs_of_a_campaign_share_an_id(load: Load) -> None:
    campaign = load(f"{BASE}grid: {{lr: [0.1, 0.2, 0.3], alpha: [0.1, 0.2], batch_size: [1, 2], mlp: [relu2, swiglu]}}")
    trials = list(plan(campaign).trials)
    assert len({trial.config for trial in trials}) == len(trials) == (24 + 1) * 3
    assert len({trial.trial_id for trial in trials}) == len(trials)


SHUFFLED = """\
campaign: c
seeds: [1, 2]
hold: tokens
base:
  model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 8}
  optim: {name: adamw, lr: 0.01}
  steps: 10
phases:
  - {name: a, vary: {alpha: [0.1, 0.2], batch_size: [4, 8]}}
  - {name: b, inherit: a, grid: {lr: [0.1, 0.2], mlp: [relu2, swiglu]}, set: {steps: 12}}
  - {name: c, runs: [{arm: x, inherit: b}, {arm: y, alpha: 0.3, lr: 0.5}], seeds: fresh 2}
  - {name: d, zip: {alpha: [0.1, 0.2], lr: [0.3, 0.4]}, seeds: [8, 9]}
"""
WINNERS = {"a": {"model.alpha": 0.2}, "b": {"model.alpha": 0.2, "optim.lr": 0.1}}


def shuffled(data: Any, draw: st.DataObject, key: str = "") -> Any:
    """The campaign with keys, phases, runs, seeds and swept values reordered; zipped columns stay together."""
    if isinstance(data, dict):
        rows = draw.draw(st.permutations(range(2))) if key == "zip" else []
        items = draw.draw(st.permutations(list(data.items())))
        return {name: [value[i] for i in rows] if rows else shuffled(value, draw, name) for name, value in items}
    if isinstance(data, list):
        return [shuffled(value, draw) for value in draw.draw(st.permutations(data))]
    return data


@hypothesis_settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(draw=st.data())
def test_ids_survive_any_reordering_of_the_file(load: Load, draw: st.DataObject) -> None:
    written = io.StringIO()
    YAML().dump(shuffled(YAML(typ="safe").load(SHUFFLED), draw), written)
    found, expected = (
        {phase.name: {t.trial_id for t in plan(campaign, phase.name, **WINNERS).trials} for phase in campaign.phases}
        for campaign in (load(written.getvalue()), load(SHUFFLED))
    )
    assert found == expected


# ---- size ----------------------------------------------------------------------------------------------------------


def test_the_work_of_a_trial_counts_evaluation_tokens_as_a_third(load: Load) -> None:
    campaign = load(f"{BASE}vary: {{lr: [1]}}\n")
    config = override(campaign.base, {"eval_every": 4, "eval_tokens": 300, "vocab_size": 50})
    assert trial_tokens(config) == 10 * 16 * 8
    assert trial_work(config) == 1280 + 4 * 100  # at steps 0, 4, 8 and 10
    # One block of 4 matrices of 16 x 16 and three of 16 x 64, the head, and attention over 8 tokens.
    per_token = 6 * (4 * 16 * 16 + 3 * 16 * 64 + 50 * 16) + 12 * 16 * 8
    assert trial_flops(config) == 1680 * per_token
    assert trial_work(override(config, {"eval_every": 5})) == 1280 + 3 * 100  # at steps 0, 5 and 10


def test_an_arm_has_at_least_one_step(load: Load) -> None:
    campaign = replace(load(f"{BASE}vary: {{lr: [1]}}\n"), hold="tokens")
    assert arm_config(campaign, campaign.base, {"batch_size": 10**6}).steps == 1
