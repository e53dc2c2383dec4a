"""Events of a journal that may come from somebody else: wrong names, types and sizes are found, in one line each."""

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forged_journal import deep, write_forged
from tune.spec.schema import Claim
from tune.storage import event_fields, records, summaries
from tune.storage.events import event_problem
from tune.storage.journal import Journal, JournalError, read_journal
from tune.storage.state import read_state

DATA = {
    **{"corpus": "x", "tokenizer": "gpt2", "tokenizer_sha256": None, "vocab_size": 400, "train_tokens": 9},
    **{"val_tokens": 9, "eval_tokens": 9, "eval_sha256": "e", "fingerprint": "f", "sha256": "s"},
}
TRIAL = {"trial_id": "0123456789-s1", "phase": "alpha", "arm": "baseline", "seed": 1, "attempt": 1}
EVENTS: dict[str, dict[str, Any]] = {
    "campaign_started": {
        **{"campaign": "tiny", "description": None, "metric": {"name": "val_loss", "goal": "minimize"}},
        **{"confidence": 0.95, "min_effect": 0.005, "command": "c", "workers": 1, "environment": {"device": "cpu"}},
        **{"data": DATA, "expected_trials": {"alpha": 1}},
    },
    "phase_planned": {
        **{"phase": "alpha", "inherit": None, "base": {}, "baseline": "baseline", "seeds": [1], "swept": {}},
        "arms": [{"arm": "baseline", "overrides": {}, "trials": [[1, "0123456789-s1"]]}],
    },
    "trial_started": {**TRIAL, "steps": 6},
    "trial_finished": {
        **{**TRIAL, "config": {"steps": 6, "model.vocab_size": 400}, "status": "finished", "error": None},
        **{"metrics": {"val_loss": 5.0, "tokens": 9, "steps": 6}, "started_at": None, "seconds": 1.0, "provenance": {}},
    },
    "phase_finished": {"phase": "alpha", "winner": "baseline", "winner_overrides": {}},
    "campaign_ended": {"status": "finished", "seconds": 1.5},
}


def journal() -> list[dict[str, Any]]:
    """The events of a small campaign, which a test may change."""
    head = {"time": "2026-11-21T10:00:00.000+00:00", "elapsed": 0.0}
    numbered = enumerate(copy.deepcopy(EVENTS).items(), 1)
    return [{"seq": seq, **head, "event": name, **fields} for seq, (name, fields) in numbered]


def test_a_sound_journal_has_no_problem_and_is_read(tmp_path: Path) -> None:
    write_forged(tmp_path / "journal.jsonl", journal())
    assert [event_problem(event) for event in read_journal(tmp_path / "journal.jsonl")] == [None] * 6
    assert read_state(tmp_path).status == "finished"


def test_unknown_events_and_fields_are_ignored(tmp_path: Path) -> None:
    lines = [*journal(), {**journal()[0], "seq": 7, "event": "of_a_later_version", "phase": 3}]
    for event in lines:
        event["of_a_later_version"] = {"a": [1]}
    write_forged(tmp_path / "journal.jsonl", lines)
    assert len(read_journal(tmp_path / "journal.jsonl")) == 7


