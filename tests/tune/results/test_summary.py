"""What a campaign leaves behind for other tools, held against the contract, and the sentence it all comes down to."""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from ngpt.config.base import ConfigError
from ngpt.training import evaluation
from ngpt.training.evaluation import EvalMetric
from tests.helpers.tiny_campaign import (
    begun,
    drive,
    losses,
    pretend,
    records,
    session_on,
    strict,
    train_all,
    write_file,
)
from tune.results.answer import settings_text
from tune.results.phase_summary import _text_errors
from tune.results.phase_warnings import _edge_of_range, recovery_warnings
from tune.results.summary import rebuild
from tune.spec import phase_reader
from tune.storage.journal import read_journal
from tune.storage.state import read_state
from tune.storage.summaries import DIAGNOSTICS, ArmSummary, CampaignSummary, TrialCounts, TrialRecord
from tune.trials.trial import TrialResult, TrialSpec

RECORD_FIELDS = {"campaign", "phase", "arm", "trial_id", "seed", "overrides", "config", "status", "metrics", "error"}
RECORD_FIELDS |= {"attempt", "started_at", "seconds", "provenance"}
METRICS = {"val_loss", "val_bpb", "train_loss", "steps", "tokens", "tokens_per_second", "peak_memory_bytes", "n_params"}
ARM_FIELDS = {"arm", "overrides", "n", "val_loss", "delta", "verdict", "tokens_per_second"}

Judged = Callable[[str, Callable[[TrialSpec], TrialResult]], CampaignSummary]

CONFIRM = """
  - name: alpha
    vary: {alpha: [0.05, 0.2, 0.4, 0.6]}
  - name: projection
    inherit: alpha
    grid: {project_every: [1, 3]}
  - name: confirm
    runs: [{arm: baseline}, {arm: winner, inherit: projection}]
    set: {steps: 9}
    seeds: fresh 3
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A campaign of two phases, trained for real."""
    folder = tmp_path_factory.mktemp("trained")
    train_all(write_file(folder, corpus), folder / "tiny")
    return folder / "tiny"


@pytest.fixture
def judged(tmp_path: Path, corpus: Path, no_report: None) -> Judged:
    """Summarizes a campaign of three seeds whose trials give the results of a function."""

    def summarize(phases: str, result_of: Callable[[TrialSpec], TrialResult]) -> CampaignSummary:
        file = write_file(tmp_path, corpus, phases=phases, seeds="[1, 2, 3]")
        with session_on(file, tmp_path / "tiny") as session:
            drive(begun(session), result_of)
            return session.end()

    return summarize


def derived(root: Path) -> list[Path]:
    kept = ("campaign.yaml", "manifest.json", "journal.jsonl", "campaign.lock")
    files = (path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != "trials")
    return sorted(path for path in files if path.name not in kept)


def computed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without where the numbers are sent."""
    return {name: value for name, value in config.items() if not name.startswith("tracker.")}


def spread(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The columns `name.x` of a row, by x."""
    return {column.removeprefix(f"{name}."): row[column] for column in row if column.startswith(f"{name}.")}


# ---- the contract --------------------------------------------------------------------------------------------------


