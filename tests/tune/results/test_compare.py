"""Two results directories side by side: matched by what was computed, compared by paired seeds, or refused."""

import itertools
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from ngpt.config.base import ConfigError
from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, write_file
from tune.results.compare import Sides, Throughput, compare, compare_effects
from tune.storage.summaries import Objective
from tune.trials.trial import TrialResult, TrialSpec

ONE = """
  - name: NAME
    vary: {alpha: [0.05, 0.4]}
"""
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Results of two arms that cost nothing: `shift(spec)` is added to the loss of each trial."""
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
    folders = itertools.count()

    def results(
        shift: Callable[[TrialSpec], float] = lambda spec: 0.0,
        *,
        name: str = "alpha",
        seeds: str = "[1, 2, 3]",
        assignments: tuple[str, ...] = (),
        result_of: Callable[[TrialSpec], TrialResult] = pretend,
        phases: str = ONE,
    ) -> Path:
        folder = tmp_path / f"r{next(folders)}"
        folder.mkdir()
        file = write_file(folder, corpus, phases=phases.replace("NAME", name), seeds=seeds)
        with session_on(file, folder / "tiny", assignments) as session:
            drive(begun(session), lambda spec: moved(result_of(spec), shift(spec)))
            session.end()
        return folder / "tiny"

    return results


def moved(result: TrialResult, by: float) -> TrialResult:
    if not by:
        return result
    losses = {name: (result.metrics[name] or 0.0) + by for name in ("val_loss", "val_bpb", "train_loss")}
    return replace(result, metrics=result.metrics | losses)


def edit_started(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what the journal says about the campaign; the CRC is that of `tune.storage.journal`."""
    lines = (root / "journal.jsonl").read_text().splitlines()
    event = json.loads(lines[0])
    del event["crc"]
    change(event)
    lines[0] = json.dumps(event | {"crc": f"{zlib.crc32(json.dumps(event).encode()[:-1]):08x}"})
    (root / "journal.jsonl").write_text("\n".join(lines) + "\n")


def test_a_copy_is_identical_in_every_trial(make: Make, tmp_path: Path) -> None:
    a = make()
    b = Path(shutil.copytree(a, tmp_path / "copy"))
    found = compare(a, b)
    assert [row.verdict for row in found.arms] == ["identical in every trial"] * 2
    assert [row.seeds for row in found.arms] == [[1, 2, 3]] * 2
    assert all(row.delta.mean == 0 and row.tokens_per_second.ratio == 1 for row in found.arms)
    assert found.environment == found.data == found.base == found.code == {}


def test_the_last_digit_of_one_trial_is_enough_not_to_be_identical(make: Make) -> None:
    a, b = make(), make(lambda spec: 1e-12 if spec.seed == 2 and spec.config.model.alpha == 0.4 else 0.0)
    assert [row.identical for row in compare(a, b).arms] == [True, False]


def test_arms_are_matched_by_their_settings_under_any_name(make: Make) -> None:
    phases = "\n  - name: other\n    runs: [{arm: baseline}, {arm: mine, alpha: 0.4}, {arm: yours, alpha: 0.3}]\n"
    found = compare(make(), make(phases=phases))
    assert [(row.a, row.b) for row in found.arms] == [
        (["alpha/alpha=0.05"], ["other/baseline"]),
        (["alpha/alpha=0.4"], ["other/mine"]),
    ]
    assert (found.only_a, found.only_b) == ([], [["other/yours"]])


def test_the_difference_is_the_paired_t_interval_over_shared_seeds(make: Make) -> None:
    shifts = {2: 0.011, 3: 0.014, 4: 0.016, 5: 0.02}
    a, b = make(seeds="[1, 2, 3, 4]"), make(lambda spec: shifts[spec.seed], seeds="[2, 3, 4, 5]")
    row = compare(a, b).arms[0]
    expected: Any = stats.ttest_1samp([shifts[seed] for seed in (2, 3, 4)], 0.0)
    interval = expected.confidence_interval(0.95)
    assert row.seeds == [2, 3, 4] and row.paired
    assert row.delta.mean == pytest.approx((0.011 + 0.014 + 0.016) / 3)
    assert (row.delta.ci_low, row.delta.ci_high) == pytest.approx((interval.low, interval.high))
    assert row.delta.p == pytest.approx(float(expected.pvalue))
    assert row.delta.p_holm == pytest.approx(2 * float(expected.pvalue))
    assert row.verdict == "A better"


