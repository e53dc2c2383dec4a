"""Nothing that other code computed is reused in silence: the run stops, trains it anew, or keeps it and says so."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ngpt.code.digest import Code, current_code
from ngpt.config.base import ConfigError
from tests.helpers import ROOT
from tests.helpers.tiny_campaign import begun, drive, pretend, records, session_on, write_file
from tune.machine.estimate import estimate
from tune.planning.code_changes import decide, find_code_changes
from tune.results.status import read_snapshot
from tune.results.summary import rebuild
from tune.results.verify import verify
from tune.session.discarded import DISCARDED
from tune.storage.journal import read_journal
from tune.storage.summaries import CampaignSummary
from tune.trials.trial import TrialResult, TrialSpec

pytestmark = pytest.mark.usefixtures("no_report")

RULES = """
  - name: rule
    vary: {residual: [slerp, lerp]}
"""
CHAIN = f"""{RULES}  - name: projection
    inherit: rule
    grid: {{project_every: [1, 3]}}
"""
SLERP = "ngpt/model/residual.py (slerp)"


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Code]:
    """The code of a copy of the package, with a text in its residual rules replaced."""

    def copy(before: str, after: str) -> Code:
        package = tmp_path_factory.mktemp("copy") / "ngpt"
        shutil.copytree(ROOT / "ngpt", package, ignore=shutil.ignore_patterns("__pycache__"))
        text = (package / "model" / "residual.py").read_text()
        assert text.count(before) == 1
        (package / "model" / "residual.py").write_text(text.replace(before, after))
        return Code(package)

    return copy


@pytest.fixture(scope="module")
def other(edited: Callable[[str, str], Code]) -> Code:
    """Code with another formula of `slerp`."""
    return edited("sine * tangent)", "sine * tangent * 1.01)")


@pytest.fixture(scope="module")
def edited_ensemble(tmp_path_factory: pytest.TempPathFactory) -> Code:
    """Code that trains several runs together in another way."""
    package = tmp_path_factory.mktemp("copy") / "ngpt"
    shutil.copytree(ROOT / "ngpt", package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "ensemble" / "train.py"
    text = path.read_text()
    assert text.count("    if reason := ensemble_incompatibility(configs):\n") == 1
    path.write_text(text.replace("    if reason := ensemble_incompatibility(configs):\n", "    if reason := None:\n"))
    return Code(package)


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus, phases=RULES)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results" / "tiny"


class Ran:
    """One session: the arms of the trials that it started, what it said about the code, and its summary."""

    def __init__(self, arms: list[str], lines: tuple[str, ...], messages: list[str], summary: CampaignSummary) -> None:
        self.arms, self.lines, self.messages, self.summary = arms, lines, messages, summary

    @property
    def warnings(self) -> list[str]:
        return [warning for warning in self.summary.warnings if "code" in warning]


def run(
    file: Path,
    root: Path,
    code: Code | None = None,
    *,
    retrain: list[str] | None = None,
    keep: bool = False,
    gain: Callable[[TrialSpec], float] = lambda spec: 0.0,
    provenance: dict[str, Any] | None = None,
) -> Ran:
    """Runs a campaign without training; the loss of a trial is better by its `gain`."""
    messages: list[str] = []

    def result_of(spec: TrialSpec) -> TrialResult:
        spec.folder.mkdir(parents=True)  # raises if the files of an earlier trial are still there
        result = pretend(spec)
        loss = 5.0 - gain(spec)
        metrics = result.metrics | {"val_loss": loss, "val_bpb": loss / 2}
        text = f'{{"step": {spec.config.steps}, "val_loss": {loss}}}\n'
        (spec.folder / "metrics.jsonl").write_text(text)
        marks = {"code_sha256": (code or current_code()).digest} if provenance is None else provenance
        return replace(result, metrics=metrics, provenance=result.provenance | marks)

    with session_on(file, root, code=code) as session:
        changes = find_code_changes(session.campaign, session.state, session.root, session.code)
        decision = decide(changes, retrain=retrain, keep=keep)
        session.apply_code(decision)
        session.message = messages.append
        started = drive(begun(session), result_of)
        return Ran([f"{spec.phase}/{spec.arm}" for spec in started], decision.lines, messages, session.end())


def events(root: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_journal(root / "journal.jsonl") if event["event"] == name]


def values(root: Path) -> dict[tuple[str, int], float]:
    return {(record["arm"], record["seed"]): record["metrics"]["val_loss"] for record in records(root)}


def slerp_wins(spec: TrialSpec) -> float:
    return 1.0 * (spec.config.model.residual == "slerp") + 1e-3 * spec.seed


# ---- stop ----------------------------------------------------------------------------------------------------------


def test_an_edited_rule_stops_the_run_and_is_named_with_the_arms_that_use_it(
    file: Path, root: Path, other: Code
) -> None:
    run(file, root)
    before = (root / "journal.jsonl").read_bytes()
    with pytest.raises(ConfigError) as stopped:
        run(file, root, other)
    assert stopped.value.exit_code == 2
    said = str(stopped.value)
    assert f"{SLERP}: 2 results of rule/residual=slerp\n" in said
    assert "--retrain [ARM ...]" in said and "--keep" in said and "lerp:" not in said.replace("slerp", "")
    assert (root / "journal.jsonl").read_bytes() == before


def test_a_comment_stops_nothing(file: Path, root: Path, edited: Callable[[str, str], Code]) -> None:
    run(file, root)
    again = run(file, root, edited("R_MIN = 0.25  # lower", "R_MIN = 0.25  # the lowest"))
    assert (again.arms, again.lines, again.warnings) == ([], (), [])


def test_a_new_rule_stops_nothing(file: Path, root: Path, edited: Callable[[str, str], Code]) -> None:
    run(file, root)
    again = run(file, root, edited('"add": add}', '"add": add, "mine": lambda x, f, alpha, norm: x}'))
    assert (again.arms, again.lines, again.warnings) == ([], (), [])
    assert len(events(root, "code_version")) == 2


def test_a_plan_says_it_too(file: Path, root: Path, other: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    run(file, root)
    with session_on(file, root) as session:
        campaign = session.campaign
    assert estimate(campaign, root).code == []
    monkeypatch.setattr("tune.machine.estimate.current_code", lambda: other)
    planned = estimate(campaign, root)
    assert planned.to_run == 0
    assert planned.code[0] == f"other code: {SLERP}: 2 results of rule/residual=slerp"
    assert "the run stops" in planned.code[1]
    again = estimate(campaign, root, retrain=[])
    assert (again.to_run, again.code) == (2, [f"trained anew: {SLERP}: 2 results of rule/residual=slerp"])
    assert estimate(campaign, root, keep=True).to_run == 0


# ---- train anew ----------------------------------------------------------------------------------------------------


def test_retrain_trains_the_trials_of_other_code_anew(file: Path, root: Path, other: Code) -> None:
    run(file, root)
    again = run(file, root, other, retrain=[], gain=slerp_wins)
    assert again.arms == ["rule/residual=slerp"] * 2
    assert again.lines == (f"trained anew: {SLERP}: 2 results of rule/residual=slerp",)
    assert values(root) == {
        **{("residual=lerp", seed): 5.0 for seed in (1, 2)},
        **{("residual=slerp", seed): 4.0 - 1e-3 * seed for seed in (1, 2)},
    }
    assert again.warnings == []
    (discarded,) = events(root, "trials_discarded")
    old = [event for event in events(root, "trial_finished") if event["trial_id"] in discarded["trial_ids"]]
    assert [event["metrics"]["val_loss"] for event in old[:2]] == [5.0, 5.0]  # the journal keeps what was measured
    assert {row["code_sha256"] for row in events(root, "campaign_started")} == {current_code().digest, other.digest}
    third = run(file, root, other, retrain=[])
    assert third.arms == [] and third.lines == ("--retrain: no trial was trained by other code",)
    problems = {issue.path.rpartition("/")[2] for issue in verify(root).problems}
    assert problems <= {"config.json", "checkpoints"}  # which these pretended trials do not have


def test_old_files_do_not_mix_with_new_ones(file: Path, root: Path, other: Code) -> None:
    run(file, root)
    run(file, root, other, retrain=[], gain=slerp_wins)
    (discarded,) = events(root, "trials_discarded")
    for trial_id in discarded["trial_ids"]:
        old = root / DISCARDED / f"{trial_id}-{discarded['seq']}"
        assert old.joinpath("metrics.jsonl").read_text() == '{"step": 6, "val_loss": 5.0}\n'
        assert (root / "trials" / trial_id / "metrics.jsonl").read_text() != '{"step": 6, "val_loss": 5.0}\n'


def test_retrain_of_one_arm_leaves_the_others_to_be_decided(
    file: Path, root: Path, edited: Callable[[str, str], Code]
) -> None:
    run(file, root)
    everything = edited("    return norm(x + alpha * (f - x))", "    return norm(x + 2 * alpha * (f - x))")
    with pytest.raises(ConfigError, match="rule/residual=slerp"):
        run(file, root, everything, retrain=["residual=lerp"])
    again = run(file, root, everything, retrain=["rule/residual=lerp"], keep=True)
    assert again.arms == ["rule/residual=lerp"] * 2
    assert len(again.warnings) == 1 and "2 of its 4 trials were trained by other code" in again.warnings[0]


def test_an_unknown_arm_is_an_error_with_the_nearest_name(file: Path, root: Path, other: Code) -> None:
    run(file, root)
    with pytest.raises(ConfigError, match=r"--retrain: unknown arm 'residual=slrp', did you mean 'residual=slerp'\?"):
        run(file, root, other, retrain=["residual=slrp"])


def test_a_kill_after_the_decision_changes_no_result(file: Path, root: Path, tmp_path: Path, other: Code) -> None:
    """The event is on disk, the files are still in their place, and no trial has begun again."""
    run(file, root)
    with session_on(file, root, code=other) as session:
        changes = find_code_changes(session.campaign, session.state, session.root, session.code)
        session.apply_code(decide(changes, retrain=[], keep=False))
        begun(session)  # and then nothing: `end` is not called
    assert len(events(root, "trials_discarded")) == 1
    for name, retrain in {"same": [], "without": None}.items():
        copy = tmp_path / name / "tiny"
        shutil.copytree(root, copy)
        again = run(file, copy, other, gain=slerp_wins, retrain=retrain)
        assert again.arms == ["rule/residual=slerp"] * 2 and again.warnings == []
        assert values(copy)["residual=slerp", 1] == 4.0 - 1e-3 and values(copy)["residual=lerp", 1] == 5.0
        assert len(list((copy / DISCARDED).iterdir())) == 2


def test_a_kill_between_the_move_and_the_start_changes_no_result(
    file: Path, root: Path, other: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(file, root)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tune.session.session.heartbeat.clear_heartbeat", interrupt)  # called just after the move
        run(file, root, other, retrain=[])
    assert len(list((root / DISCARDED).iterdir())) == 1
    again = run(file, root, other, retrain=[], gain=slerp_wins)
    assert again.arms == ["rule/residual=slerp"] * 2
    assert len(list((root / DISCARDED).iterdir())) == 2


def interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


def test_status_and_report_do_not_count_discarded_results(file: Path, root: Path, other: Code) -> None:
    run(file, root)
    with session_on(file, root, code=other) as session:
        changes = find_code_changes(session.campaign, session.state, session.root, session.code)
        session.apply_code(decide(changes, retrain=[], keep=False))
        drive(begun(session), most=0)
        session.ask()  # plans, and begins a trial
        session.stop_requested = True
        session.end()
    assert read_snapshot(root).done == 2
    (phase,) = rebuild(root).phases
    assert (phase.winner, phase.trials.finished) == (None, 2)
    assert {record["arm"] for record in records(root)} == {"residual=lerp"}


def test_a_trial_that_a_later_phase_turns_out_to_need_is_not_reused_either(
    tmp_path: Path, corpus: Path, root: Path, other: Code
) -> None:
    """The phase after `rule` had slerp as its base once; when it has it again, the old trials are of other code."""
    file = write_file(tmp_path, corpus, phases=CHAIN)
    later = run(file, root, gain=slerp_wins).arms[4:]
    assert {arm.partition("/")[0] for arm in later} == {"projection"}
    file.write_text(file.read_text().replace("[slerp, lerp]", "[slerp, lerp, add_normalize]"))
    second = run(file, root, gain=lambda spec: 2.0 + 1e-3 * spec.seed)  # add_normalize wins
    assert second.arms == ["rule/residual=add_normalize"] * 2 + later
    third = run(file, root, other, retrain=[], gain=lambda spec: 3 * slerp_wins(spec))
    assert third.arms == ["rule/residual=slerp"] * 2 + later
    assert f"phase projection: other code trained {len(later)} trials of it; trained anew" in third.messages


def test_retrain_gives_back_a_trial_whose_folder_was_removed(file: Path, root: Path) -> None:
    run(file, root)
    lost = next(event["trial_id"] for event in events(root, "trial_finished") if event["arm"] == "residual=lerp")
    shutil.rmtree(root / "trials" / lost)
    kept = run(file, root)
    assert kept.arms == []
    assert kept.lines == (
        "its folder is gone: 1 result of rule/residual=lerp; the result counts, and --retrain trains it anew",
    )
    again = run(file, root, retrain=[])
    assert again.arms == ["rule/residual=lerp"]
    assert again.lines == ("trained anew: its folder is gone: 1 result of rule/residual=lerp",)
    assert run(file, root, retrain=[]).arms == [] and (root / "trials" / lost).is_dir()


@pytest.mark.slow
def test_a_look_between_rounds_does_not_read_results_of_other_code(
    tmp_path: Path, corpus: Path, root: Path, other: Code
) -> None:
    """The rounds of the second phase were run on slerp once. On slerp again, they begin with the first round."""
    rounds = "{until: decided, start: 3, most: 6}"
    phases = f"{RULES}  - name: later\n    inherit: rule\n    seeds: {rounds}\n    vary: {{project_every: [1, 3]}}\n"
    file = write_file(tmp_path, corpus, phases=phases)

    def undecided(spec: TrialSpec) -> float:
        return slerp_wins(spec) + (0.01 * (spec.seed % 3) if spec.config.project_every == 3 else 0.0)

    first = run(file, root, gain=undecided).arms[4:]
    file.write_text(file.read_text().replace("[slerp, lerp]", "[slerp, lerp, add_normalize]"))
    run(file, root, gain=lambda spec: 2.0 + 1e-3 * spec.seed)  # add_normalize wins
    third = run(file, root, other, retrain=[], gain=lambda spec: 3 * undecided(spec))
    assert third.arms[:2] == ["rule/residual=slerp"] * 2
    assert third.arms[2:] == first and len(first) > 6  # more than the first round
    told = [message for message in third.messages if "other code trained" in message]
    assert told[0] == "phase later: other code trained 6 trials of it; trained anew" and len(told) > 1


# ---- keep ----------------------------------------------------------------------------------------------------------


def test_keep_reuses_trials_and_marks_it(file: Path, root: Path, other: Code) -> None:
    run(file, root)
    kept = run(file, root, other, keep=True)
    assert kept.arms == []
    assert kept.lines == (f"kept although the code differs: {SLERP}: 2 results of rule/residual=slerp",)
    mark = f"2 of its 4 trials were trained by other code than that of the newest run, and kept: {SLERP}"
    assert kept.warnings == [f"rule: {mark}"]
    assert mark in kept.summary.phases[0].warnings and rebuild(root).warnings == kept.summary.warnings
    (event,) = events(root, "code_kept")
    assert (event["code_sha256"], event["versions"]) == (other.digest, [current_code().digest])
    assert list(event["trials"].values()) == [[SLERP], [SLERP]]


def test_what_was_kept_once_is_told_and_not_asked_again(
    file: Path, root: Path, other: Code, edited: Callable[[str, str], Code]
) -> None:
    run(file, root)
    run(file, root, other, keep=True)
    again = run(file, root, other)
    assert again.lines == (
        f"reused although the code differs, since --keep was given before: {SLERP}: 2 results of rule/residual=slerp",
    )
    assert len(again.warnings) == 1
    with pytest.raises(ConfigError, match="slerp"):  # a third version is another question
        run(file, root, edited("sine * tangent)", "sine * tangent * 1.03)"))
    back = run(file, root)  # the edit was undone
    assert (back.lines, back.warnings) == ((), [])


def test_kept_trials_can_be_trained_anew_later(file: Path, root: Path, other: Code) -> None:
    run(file, root)
    run(file, root, other, keep=True)
    again = run(file, root, other, retrain=[])
    assert again.arms == ["rule/residual=slerp"] * 2 and again.warnings == []


def test_a_winner_that_other_code_has_chosen_is_told(
    file: Path, root: Path, tmp_path: Path, corpus: Path, other: Code
) -> None:
    run(file, root, gain=slerp_wins)
    phases = f"\n  - name: later\n    inherit: {root}/rule\n    vary: {{project_every: [1, 3]}}\n"
    later = write_file(tmp_path, corpus, phases=phases)
    out = tmp_path / "later"
    assert run(later, out).lines == ()
    shutil.rmtree(out)
    run(later, out, other)
    line = f"inherit: {root}/rule was decided by other code: {SLERP}"
    assert run(later, out, other).lines == (line,)


def test_the_ensemble_concerns_only_trials_that_it_trained(
    file: Path, root: Path, tmp_path: Path, edited_ensemble: Code
) -> None:
    run(file, root)
    assert run(file, root, edited_ensemble).lines == ()
    run(file, tmp_path / "together", provenance={"vectorised": 2})
    with pytest.raises(ConfigError, match=r"ngpt/ensemble/train\.py \(train_together\): 4 results"):
        run(file, tmp_path / "together", edited_ensemble)


# ---- code that is not known, unfinished trials ---------------------------------------------------------------------


def test_results_of_an_earlier_version_are_reused_and_told_in_one_line(file: Path, root: Path, other: Code) -> None:
    run(file, root, provenance={"code_sha256": "0123456789abcdef"})
    again = run(file, root, other)
    assert again.arms == [] and again.warnings == []
    assert again.lines == (
        "the code of 4 results is not known: an earlier version of this program, or another machine, trained them",
    )
    assert run(file, root, other, retrain=["residual=slerp"]).arms == ["rule/residual=slerp"] * 2
    mixed = rebuild(root).warnings
    assert any("the code of 2 of its 4 trials is not known and may differ: 0123456789abcdef" in text for text in mixed)


def checkpoint(root: Path, trial_id: str) -> Path:
    folder = root / "trials" / trial_id / "checkpoints" / "step_0000003"
    folder.mkdir(parents=True)
    return folder


def interrupted(file: Path, root: Path) -> None:
    """A campaign that was stopped while its slerp arm trained and had saved a checkpoint."""
    with session_on(file, root) as session:
        begun(session).ask()  # lerp comes first, since it is the base
        (spec,) = session.ask()
        assert spec.arm == "residual=slerp"
        checkpoint(root, spec.trial_id)
        session.stop_requested = True
        session.end()


def test_a_checkpoint_of_other_code_is_not_continued_in_silence(file: Path, root: Path, other: Code) -> None:
    interrupted(file, root)
    with pytest.raises(ConfigError, match=r"slerp\): 1 checkpoint of an unfinished trial of rule/residual=slerp"):
        run(file, root, other)


def test_retrain_begins_an_unfinished_trial_anew(file: Path, root: Path, other: Code) -> None:
    interrupted(file, root)
    again = run(file, root, other, retrain=[])
    assert len(again.arms) == 4 and again.warnings == []
    assert [path.name for path in (root / DISCARDED).glob("*/checkpoints/*")] == ["step_0000003"]
    assert list((root / "trials").glob("*/checkpoints")) == []


def test_keep_continues_an_unfinished_trial_and_marks_it(file: Path, root: Path, other: Code) -> None:
    interrupted(file, root)
    with session_on(file, root, code=other) as session:
        changes = find_code_changes(session.campaign, session.state, session.root, session.code)
        session.apply_code(decide(changes, retrain=None, keep=True))
        marks = {"code_sha256": other.digest}
        drive(begun(session), lambda spec: replace(pretend(spec), provenance=pretend(spec).provenance | marks))
        summary = session.end()
    mark = f"1 of its 4 trials was begun by other code and continued by that of the newest run: {SLERP}"
    assert f"rule: {mark}" in summary.warnings
    assert not (root / DISCARDED).exists()


def test_a_file_that_is_edited_while_the_campaign_runs_is_noticed(
    file: Path, root: Path, other: Code, tmp_path: Path
) -> None:
    """A worker that is replaced after the edit loads the new file; its trials are marked."""
    package = tmp_path / "live" / "ngpt"
    shutil.copytree(ROOT / "ngpt", package, ignore=shutil.ignore_patterns("__pycache__"))
    live = Code(package)
    assert live.digest == current_code().digest  # read now
    residual = (other.folder / "model" / "residual.py").read_text()

    def result_of(spec: TrialSpec) -> TrialResult:
        (package / "model" / "residual.py").write_text(residual)
        return replace(pretend(spec), provenance=pretend(spec).provenance | {"code_sha256": other.digest})

    with session_on(file, root, code=live) as session:
        drive(begun(session), result_of)
        summary = session.end()
    mark = f"2 of its 4 trials were trained by other code than that of the newest run, and kept: {SLERP}"
    assert f"rule: {mark}" in summary.warnings