def test_the_files_of_the_contract_are_there(trained: Path) -> None:
    names = {str(path.relative_to(trained)) for path in derived(trained)}
    per_phase = ("trials.jsonl", "summary.json", "summary.parquet", "curves.parquet")
    assert names == {"summary.json", "report.html", "report.md", "derived.json"} | {
        f"{phase}/{name}" for phase in ("alpha", "projection") for name in per_phase
    }
    for record in records(trained):
        folder = trained / "trials" / record["trial_id"]
        assert (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()


def test_everything_is_strict_json(trained: Path) -> None:
    for path in trained.rglob("*.json"):
        strict(path.read_text())
    for path in trained.rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            strict(line)


def test_a_record_has_the_fields_of_the_contract(trained: Path) -> None:
    for record in records(trained):
        assert record.keys() >= RECORD_FIELDS
        assert record["metrics"].keys() >= METRICS
        assert record["status"] == "finished" and record["error"] is None
        config = json.loads((trained / "trials" / record["trial_id"] / "config.json").read_text())
        assert computed(config) == computed(record["config"])


def test_records_are_what_the_journal_says(trained: Path) -> None:
    truth = {e["trial_id"]: e for e in read_journal(trained / "journal.jsonl") if e["event"] == "trial_finished"}
    for record in records(trained):
        event = truth[record["trial_id"]]
        same = ("status", "metrics", "error", "attempt", "started_at", "seconds", "provenance", "config", "seed")
        assert {name: record[name] for name in same} == {name: event[name] for name in same}
    assert {record["trial_id"] for record in records(trained)} == truth.keys()


def test_an_arm_has_the_fields_of_the_contract(trained: Path) -> None:
    for phase in ("alpha", "projection"):
        summary = strict((trained / phase / "summary.json").read_text())
        assert summary["winner"] in {arm["arm"] for arm in summary["arms"]} and summary["why"]
        for arm in summary["arms"]:
            assert arm.keys() >= ARM_FIELDS
            assert arm["val_loss"].keys() >= {"mean", "sd", "ci_low", "ci_high"}
            own = [r["metrics"]["val_loss"] for r in records(trained) if (r["phase"], r["arm"]) == (phase, arm["arm"])]
            assert arm["n"] == len(own) == 2
            assert arm["val_loss"]["mean"] == pytest.approx(sum(own) / 2, abs=1e-12)


def test_the_parquet_rows_are_the_arms(trained: Path) -> None:
    for phase in ("alpha", "projection"):
        arms = strict((trained / phase / "summary.json").read_text())["arms"]
        rows = pq.read_table(trained / phase / "summary.parquet").to_pylist()
        assert [row["arm"] for row in rows] == [arm["arm"] for arm in arms]
        for row, arm in zip(rows, arms, strict=True):
            assert json.loads(row["overrides"]) == arm["overrides"]
            assert spread(row, "val_loss") == arm["val_loss"]
            delta = arm["delta"] or dict.fromkeys(("mean", "ci_low", "ci_high", "p", "p_holm", "df", "reading"))
            assert spread(row, "delta") == delta
            for name in ("n", "rank", "verdict", "noise_sd", "seeds_to_decide", "tokens", "trial_ids"):
                assert row[name] == arm[name]


def test_the_parquet_files_of_all_phases_are_one_table(trained: Path) -> None:
    for name in ("summary.parquet", "curves.parquet"):
        schemas = [pq.read_schema(trained / phase / name) for phase in ("alpha", "projection")]
        assert schemas[0] == schemas[1] and not any(pa.types.is_null(kind) for kind in schemas[0].types)
    arms = pa.concat_tables([pq.read_table(trained / phase / "summary.parquet") for phase in ("alpha", "projection")])
    assert {(row["campaign"], row["phase"]) for row in arms.to_pylist()} == {("tiny", "alpha"), ("tiny", "projection")}
    columns = {name.partition(".")[0] for name in arms.column_names}
    assert columns == {"campaign", "phase", *DIAGNOSTICS, *ArmSummary.__dataclass_fields__} - {"metrics"}


def test_curves_have_every_logged_step_of_every_trial_also_of_reused_ones(trained: Path) -> None:
    for phase in ("alpha", "projection"):
        rows = pq.read_table(trained / phase / "curves.parquet").to_pylist()
        own = [record for record in records(trained) if record["phase"] == phase]
        assert {row["trial_id"] for row in rows} == {record["trial_id"] for record in own}
        for record in own:
            lines = (trained / "trials" / record["trial_id"] / "metrics.jsonl").read_text().splitlines()
            logged = [strict(line) for line in lines]
            curve = [row for row in rows if row["trial_id"] == record["trial_id"]]
            for name in ("step", "tokens", "train_loss", "val_loss", "lr"):
                assert [row[name] for row in curve] == [row.get(name) for row in logged]
            assert {row["arm"] for row in curve} == {record["arm"]}
            final = [row["val_loss"] for row in curve if row["val_loss"] is not None][-1]
            assert final == record["metrics"]["val_loss"]


def test_totals_are_sums_over_the_trials_that_were_trained_here(trained: Path) -> None:
    summary = strict((trained / "summary.json").read_text())
    once = {record["trial_id"]: record for record in records(trained)}
    assert summary["trials"] == {
        "total": 6,
        "finished": 6,
        "diverged": 0,
        "failed": 0,
        "stopped": 0,
        "reused": 2,
    }
    assert summary["tokens"] == sum(record["metrics"]["tokens"] for record in once.values()) == 6 * 6 * 4 * 16
    assert summary["trial_seconds"] == pytest.approx(sum(record["seconds"] for record in once.values()))
    assert sum(phase["seconds"] for phase in summary["phases"]) == pytest.approx(summary["trial_seconds"])
    end = read_journal(trained / "journal.jsonl")[-1]
    assert (end["event"], summary["seconds"]) == ("campaign_ended", end["seconds"])


@pytest.mark.slow
def test_all_derived_files_are_rebuilt_from_the_journal_byte_for_byte(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(trained, copy)
    before = {path.relative_to(copy): path.read_bytes() for path in derived(copy)}
    for path in derived(copy):
        path.unlink()
    code = f"from pathlib import Path; from tune.results.summary import rebuild; rebuild(Path({str(copy)!r}))"
    # Another process, where sets have another order.
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    after = {path.relative_to(copy): path.read_bytes() for path in derived(copy)}
    assert after.keys() == before.keys()
    for path in before.keys() - {Path("report.html"), Path("derived.json")}:  # plotly names its plots at random
        assert after[path] == before[path], path


def test_a_folder_without_a_campaign_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a results directory: it has no journal"):
        rebuild(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trials_without_metrics_have_their_place_in_every_file(judged: Judged, tmp_path: Path) -> None:
    def result_of(spec: TrialSpec) -> TrialResult:
        return pretend(spec, status={1: "finished", 2: "failed", 3: "diverged"}[spec.seed])

    summary = judged("\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n", result_of)
    assert [row["status"] for row in records(tmp_path / "tiny")] == ["finished"] * 2 + ["failed"] * 2 + ["diverged"] * 2
    assert summary.trials == TrialCounts(total=6, finished=2, diverged=2, failed=2)
    assert [(p.seed, p.status, p.error) for p in summary.problems] == [
        (2, "failed", "Traceback ...\nValueError: it broke"),
        (2, "failed", "Traceback ...\nValueError: it broke"),
        (3, "diverged", None),
        (3, "diverged", None),
    ]
    rows = pq.read_table(tmp_path / "tiny" / "alpha" / "curves.parquet").to_pylist()
    assert {row["trial_id"] for row in rows} == {record["trial_id"] for record in records(tmp_path / "tiny")}


# ---- the answer ----------------------------------------------------------------------------------------------------


def test_a_winner_that_unseen_seeds_agree_with_is_confirmed(judged: Judged) -> None:
    answer = judged(CONFIRM, pretend).answer
    assert answer.sentence.startswith("Use alpha=0.6, project_every=1: it lowers val_loss by 0.550, 95% interval 0.")
    assert answer.sentence.endswith("on 3 unseen seeds.")
    assert (answer.phase, answer.winner, answer.confirmed) == ("confirm", "winner", True)
    assert answer.overrides == {"model.alpha": 0.6, "project_every": 1}  # and not the steps of that phase


def test_without_a_phase_on_unseen_seeds_the_winner_is_not_confirmed(judged: Judged) -> None:
    answer = judged(CONFIRM.partition("  - name: confirm")[0], pretend).answer
    assert "on 3 paired seeds (about 0." in answer.sentence
    assert "after allowing for selection; confirm it). Phase projection found nothing better." in answer.sentence
    assert (answer.phase, answer.confirmed, answer.overrides) == ("alpha", False, {"model.alpha": 0.6})


def test_an_effect_on_top_of_an_earlier_winner_says_so(judged: Judged) -> None:
    chained = "\n  - name: a\n    vary: {project_every: [1, 3]}\n"
    chained += "  - name: b\n    vary: {alpha: [0.05, 0.2]}\n  - name: c\n    inherit: b\n    vary: {alpha: [0.4]}\n"
    answer = judged(chained, pretend).answer
    assert answer.delta.mean == pytest.approx(-0.2, abs=1e-3)  # not the 0.35 by which it is better than the base
    assert "on 3 paired seeds, on top of b (about 0.2 after allowing for selection" in answer.sentence
    assert "on top" not in judged(chained.replace("inherit: b", "seeds: [1, 2]"), pretend).answer.sentence


def test_settings_in_a_sentence_say_whose_they_are_where_a_word_does_not() -> None:
    assert settings_text({"optim.name": "muon", "model.alpha": 0.2}) == "optim.name=muon, alpha=0.2"


def test_unseen_seeds_confirm_only_what_had_been_chosen_before(judged: Judged) -> None:
    unrelated = "\n  - name: a\n    vary: {project_every: [1, 3]}\n"
    unrelated += "  - name: b\n    vary: {alpha: [0.05, 0.4]}\n    seeds: [7, 8, 9]\n"
    answer = judged(unrelated, pretend).answer
    assert (answer.phase, answer.winner, answer.confirmed) == ("b", "alpha=0.4", False)


def test_a_later_phase_that_does_not_find_it_again_leaves_the_winner_undecided(
    judged: Judged,
) -> None:
    answer = judged(CONFIRM, lambda spec: pretend(spec, gain=0.0 if spec.phase == "confirm" else 1.0)).answer
    assert answer.sentence.startswith("Undecided: alpha=0.6 lowers val_loss by 0.550")
    assert answer.sentence.endswith("but phase confirm does not confirm it.")
    assert (answer.phase, answer.confirmed) == ("alpha", False)


def test_where_nothing_is_better_the_base_stays(judged: Judged) -> None:
    answer = judged(CONFIRM, lambda spec: pretend(spec, gain=0.0)).answer
    assert answer.sentence == "No arm of any phase is better than its baseline beyond the noise: keep the base."
    assert (answer.winner, answer.overrides, answer.delta, answer.confirmed) == (None, {}, None, False)


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ({1}, "No arm of any phase is better than its baseline beyond the noise, but the baseline of phase a diverged"),
        ({1, 2, 3}, "The baseline of phase a has no result, so no arm can be compared with it."),
    ],
)
def test_nobody_is_told_to_keep_a_base_that_diverged(judged: Judged, seeds: set[int], sentence: str) -> None:
    def result_of(spec: TrialSpec) -> TrialResult:
        is_lost = spec.config.model.alpha < 0.1 and spec.seed in seeds
        return pretend(spec, status="diverged" if is_lost else "finished", gain=0.0)

    answer = judged("\n  - name: a\n    vary: {alpha: [0.2, 0.4]}\n", result_of).answer
    assert answer.sentence.startswith(sentence) and "keep the base" not in answer.sentence


def test_a_small_effect_is_told_with_two_digits_and_a_high_confidence_as_it_is(
    tmp_path: Path, corpus: Path, no_report: None
) -> None:
    file = write_file(tmp_path, corpus, phases="\n  - name: a\n    vary: {alpha: [0.05, 0.4]}\n", seeds="[1, 2, 3]")
    file.write_text("confidence: 0.998\nmin_effect: 0\n" + file.read_text())

    def result(spec: TrialSpec) -> TrialResult:
        loss = 5.0 + spec.seed - (0.0003 + 1e-6 * spec.seed) * (spec.config.model.alpha == 0.4)
        return replace(pretend(spec), metrics=pretend(spec).metrics | {"val_loss": loss})

    with session_on(file, tmp_path / "tiny") as session:
        drive(begun(session), result)
        sentence = session.end().answer.sentence
    effect = "Use alpha=0.4: it lowers val_loss by 0.00030, 99.8% interval 0.00029 to 0.00031, on 3 paired seeds"
    assert sentence == f"{effect} (about 0.0003 after allowing for selection; confirm it)."


def test_one_seed_gives_no_answer_about_noise(tmp_path: Path, corpus: Path, no_report: None) -> None:
    phases = "\n  - name: a\n    vary: {alpha: [0.05, 0.4]}\n"
    with session_on(write_file(tmp_path, corpus, phases=phases, seeds="[1]"), tmp_path / "tiny") as session:
        drive(begun(session))
        answer = session.end().answer
    assert answer.sentence == "One seed carries no claim: no arm can be called better than its baseline."
    assert answer.winner is None


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_of_a_campaign_that_is_not_over_nothing_is_said_for_good(
    tmp_path: Path, corpus: Path, no_report: None, gain: float
) -> None:
    with session_on(write_file(tmp_path, corpus, seeds="[1, 2, 3]"), tmp_path / "tiny") as session:
        drive(begun(session), lambda spec: pretend(spec, gain=gain), most=7)  # the first phase and one more trial
        session.stop_requested = True
        summary = session.end()
    begins = "So far, use alpha=0.4: it lowers" if gain else "So far, no arm of any completed phase is better"
    assert summary.answer.sentence.startswith(begins)
    over, begun_only = summary.phases
    assert over.winner == ("alpha=0.4" if gain else "alpha=0.05") and not over.why.startswith("so far")
    assert begun_only.winner is None and begun_only.why.startswith("so far, after 4 of 6 trials: ")


def test_where_nothing_finished_there_is_no_answer(judged: Judged) -> None:
    answer = judged(CONFIRM, lambda spec: pretend(spec, status="failed")).answer
    assert answer.sentence == "No trial has finished successfully, so there is no answer."


def test_where_finished_trials_lack_the_metric_the_answer_names_it(judged: Judged) -> None:
    def without_loss(spec: TrialSpec) -> TrialResult:
        result = pretend(spec)
        return replace(result, metrics=result.metrics | {"val_loss": None})

    answer = judged("\n  - {name: alpha, vary: {alpha: [0.2]}}\n", without_loss).answer
    assert answer.sentence == "No finished trial has a usable value of val_loss, so there is no answer."


def test_before_the_first_phase_is_over_there_is_no_answer(tmp_path: Path, corpus: Path, no_report: None) -> None:
    with session_on(write_file(tmp_path, corpus), tmp_path / "tiny") as session:
        drive(begun(session), most=1)
        session.stop_requested = True
        summary = session.end()
    assert summary.answer.sentence == "No phase has been completed yet, so there is no answer."
    assert summary.status == "interrupted"
    assert len(losses(tmp_path / "tiny")) == 1


# ---- warnings ------------------------------------------------------------------------------------------------------

SWEEP = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.2, 0.4]}\n"


