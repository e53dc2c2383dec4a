"""Any metric of an evaluation can rank the arms, in its own direction; an unknown name is a mistake."""

from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from ngpt.training.evaluation import METRICS, EvalMetric
from tests.helpers.tiny_campaign import write_file
from tune.campaign import load_campaign
from tune.spec.metrics import KNOWN_METRICS, metric_goal
from tune.spec.schema import Campaign


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "accuracy", EvalMetric(lambda model, tokens: 0.5, "maximize"))
    monkeypatch.setitem(METRICS, "calibration", EvalMetric(lambda model, tokens: 0.5))


def load(folder: Path, corpus: Path, metric: str, more: str = "") -> Campaign:
    file = write_file(folder, corpus)
    file.write_text(f"metric: {metric}\n{file.read_text()}{more}")
    return load_campaign(file)


@pytest.mark.parametrize(
    ("metric", "goal"),
    [
        ("{name: accuracy}", "maximize"),
        ("{name: accuracy, goal: minimize}", "minimize"),
        ("{name: calibration}", "minimize"),
        ("{name: tokens_per_second}", "maximize"),
        ("{name: peak_memory_bytes}", "minimize"),
        ("{goal: maximize}", "maximize"),
        ("{}", "minimize"),
    ],
)
def test_the_goal_is_that_of_the_metric_unless_the_file_says_another(
    metric: str, goal: str, tmp_path: Path, corpus: Path
) -> None:
    assert load(tmp_path, corpus, metric).metric.goal == goal


def test_an_unknown_metric_is_answered_with_the_nearest_and_all_known_ones(tmp_path: Path, corpus: Path) -> None:
    claim = "claims:\n  - {id: a, relation: less, metric: acuracy, left: {alpha: 0.4}, right: {alpha: 0.05}}\n"
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, corpus, "{name: acuracy}", claim)
    first, second = str(refused.value).splitlines()
    assert "metric.name: unknown metric 'acuracy', did you mean 'accuracy'?" in first
    assert all(name in first for name in ("calibration", "val_bpb", "tokens_per_second"))
    assert "claims[0].metric: unknown metric 'acuracy', did you mean 'accuracy'?" in second


def test_a_claim_remembers_the_direction_of_its_metric(tmp_path: Path, corpus: Path) -> None:
    claim = "claims:\n  - {id: a, relation: best, metric: accuracy, left: {alpha: 0.4}, phase: alpha}\n"
    campaign = load(tmp_path, corpus, "{name: val_loss}", claim)
    assert [(claim.metric, claim.goal) for claim in campaign.claims] == [("accuracy", "maximize")]


def test_the_known_metrics_are_a_live_view() -> None:
    assert "accuracy" in KNOWN_METRICS and metric_goal("accuracy") == "maximize"
    del METRICS["accuracy"]
    assert "accuracy" not in KNOWN_METRICS and metric_goal("accuracy") is None


CLAIM = "claims: [{id: a, relation: less, metric: r_min, left: {alpha: 0.4}, right: {alpha: 0.05}}]\n"


def test_a_metric_that_no_arm_can_have_is_refused_where_it_is_named(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, corpus, "{name: r_mean}", CLAIM)
    first, second = str(refused.value).splitlines()
    reason = "because norm_mode is baseline in all of them"
    assert first == f"{tmp_path / 'tiny.yaml'}:1:10: metric.name: no arm can have r_mean, {reason}"
    assert second.endswith(f"claims[0].metric: no arm can have r_min, {reason}")


@pytest.mark.parametrize("place", ["base", "set", "vary", "search"])
def test_a_metric_that_an_arm_may_have_is_not_refused(place: str, tmp_path: Path, corpus: Path) -> None:
    phases = {
        "base": "\n  - {name: p, vary: {alpha: [0.4]}}\n",
        "set": "\n  - {name: p, set: {norm_mode: ema}, vary: {alpha: [0.4]}}\n",
        "vary": "\n  - {name: p, vary: {norm_mode: [baseline, ema]}}\n",
        "search": "\n  - {name: p, search: {trials: 2, space: {norm_mode: {choice: [baseline, ema]}}}}\n",
    }
    file = write_file(tmp_path, corpus, phases=phases[place])
    base = "model: {norm_mode: ema, " if place == "base" else "model: {"
    file.write_text("metric: {name: r_mean}\n" + file.read_text().replace("model: {", base))
    assert load_campaign(file).metric.name == "r_mean"