def test_sides_that_differ_by_less_than_min_effect_are_equivalent_only_if_the_interval_says_so(make: Make) -> None:
    quiet, noisy = {1: 0.001, 2: 0.002, 3: 0.0015}, {1: -0.02, 2: 0.02, 3: 0.001}
    for shifts, verdict in ((quiet, "equivalent"), (noisy, "undecided")):
        interval: Any = stats.ttest_1samp(list(shifts.values()), 0.0).confidence_interval(0.95)
        assert (max(-interval.low, interval.high) < 0.005) == (verdict == "equivalent")
        found = compare(make(), make(lambda spec, shifts=shifts: shifts[spec.seed]))
        assert [row.verdict for row in found.arms] == [verdict] * 2


def test_without_shared_seeds_two_samples_are_compared(make: Make) -> None:
    a, b = make(seeds="[1, 2, 3]"), make(seeds="[4, 5, 6]")
    row = compare(a, b).arms[0]
    assert (row.paired, row.seeds, row.identical) == (False, [], False)
    assert row.n == Sides(3, 3)
    assert row.delta.mean == pytest.approx(0.3, abs=1e-3)  # a seed adds 0.1
    assert row.delta.ci_low < 0.3 < row.delta.ci_high


def test_one_shared_seed_is_a_number_without_a_claim(make: Make) -> None:
    row = compare(make(seeds="[1]"), make(lambda spec: 0.5, seeds="[1]")).arms[0]
    assert row.delta.mean == pytest.approx(0.5)
    assert (row.verdict, row.delta.ci_low) == ("no claim", None)


def test_an_arm_that_diverged_on_one_side_is_not_judged_by_its_survivors(make: Make) -> None:
    def diverges(spec: TrialSpec) -> TrialResult:
        return pretend(spec, status="diverged" if spec.seed == 2 and spec.config.model.alpha == 0.4 else "finished")

    first, second = compare(make(), make(result_of=diverges)).arms
    assert first.verdict == "identical in every trial"
    assert (second.verdict, second.delta) == ("diverged in B", None)


def test_base_settings_that_differ_are_named_and_leave_nothing_to_match(make: Make) -> None:
    found = compare(make(), make(assignments=("optim.lr=0.02",)))
    assert found.base == {"optim.lr": [0.01, 0.02]}
    assert found.arms == [] and len(found.only_a) == len(found.only_b) == 2


def test_settings_that_compute_the_same_do_not_keep_arms_apart(make: Make) -> None:
    found = compare(make(), make(assignments=("tracker.log_every=3",)))
    assert found.base == {"tracker.log_every": [1, 3]}
    assert all(row.identical for row in found.arms)


def test_other_tokenizers_are_refused_for_losses_and_compared_in_bits_per_byte(make: Make) -> None:
    a, b = make(), make(assignments=("data.tokenizer=sentencepiece:350",))
    with pytest.raises(ConfigError, match=r"tokenizers differ .*sentencepiece:350.*--metric val_bpb"):
        compare(a, b)
    found = compare(a, b, metric="val_bpb")
    assert found.metric == Objective("val_bpb")
    assert len(found.arms) == 2 and found.data["vocab_size"] == [400, 350]


def test_other_evaluation_tokens_are_refused_by_every_metric(make: Make) -> None:
    a, b = make(), make(assignments=("eval_tokens=64",))
    for metric in (None, "val_bpb"):
        with pytest.raises(ConfigError, match=r"not comparable: the evaluation tokens differ: 128 .* and 64 "):
            compare(a, b, metric=metric)


def test_other_corpora_are_refused(make: Make) -> None:
    a, b = make(), make()
    edit_started(b, lambda event: event["data"].update(corpus="other", eval_sha256="0" * 64))
    with pytest.raises(ConfigError, match="corpora differ"):
        compare(a, b)


def test_opposite_goals_are_refused(make: Make) -> None:
    a, b = make(), make()
    edit_started(b, lambda event: event["metric"].update(goal="maximize"))
    with pytest.raises(ConfigError, match=r"goal minimize in .* and maximize in"):
        compare(a, b)