def warnings(summary: CampaignSummary) -> str:
    return "\n".join(summary.warnings)


def test_a_winner_at_the_edge_of_the_range_is_warned_about(judged: Judged) -> None:
    assert "alpha: the winner is at the upper end of the range of model.alpha" in warnings(judged(SWEEP, pretend))


def test_a_winner_inside_the_range_is_not(judged: Judged) -> None:
    def result_of(spec: TrialSpec) -> TrialResult:
        return pretend(spec, gain={0.05: 0.0, 0.2: 9.0, 0.4: 1.0}[spec.config.model.alpha])

    summary = judged(SWEEP, result_of)
    assert summary.phases[0].winner == "alpha=0.2"
    assert "range" not in warnings(summary)


def test_arms_that_saw_different_numbers_of_tokens_are_warned_about(judged: Judged) -> None:
    phases = "\n  - name: length\n    vary: {steps: [6, 8]}\n"
    assert "length: the arms saw different numbers of training tokens: " in warnings(judged(phases, pretend))
    assert "tokens" not in warnings(judged("\n  - name: batch\n    vary: {batch_size: [4, 8]}\n", pretend))


def test_divisors_that_were_not_finite_are_warned_about(judged: Judged) -> None:
    def result_of(spec: TrialSpec) -> TrialResult:
        result = pretend(spec)
        bad = spec.config.model.norm_mode == "dotprod" and spec.seed > 1
        return replace(result, metrics=result.metrics | {"r_replaced": 40 if bad else 0})

    shown = warnings(judged("\n  - name: mode\n    vary: {norm_mode: [baseline, dotprod, ema]}\n", result_of))
    assert "mode: norm_mode=dotprod: 80 divisors r of its norm mode were not finite and became 1" in shown
    assert shown.count("divisors") == 1