MANY = float("1" + "0" * 200)
FORGED: dict[str, tuple[str, tuple[Any, ...], Any, str]] = {
    "an evaluation that is a number": ("trial_finished", ("provenance", "evaluation"), 3, "provenance.evaluation"),
    "a digest of a task that is a list": (
        *("trial_finished", ("provenance", "evaluation"), {"content": {"arc": [1]}}),
        "provenance.evaluation.content",
    ),
    "an absolute phase": ("phase_planned", ("phase",), "/abs", "'/abs' cannot be a folder of the results"),
    "a phase that climbs": ("phase_planned", ("phase",), "../../x", "'../../x' cannot be a folder"),
    "a phase of a neighbour": ("phase_planned", ("phase",), "../other/alpha", "cannot be a folder"),
    "a phase that is the parent": ("phase_planned", ("phase",), "..", "cannot be a folder"),
    "a phase that is the folder": ("phase_planned", ("phase",), ".", "cannot be a folder"),
    "a phase without a name": ("phase_planned", ("phase",), "", "cannot be a folder"),
    "a phase with NUL": ("phase_planned", ("phase",), "a\0b", r"'a\x00b' cannot be a folder"),
    "a phase with a line break": ("phase_planned", ("phase",), "a\nb", r"'a\nb' cannot be a folder"),
    "a phase with an escape": ("phase_planned", ("phase",), "\x1b[31m", r"'\x1b[31m' cannot be a folder"),
    "a long phase": ("phase_planned", ("phase",), "x" * 300, "cannot be a folder"),
    "a phase like a file": ("phase_planned", ("phase",), "Derived.JSON", "uses this name itself"),
    "a phase like a folder": ("phase_planned", ("phase",), "trials", "uses this name itself"),
    "a phase that is a number": ("phase_planned", ("phase",), 3, "phase: input should be a valid string, got 3"),
    "an expected phase": ("campaign_started", ("expected_trials",), {"../x": 1}, "cannot be a folder"),
    "a trial elsewhere": ("trial_started", ("trial_id",), "../../x", "'../../x' cannot be a folder"),
    "a trial with a slash": ("phase_planned", ("arms", 0, "trials", 0, 1), "a/b", "arms[0].trials[0][1]: 'a/b' cannot"),
    "a negative seed": ("phase_planned", ("seeds", 0), -1, "seeds[0]: input should be greater than or equal to 0"),
    "a huge seed": ("trial_finished", ("seed",), 2**40, "seed: input should be less than or equal to 2147483647"),
    "a seed that is true": ("trial_finished", ("seed",), True, "seed: input should be a valid integer, got True"),
    "a seed of no phase": ("phase_planned", ("arms", 0, "trials", 0, 0), 7, "seeds of an arm are not those"),
    "a phase without arms": ("phase_planned", ("arms",), [], "arms: list should have at least 1 item"),
    "a baseline that is no arm": ("phase_planned", ("baseline",), "x", "the baseline is none of the arms"),
    "a loss of text": ("trial_finished", ("metrics", "val_loss"), "5", "metrics.val_loss: input should be a valid"),
    "a loss that is no number": ("trial_finished", ("metrics", "val_loss"), float("nan"), "metrics.val_loss"),
    "a huge loss": ("trial_finished", ("metrics", "val_loss"), MANY, "metrics.val_loss: input should be less than"),
    "a vocabulary of nothing": ("trial_finished", ("config", "model.vocab_size"), 0, "greater than or equal to 1"),
    "no metrics": ("trial_finished", ("metrics",), None, "metrics: input should be"),
    "an unknown status": ("trial_finished", ("status",), "won", "status: input should be 'finished', 'diverged'"),
    "endless seconds": ("campaign_ended", ("seconds",), float("inf"), "seconds: input should be a finite number"),
    "a goal of its own": ("campaign_started", ("metric", "goal"), "win", "metric.goal: input should be 'minimize' or"),
    "a field of another metric": ("campaign_started", ("metric", "x"), 1, "metric.x: extra inputs are not permitted"),
    "many workers": ("campaign_started", ("workers",), 10**9, "workers: input should be less than or equal to 100000"),
    "a deep base": ("campaign_started", ("base",), {"a": deep()}, "base: nested too deeply"),
    "a whole number of 100 digits": (
        "campaign_started",
        ("base",),
        {"a": 10**100},
        "base: a whole number has more than",
    ),
    "half a character": ("trial_finished", ("error",), "\ud800", "error: input should be a valid string"),
    "half a character in a setting": ("phase_planned", ("base",), {"a": "\ud800"}, "half of a surrogate pair"),
    "a time without a zone": ("trial_started", ("time",), "2026-11-21", "is not an ISO time with a time zone"),
    "a time before all": ("trial_started", ("time",), "0001-01-01T00:00:00+14:00", "is not an ISO time"),
    "an arm without a name": ("trial_finished", ("arm",), "", "arm: string should have at least 1 character"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_field_is_one_line_with_file_and_line_number(kind: str, tmp_path: Path) -> None:
    name, place, value, problem = FORGED[kind]
    lines = journal()
    number = list(EVENTS).index(name)
    node: Any = lines[number]
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
    path = tmp_path / "journal.jsonl"
    write_forged(path, lines)
    with pytest.raises(JournalError) as caught:
        read_journal(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:{number + 1}: this line is not an event that this version can read: {name}: ")
    assert problem in text and text.isprintable() and len(text) < 700


FIELDS = [(name, field) for name, fields in EVENTS.items() for field in ("time", *fields)]


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_missing_field_is_named(name: str, field: str) -> None:
    event = next(event for event in journal() if event["event"] == name)
    del event[field]
    assert event_problem(event) == f"{name}: {field}: field required"


@pytest.mark.parametrize("winner", ["other", "baseline"])
def test_an_event_that_does_not_fit_those_before_it_is_named(winner: str, tmp_path: Path) -> None:
    lines = journal()
    lines[4]["winner"] = winner
    if winner == "baseline":
        lines[4]["phase"] = "other"
    write_forged(tmp_path / "journal.jsonl", lines)
    with pytest.raises(JournalError, match=r"journal\.jsonl:5: this line does not fit those before it: phase_finished"):
        read_state(tmp_path)


TYPES = [
    (event_fields.Work, records.TrialWork),
    (event_fields.Draw, records.FreshDraw),
    (event_fields.LookRow, records.ArmLook),
    (event_fields.LookFields, records.Look),
    (event_fields.Better, records.BetterArm),
    (event_fields.Metric, summaries.Objective),
    (event_fields.ClaimFields, Claim),
]


@pytest.mark.parametrize(("checked", "built"), TYPES)
def test_what_is_built_from_a_part_of_an_event_has_the_fields_that_are_checked(checked: Any, built: Any) -> None:
    assert set(checked.model_fields) == set(built.__dataclass_fields__)


def test_an_event_that_no_reader_would_accept_is_not_written(tmp_path: Path) -> None:
    written = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError, match=r"could not be read again: trial_started: seed: input should be greater than"):
        written.append("trial_started", **{**EVENTS["trial_started"], "seed": -1})
    written.append("trial_started", **EVENTS["trial_started"])
    written.close()
    assert len(read_journal(tmp_path / "journal.jsonl")) == 1