def test_other_metrics_need_a_choice(make: Make) -> None:
    a, b = make(), make()
    edit_started(b, lambda event: event["metric"].update(name="val_bpb"))
    with pytest.raises(ConfigError, match=r"ranks by val_loss .* by val_bpb; choose one with --metric"):
        compare(a, b)
    assert compare(a, b, metric="val_loss").arms
    with pytest.raises(ConfigError, match="unknown metric 'val_los', did you mean 'val_loss'"):
        compare(a, b, metric="val_los")


def test_scores_of_downstream_tasks_are_compared_over_the_same_examples_whatever_the_tokenizer(make: Make) -> None:
    def scored(limit: int | None) -> Callable[[TrialSpec], TrialResult]:
        asked = {"tasks": ["own"], "limit": limit, "num_fewshot": None, "core": True}

        def result(spec: TrialSpec) -> TrialResult:
            trained, core = pretend(spec), spec.config.model.alpha + spec.seed / 100  # type: ignore[operator]
            metrics = trained.metrics | {"core": core, "own/acc": 1 - core, "own/mine": core}
            return replace(trained, metrics=metrics, provenance=trained.provenance | {"evaluation": {"asked": asked}})

        return result

    a, b = make(result_of=scored(None)), make(result_of=scored(None), assignments=("data.tokenizer=sentencepiece:350",))
    found = compare(a, b, metric="core")
    assert (found.metric, len(found.arms)) == (Objective("core", "maximize"), 2)
    assert all(arm.delta and arm.delta.mean == 0 for arm in found.arms)
    with pytest.raises(ConfigError, match="unknown metric 'cor', did you mean 'core'"):
        compare(a, b, metric="cor")
    with pytest.raises(ConfigError, match=r"core was measured with limit null, .* and with limit 9, "):
        compare(a, make(result_of=scored(9)), metric="core")


def test_throughput_has_no_ratio_where_trials_shared_the_machine_differently(make: Make) -> None:
    a, b = make(), make()
    edit_started(b, lambda event: event.update(workers=7))
    found = compare(a, b)
    assert "7 in B" in found.throughput_note
    assert all(row.tokens_per_second == Throughput(1e4, 1e4, None) for row in found.arms)


def test_a_folder_without_results_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a results directory"):
        compare(make(), tmp_path)


# ---- by name -------------------------------------------------------------------------------------------------------

ARMS = """
  - name: alpha
    runs: [{arm: baseline}, {arm: longer, alpha: LENGTH}, {arm: OTHER, alpha: 0.6}]
"""


def test_effects_are_laid_side_by_side_by_the_name_of_the_arm(make: Make) -> None:
    a = make(phases=ARMS.replace("LENGTH", "0.4").replace("OTHER", "first"))
    b = make(phases=ARMS.replace("LENGTH", "0.2").replace("OTHER", "second"), seeds="[4, 5]")
    found = compare_effects(a, b)
    assert [pair.name for pair in found.arms if pair.same_settings] == ["alpha/baseline"]
    longer = next(pair for pair in found.arms if pair.name == "alpha/longer")
    for side, effect in ((a, longer.a), (b, longer.b)):
        rows = json.loads((side / "alpha" / "summary.json").read_text())["arms"]
        stored = next(row for row in rows if row["arm"] == "longer")
        assert effect.delta and stored["delta"]["ci_low"] == effect.delta.ci_low is not None
        base = next(row for row in rows if row["arm"] == "baseline")
        assert effect.delta.mean == pytest.approx(stored["score"]["mean"] - base["score"]["mean"])
        assert (effect.n, effect.verdict) == (stored["n"], stored["verdict"])
    assert (found.only_a, found.only_b) == (["alpha/first"], ["alpha/second"])
    assert found.notes == ["other settings under the same name: alpha/longer"]


def test_campaigns_with_other_metrics_have_no_effects_to_compare(make: Make) -> None:
    a, b = make(), make()
    edit_started(b, lambda event: event["metric"].update(name="val_bpb"))
    with pytest.raises(ConfigError, match=r"ranks by val_loss and .* by val_bpb"):
        compare_effects(a, b)