@pytest.mark.parametrize(("fact", "word"), [("device", "devices"), ("data_sha256", "data")])
def test_trials_from_different_worlds_are_warned_about(judged: Judged, fact: str, word: str) -> None:
    def result_of(spec: TrialSpec) -> TrialResult:
        result = pretend(spec)
        elsewhere: dict[str, Any] = {fact: "another"} if spec.seed == 3 else {}
        return replace(result, provenance=result.provenance | elsewhere)

    found = warnings(judged(SWEEP, result_of))
    assert f"alpha: its trials come from different {word}: another, " in found
    assert found.count("come from different") == 1


def test_trials_whose_code_is_not_known_are_warned_about_beside_others(judged: Judged) -> None:
    def result_of(spec: TrialSpec) -> TrialResult:
        result = pretend(spec)
        return replace(result, provenance=result.provenance | ({"code_sha256": "c0de"} if spec.seed == 3 else {}))

    found = warnings(judged(SWEEP, result_of))
    assert "alpha: the code of 3 of its 9 trials is not known and may differ: c0de" in found


def test_another_metric_ranks_and_judges_while_the_loss_stays_the_loss(
    tmp_path: Path, corpus: Path, no_report: None
) -> None:
    file = write_file(tmp_path, corpus, phases="\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n")
    file.write_text("metric: {name: val_bpb}\n" + file.read_text())
    with session_on(file, tmp_path / "out") as session:
        drive(begun(session))
        (phase,) = session.end().phases
    for arm in phase.arms:
        values = [r["metrics"] for r in records(tmp_path / "out") if r["arm"] == arm.arm]
        for field, metric in (("score", "val_bpb"), ("val_loss", "val_loss")):
            assert getattr(arm, field).mean == pytest.approx(sum(value[metric] for value in values) / 2)
    best, base = phase.arms
    assert best.delta.mean == pytest.approx(best.score.mean - base.score.mean)


