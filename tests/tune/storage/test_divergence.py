"""A loss that exploded to a finite number is `diverged`; a model that does not learn is not."""

import dataclasses
from math import log
from pathlib import Path

import pytest

from ngpt.system.atomic_files import write_atomic
from tests.helpers.tiny_campaign import begun, drive, pretend, records, session_on, strict, write_file
from tune.results.summary import rebuild
from tune.storage.divergence import explosion
from tune.storage.journal import Journal, read_journal
from tune.trials.trial import TrialResult, TrialSpec

PHASES = """
  - name: alpha
    vary: {alpha: [0.2, 0.6, 0.4]}
"""
GPT2 = {"model.vocab_size": 50257}


@pytest.mark.parametrize("loss", [None, 3.3, 10.83, 11.5, 21.6])
def test_a_model_that_learned_nothing_or_little_has_not_exploded(loss: float | None) -> None:
    assert explosion(GPT2, {"val_loss": loss, "initial_val_loss": 10.9}) is None


def test_the_reason_gives_both_numbers() -> None:
    limit = 2 * log(50257)
    assert explosion(GPT2, {"val_loss": limit - 0.01}) is None
    reason = explosion(GPT2, {"val_loss": limit + 0.01})
    assert reason == (
        "its loss exploded: val_loss 21.6598 at the end, more than 2 times ln 50257 = 10.82, that of an untrained model"
    )
    reason = explosion(GPT2, {"val_loss": 4872.1, "initial_val_loss": 12.5})
    assert reason == "its loss exploded: val_loss 4872.1 at the end, more than 2 times 12.5 at step 0"


def test_a_start_far_above_an_untrained_loss_is_no_explosion() -> None:
    assert explosion(GPT2, {"val_loss": 60.0, "initial_val_loss": 80.0}) is None
    assert explosion(GPT2, {"val_loss": 20.0, "initial_val_loss": 3.0}) is None  # continues a trained model


def test_a_record_without_the_size_of_the_vocabulary_stays_as_it_is() -> None:
    assert explosion({}, {"val_loss": 4872.0}) is None


def one_explodes(spec: TrialSpec) -> TrialResult:
    result = pretend(spec)
    if spec.config.model.alpha == 0.6 and spec.seed == 2:
        return dataclasses.replace(result, metrics=result.metrics | {"val_loss": 4872.0, "val_bpb": 2436.0})
    return result


@pytest.mark.usefixtures("no_report")
def test_an_exploded_trial_is_diverged_and_hides_no_other_effect(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus, phases=PHASES, seeds="[1, 2, 3]")
    with session_on(file, tmp_path / "r") as session:
        drive(begun(session), one_explodes)
        summary = session.end()
    verdicts = {arm.arm: arm.verdict for arm in summary.phases[0].arms}
    assert verdicts == {"baseline": "baseline", "alpha=0.2": "better", "alpha=0.4": "better", "alpha=0.6": "diverged"}
    (problem,) = summary.problems
    assert (problem.arm, problem.seed, problem.status) == ("alpha=0.6", 2, "diverged")
    assert "val_loss 4872" in str(problem.error) and "ln 400 = 5.991" in str(problem.error)
    (record,) = [r for r in records(tmp_path / "r") if r["status"] == "diverged"]
    assert record["metrics"]["val_loss"] == 4872.0
    assert summary.trials.diverged == 1


@pytest.mark.usefixtures("no_report")
def test_a_journal_that_calls_it_finished_is_read_by_the_same_rule(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus, phases=PHASES, seeds="[1, 2, 3]")
    with session_on(file, tmp_path / "r") as session:
        drive(begun(session), one_explodes)
        session.end()
    path = tmp_path / "r/journal.jsonl"
    events = read_journal(path)
    write_atomic(path, "")
    old = Journal(path)
    for event in events:
        fields = {name: value for name, value in event.items() if name not in ("seq", "time", "event")}
        if event.get("status") == "diverged":
            fields |= {"status": "finished", "error": None}
        if event["event"] == "phase_finished":  # the exploded trial hid the effect of the others
            fields |= {"winner": "baseline", "winner_overrides": {}, "better": []}
        old.append(event["event"], **fields)
    old.close()
    summary = rebuild(tmp_path / "r")
    assert summary.trials.diverged == 1
    assert summary.answer.overrides == {"model.alpha": 0.4}
    assert strict((tmp_path / "r/summary.json").read_text())["problems"][0]["status"] == "diverged"
    with session_on(file, tmp_path / "r") as session:  # and it is not trained again
        assert drive(begun(session), one_explodes) == []
