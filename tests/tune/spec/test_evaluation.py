"""`evaluation:` of a campaign file: what is wrong is said with its place, before anything is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from ngpt.downstream import bundle_files, harness
from tests.helpers.core_bundle import pack, write_bundle
from tune.launch import check_downstream
from tune.spec.schema import Campaign

FILE = """\
campaign: asked
base: {steps: 2}
METRIC
evaluation: {EVALUATION}
phases:
  - {name: alpha, vary: {alpha: [0.1, 0.2]}}
  - {name: confirm, runs: [{arm: winner, inherit: alpha}], seeds: fresh 2}
claims:
  - {id: better, relation: less, left: {alpha: 0.1}, right: {alpha: 0.2}, metric: core/answers}
"""


@pytest.fixture
def read(load: Callable[[str], Campaign], tmp_path: Path) -> Callable[..., Campaign]:
    """Reads the file with these parts, where BUNDLE is the path of a bundle."""
    bundle = write_bundle(tmp_path / "bundle")

    def read_with(evaluation: str, metric: str = "") -> Campaign:
        text = FILE.replace("EVALUATION", evaluation.replace("BUNDLE", str(bundle))).replace("METRIC", metric)
        return load(text)

    return read_with


def test_scores_are_metrics_that_rank_upwards_and_paths_become_absolute(
    read: Callable[..., Campaign], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    campaign = read("core: bundle, limit: 12", "metric: {name: core/endings}")
    assert campaign.metric.goal == "maximize" and campaign.claims[0].goal == "maximize"
    assert campaign.evaluation is not None
    assert campaign.evaluation.core == str(tmp_path / "bundle")
    assert [campaign.evaluation.asks(phase.name) for phase in campaign.phases] == [True, True]


def test_a_bundle_to_download_is_read_when_the_cache_has_it_and_asked_for_before_the_training(
    read: Callable[..., Campaign], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle_files, "SOURCE", "http://127.0.0.1:1/eval_bundle.zip")
    monkeypatch.setattr("ngpt.data.text.hub.FIRST_PAUSE", 0.0)
    campaign = read("core: download, limit: 2", "metric: {name: core/endings}")  # asks nobody
    assert campaign.evaluation is not None and campaign.evaluation.core == "download"
    with pytest.raises(ConfigError, match=r"cannot download http://127\.0\.0\.1:1/.*; give a local copy"):
        check_downstream(campaign)
    bundle_files.downloaded_bundle().parent.mkdir(parents=True)
    pack(tmp_path / "bundle", bundle_files.downloaded_bundle())
    with pytest.raises(ConfigError, match="answers: 2 examples are too few to show 2 before each"):
        check_downstream(campaign)
    with pytest.raises(ConfigError, match=r"evaluation\.core: .*answers: 2 examples are too few"):
        read("core: download, limit: 2")


@pytest.mark.parametrize(
    ("evaluation", "metric", "message"),
    [
        ("core: BUNDLE, task: [a]", "", "evaluation.task: unknown setting, did you mean 'tasks'?"),
        ("core: BUNDLE, limt: 3", "", "evaluation.limt: unknown setting, did you mean 'limit'?"),
        ("limit: 3", "", "4:1: evaluation: nothing is evaluated: give `tasks:` of lm-evaluation-harness, or `core:`"),
        ("core: nowhere", "", "evaluation.core: no such bundle: "),
        ("core: BUNDLE, limit: 2", "", "answers: 2 examples are too few to show 2 before each"),
        ("core: BUNDLE, include_path: nowhere", "", "evaluation.include_path: no such folder: "),
        ("core: BUNDLE, phases: [alpa]", "", "evaluation.phases[0]: unknown phase 'alpa', did you mean 'alpha'?"),
        ("core: BUNDLE", "metric: {name: cor}", "metric.name: unknown metric 'cor', did you mean 'core'?"),
        (
            "core: BUNDLE, phases: [alpha]",
            "metric: {name: core}",
            "core, which the phase confirm would not have",
        ),
        (
            "core: BUNDLE",
            "metric: {name: core}\nearly_stop: {first: 1}",
            "4:1: early_stop: core is measured at the end of a trial",
        ),
    ],
)
def test_a_mistake_is_said_with_its_place(
    read: Callable[..., Campaign], evaluation: str, metric: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(evaluation, metric)
    assert message in str(caught.value) and "c.yaml:" in str(caught.value)


def test_a_metric_of_another_file_is_not_known_any_more(read: Callable[..., Campaign]) -> None:
    read("core: BUNDLE")
    with pytest.raises(ConfigError, match="unknown metric 'core/answers'"):
        read("")


def test_without_the_harness_its_tasks_are_refused_with_the_command_that_installs_it(
    read: Callable[..., Campaign], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"c.yaml:4:14: evaluation.tasks: .* pip install 'ngpt-campaign\[lm-eval\]'"):
        read("tasks: [arc_easy], core: BUNDLE")