# ---- metrics of plug-ins --------------------------------------------------------------------------------------------


def with_metrics(**added: Callable[[TrialSpec], float | None]) -> Callable[[TrialSpec], TrialResult]:
    """Results that also have these metrics; a function that raises KeyError leaves its metric out."""

    def result(spec: TrialSpec) -> TrialResult:
        plain, values = pretend(spec), {}
        for name, value in added.items():
            with contextlib.suppress(KeyError):
                values[name] = value(spec)
        return replace(plain, metrics=plain.metrics | values)

    return result


TWO_ARMS = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""


def test_a_further_metric_has_its_mean_and_interval_for_each_arm(judged: Judged, tmp_path: Path) -> None:
    accuracy = {(alpha, seed): alpha + seed / 100 for alpha in (0.05, 0.4) for seed in (1, 2, 3)}
    measured = with_metrics(accuracy=lambda spec: accuracy[spec.config.model.alpha, spec.seed])
    summary = judged(TWO_ARMS, measured)
    arm = next(arm for arm in summary.phases[0].arms if arm.arm == "alpha=0.4")
    values = [accuracy[0.4, seed] for seed in (1, 2, 3)]
    low, high = stats.t.interval(0.95, 2, loc=statistics.fmean(values), scale=stats.sem(values))
    spread = arm.metrics["accuracy"]
    assert (spread.mean, spread.n) == (pytest.approx(statistics.fmean(values)), 3)
    assert (spread.sd, spread.ci_low, spread.ci_high) == pytest.approx((statistics.stdev(values), low, high))
    table = pq.read_table(tmp_path / "tiny" / "alpha" / "summary.parquet")
    row = next(row for row in table.to_pylist() if row["arm"] == "alpha=0.4")
    assert row["accuracy.mean"] == spread.mean and row["accuracy.n"] == 3
    assert (
        strict((tmp_path / "tiny" / "alpha" / "summary.json").read_text())["arms"][0]["metrics"]["accuracy"]["n"] == 3
    )


def test_a_metric_that_a_trial_lacks_is_null_and_said(judged: Judged, tmp_path: Path) -> None:
    lacking = {(0.4, 1): None, (0.4, 2): None, (0.4, 3): None, (0.05, 2): None}

    def value(spec: TrialSpec) -> float | None:
        if (spec.config.model.alpha, spec.seed) == (0.05, 2):
            raise KeyError  # not even a key, as in a record of before the plug-in
        return lacking.get((spec.config.model.alpha, spec.seed), 0.5)

    summary = judged(TWO_ARMS, with_metrics(accuracy=value))
    (warning,) = [text for text in summary.phases[0].warnings if "accuracy" in text]
    assert warning.startswith("accuracy is missing or not finite in 4 of 6 finished trials")
    assert "alpha=0.05 (seed 2)" in warning and "alpha=0.4 has no value of it at all" in warning
    for record in records(tmp_path / "tiny"):
        is_missing = record["metrics"]["accuracy"] is None
        assert is_missing == (record["unmeasured"] == ["accuracy"])
        assert is_missing == (record["arm"] == "alpha=0.4" or record["seed"] == 2)
    spreads = {arm.arm: arm.metrics["accuracy"] for arm in summary.phases[0].arms}
    assert (spreads["alpha=0.4"].n, spreads["alpha=0.4"].mean, spreads["alpha=0.05"].n) == (0, None, 2)


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_a_metric_of_a_plugin_ranks_in_its_direction(
    goal: str, tmp_path: Path, corpus: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evaluation.METRICS, "accuracy", EvalMetric(lambda model, tokens: 0.5, "maximize"))
    file = write_file(tmp_path, corpus, phases=TWO_ARMS, seeds="[1, 2, 3]")
    file.write_text(f"metric: {{name: accuracy, goal: {goal}}}\n{file.read_text()}")
    noise = with_metrics(accuracy=lambda spec: spec.config.model.alpha + spec.seed / 10)
    with session_on(file, tmp_path / "tiny") as session:
        drive(begun(session), noise)
        summary = session.end()
    phase = summary.phases[0]
    arm = next(arm for arm in phase.arms if arm.arm == "alpha=0.4")
    assert arm.delta and arm.delta.mean == pytest.approx(0.35)
    assert (arm.verdict, phase.winner) == (("better", "alpha=0.4") if goal == "maximize" else ("worse", "alpha=0.05"))
    assert arm.rank == (1 if goal == "maximize" else 2)
    assert (arm.score.mean, arm.val_loss.mean) == (pytest.approx(0.6), pytest.approx(4.8, abs=1e-3))
    assert arm.text_se is None  # the error of the loss from the text says nothing about an accuracy
    if goal == "maximize":
        assert "it raises accuracy by 0.350" in summary.answer.sentence


def test_tables_of_campaigns_with_different_metrics_are_one_table(
    tmp_path: Path, corpus: Path, no_report: None
) -> None:
    tables: dict[str, list[pa.Table]] = {"summary": [], "curves": []}
    for name in ("accuracy", "calibration"):
        folder = tmp_path / name
        folder.mkdir()
        file = write_file(folder, corpus, phases=TWO_ARMS)
        file.write_text(file.read_text().replace("campaign: tiny", f"campaign: {name}"))

        def logged(spec: TrialSpec, name: str = name) -> TrialResult:
            rows = [{"step": 0, name: None}, {"step": 3, name: 0.5}] if spec.seed == 1 else []
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            spec.folder.mkdir(parents=True, exist_ok=True)
            (spec.folder / "metrics.jsonl").write_text(lines)
            return with_metrics(**{name: lambda spec: 0.5 if spec.seed == 1 else None})(spec)

        with session_on(file, folder / "results") as session:
            drive(begun(session), logged)
            session.end()
        for kind, found in tables.items():
            found.append(pq.read_table(folder / "results" / "alpha" / f"{kind}.parquet"))
    for kind, found in tables.items():
        assert not [column for table in found for column in table.schema if pa.types.is_null(column.type)]
        joined = pa.concat_tables(found, promote_options="default")
        assert set(joined["campaign"].to_pylist()) == {"accuracy", "calibration"}
        column = "accuracy.mean" if kind == "summary" else "accuracy"
        assert joined.schema.field(column).type == pa.float64() and set(joined["phase"].to_pylist()) == {"alpha"}
        polars = pytest.importorskip("polars", reason="needs pip install polars")
        paths = [tmp_path / name / "results" / "alpha" / f"{kind}.parquet" for name in ("accuracy", "calibration")]
        frames = [polars.scan_parquet(path) for path in paths]
        whole = polars.concat(frames, how="diagonal").collect()
        assert whole.height == joined.num_rows and polars.Null not in whole.dtypes
        assert whole[column].dtype == polars.Float64


def test_an_arm_whose_trials_deviated_from_their_settings_is_marked() -> None:
    """A halved batch is another experiment; a skipped step or a rollback is worth a look."""

    def record(**metrics: float) -> TrialRecord:
        return TrialRecord("c", "p", "a", "t", 1, {}, {"batch_size": 48}, "finished", metrics)

    plain, older = record(batch_size=48, skipped_steps=0, rollbacks=0), record(val_loss=3.0)
    halved, shaky = record(batch_size=24), record(batch_size=48, skipped_steps=3, rollbacks=1)
    assert recovery_warnings("a", [plain, older]) == []
    assert recovery_warnings("a", [plain, halved]) == [
        "a: 1 of its trials ran out of memory and halved its batch (24 instead of 48)"
    ]
    assert recovery_warnings("a", [shaky, shaky]) == [
        "a: 6 skipped steps, because a loss or gradient was not finite",
        "a: 2 rollbacks to a checkpoint, because a loss or gradient was not finite",
    ]


def test_the_text_has_a_standard_error_beside_that_of_the_seeds(trained: Path) -> None:
    blocks = {e["trial_id"]: e["eval_blocks"] for e in read_journal(trained / "journal.jsonl") if "eval_blocks" in e}
    phase = strict((trained / "alpha/summary.json").read_text())
    base = next(arm for arm in phase["arms"] if arm["verdict"] == "baseline")
    assert base["text_se"] is None
    for arm in phase["arms"]:
        if arm is not base:
            nats = [
                [sum(blocks[i]["nats"][b] for i in side["trial_ids"]) / 2 for b in range(21)] for side in (arm, base)
            ]
            per_block = [(x - y) / 6 for x, y in zip(*nats, strict=True)]  # 21 blocks of 6 tokens, and one of 2
            assert arm["text_se"] == pytest.approx(statistics.stdev(per_block) / 21**0.5, rel=0.2)
    assert "The choice of the evaluation text adds a standard error of" in (trained / "report.md").read_text()
    without = replace(read_state(trained), results={})
    assert _text_errors(without, without.phases["alpha"], "val_loss") == {}


SPACE = """
  - name: draw
    search:
      trials: 3
      space: {alpha: {KIND: [0.1, 0.6]}}
"""


@pytest.mark.parametrize(
    ("kind", "alphas", "end"),
    [("uniform", (0.2, 0.3, 0.56), "upper"), ("uniform", (0.2, 0.3, 0.54), None), ("log", (0.2, 0.3, 0.51), "upper")],
)
def test_a_winner_near_the_end_of_a_search_space_is_warned_about(
    judged: Judged, monkeypatch: pytest.MonkeyPatch, kind: str, alphas: tuple[float, ...], end: str | None
) -> None:
    monkeypatch.setattr(phase_reader, "random_arms", lambda search: [search.arm([alpha]) for alpha in alphas])
    warnings = judged(SPACE.replace("KIND", kind), pretend).phases[0].warnings
    text = f"the winner's model.alpha = {alphas[-1]} is in the {end} tenth of the range [0.1, 0.6]"
    assert [w for w in warnings if "range" in w] == ([f"{text}; the best value may lie beyond it"] if end else [])


def test_both_ends_of_a_range_of_whole_numbers_are_its_edges() -> None:
    assert [_edge_of_range(value, 1, 8, is_log=False) for value in (1, 2, 7, 8)] == ["lower", None, None, "upper"]
    assert [_edge_of_range(value, 1, 64, is_log=True) for value in (1, 2, 32, 64)] == ["lower", None, None, "upper"]
