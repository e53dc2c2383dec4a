"""Fresh seeds in a running campaign: nobody has looked at them, and repeated confirmations cost their level."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import ConfigError
from tests.helpers.tiny_campaign import begun, drive, next_trial, pretend, session_on, write_file
from tune.results.summary import rebuild
from tune.session.fresh_seeds import borrowed_noise
from tune.storage.journal import read_journal
from tune.storage.records import ArmLook, Look
from tune.storage.seed_ledger import LEDGER_FILE, SeedLedger
from tune.storage.summaries import ArmSummary, CampaignSummary, Delta, PhaseSummary
from tune.trials.trial import TrialResult, TrialSpec

pytestmark = pytest.mark.usefixtures("no_report")

CONFIRM = """
  - name: alpha
    vary: {alpha: [0.05, 0.2, 0.4]}
  - name: confirm
    seeds: fresh 4
    runs: [{arm: baseline}, {arm: winner, inherit: alpha}]
"""


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus, phases=CONFIRM)


def run(file: Path, root: Path, result_of: Any = pretend) -> tuple[CampaignSummary, list[TrialSpec], list[str]]:
    """Runs a campaign to its end; returns its summary, the trained trials and the messages."""
    messages: list[str] = []
    with session_on(file, root) as session:
        begun(session).message = messages.append
        trained = drive(session, result_of)
        return session.end(), trained, messages


def seeds_of(trained: list[TrialSpec], phase: str = "confirm") -> set[int]:
    return {spec.seed for spec in trained if spec.phase == phase}


def alpha_of_02_wins(spec: TrialSpec) -> TrialResult:
    return pretend(spec, gain=2.0 if spec.config.model.alpha == 0.2 else 0.0)


def test_seeds_are_in_the_ledger_before_the_first_trial_that_uses_them(file: Path, root: Path) -> None:
    ledger = SeedLedger(root.parent)
    with session_on(file, root) as session:
        begun(session)
        while spec := next_trial(session):
            assert spec.seed in {seed for entry in ledger.entries() for seed in entry.seeds}
            session.tell(spec.trial_id, pretend(spec))
        session.end()
    alpha, confirm = ledger.entries()
    assert (alpha.campaign, alpha.phase, alpha.seeds, alpha.look) == ("tiny", "alpha", (1, 2), 0)
    assert (confirm.phase, len(confirm.seeds), confirm.look) == ("confirm", 4, 1)


def test_a_second_campaign_gets_other_seeds_and_its_confirmation_is_the_second(file: Path, root: Path) -> None:
    first = run(file, root)
    again = run(file, root.with_name("copy"))
    assert len(seeds_of(first[1])) == 4
    assert not seeds_of(first[1]) & seeds_of(again[1])
    assert (first[0].phases[1].confirmation, first[0].phases[1].confidence) == (1, 0.95)
    assert (again[0].phases[1].confirmation, again[0].phases[1].confidence) == (2, 0.975)
    (warning,) = (text for text in again[0].phases[1].warnings if "confirmation" in text)
    assert warning.startswith("second confirmation of the same question in this results folder: tested at 2.5 %")
    assert first[0].answer.confirmed and again[0].answer.confirmed


def test_a_second_run_of_a_campaign_has_the_same_seeds_and_trains_nothing(file: Path, root: Path) -> None:
    first, trained, _ = run(file, root)
    second, nothing, _ = run(file, root)
    assert nothing == [] and second.phases[1].seeds == first.phases[1].seeds
    shutil.rmtree(root)  # begun anew, it gets the same seeds from the ledger
    _, anew, _ = run(file, root)
    assert [spec.trial_id for spec in anew] == [spec.trial_id for spec in trained]
    assert len(SeedLedger(root.parent).entries()) == 2


def test_an_edit_that_changes_the_winner_gets_new_seeds_and_spends_level(file: Path, root: Path) -> None:
    first = run(file, root)
    edited = run(file, root, alpha_of_02_wins)  # the finished trials stay, so the winner too
    assert edited[1] == []
    file.write_text(file.read_text().replace("[0.05, 0.2, 0.4]", "[0.05, 0.2, 0.3]"))
    second, trained, _ = run(file, root)
    assert second.phases[1].confirmation == 2 and second.phases[1].confidence == 0.975
    assert len(seeds_of(trained)) == 4 and not seeds_of(trained) & seeds_of(first[1])
    file.write_text(file.read_text().replace("[0.05, 0.2, 0.3]", "[0.05, 0.2, 0.4]"))
    back, nothing, _ = run(file, root)  # the first question again: its seeds and its level
    assert nothing == [] and (back.phases[1].seeds, back.phases[1].confirmation) == (first[0].phases[1].seeds, 1)


def test_a_renamed_phase_keeps_its_seeds(file: Path, root: Path) -> None:
    first = run(file, root)
    file.write_text(file.read_text().replace("name: confirm", "name: check"))
    second, trained, _ = run(file, root)
    assert trained == [] and second.phases[1].seeds == first[0].phases[1].seeds
    assert len(SeedLedger(root.parent).entries()) == 2


def test_a_crash_between_ledger_and_journal_neither_loses_nor_spends_twice(file: Path, root: Path) -> None:
    class Killed(BaseException):
        pass

    with pytest.raises(Killed), session_on(file, root) as session:
        write = session.journal.append

        def append(event: str, **fields: Any) -> Any:
            if event == "phase_planned" and fields["phase"] == "confirm":
                raise Killed
            return write(event, **fields)

        session.journal.append = append  # type: ignore[method-assign]
        drive(begun(session))
    (entry,) = (entry for entry in SeedLedger(root.parent).entries() if entry.phase == "confirm")
    summary, trained, _ = run(file, root)
    assert seeds_of(trained) == set(entry.seeds)
    assert summary.phases[1].confirmation == 1
    assert len(SeedLedger(root.parent).entries()) == 2


def test_a_lost_ledger_gets_its_entries_back(file: Path, root: Path) -> None:
    run(file, root)
    before = SeedLedger(root.parent).entries()
    (root.parent / LEDGER_FILE).unlink()
    summary, trained, messages = run(file, root)
    assert trained == [] and summary.phases[1].confirmation == 1
    after = SeedLedger(root.parent).entries()
    assert [(entry.seeds, entry.look) for entry in after] == [(entry.seeds, entry.look) for entry in before]
    assert sum(LEDGER_FILE in message for message in messages) == 1


def test_a_missing_ledger_beside_other_results_is_said_in_one_line(file: Path, root: Path) -> None:
    run(file, root)
    (root.parent / LEDGER_FILE).unlink()
    _, _, messages = run(file, root.with_name("copy"))
    (line,) = (message for message in messages if LEDGER_FILE in message)
    assert "it is missing" in line


def test_a_ledger_that_cannot_be_written_is_said_in_one_line_and_stops_nothing(file: Path, root: Path) -> None:
    (root.parent / LEDGER_FILE).mkdir(parents=True)
    summary, trained, messages = run(file, root)
    assert len(seeds_of(trained)) == 4 and not seeds_of(trained) & {1, 2}
    assert sum(LEDGER_FILE in message for message in messages) == 1
    assert any("could not be entered in seeds.jsonl" in warning for warning in summary.phases[1].warnings)


def test_listed_seeds_that_were_looked_at_confirm_nothing(file: Path, root: Path) -> None:
    file.write_text(file.read_text().replace("seeds: fresh 4", "seeds: [1, 2, 7]"))
    summary, _, _ = run(file, root)
    assert summary.answer.confirmed is False
    warnings = [text for text in summary.phases[1].warnings if "confirms nothing" in text]
    assert warnings == [
        "it compares a winner on seeds that were looked at before (1 and 2), so it confirms nothing: use `seeds: fresh`"
    ]


def test_fresh_without_a_number_takes_few_seeds_for_a_large_effect_and_many_for_a_small_one(
    file: Path, root: Path
) -> None:
    file.write_text(file.read_text().replace("fresh 4", "fresh").replace("seeds: [1, 2]", "seeds: [1, 2, 3]"))
    _, trained, messages = run(file, root)
    assert len(seeds_of(trained)) == 4
    assert "phase confirm: 4 seeds find 0.35 again with 100 % power" in messages

    def just_found(spec: TrialSpec) -> TrialResult:
        return pretend(spec, gain=1e-3)  # the noise is about 3e-5

    file.write_text(file.read_text().replace("seeds: [1, 2, 3]", "min_effect: 0\nseeds: [1, 2, 3]"))
    _, trained, _ = run(file, root.with_name("small"), just_found)
    assert 4 <= len(seeds_of(trained)) <= 30


def test_a_confirmation_borrows_the_noise_of_the_phase_that_chose_its_winner(file: Path, root: Path) -> None:
    run(file, root)
    events = read_journal(root / "journal.jsonl")
    fresh = next(event["fresh"] for event in events if event["event"] == "phase_planned" and event["fresh"])
    df, variance = fresh["prior"]
    assert df > 0 and 0 < variance < 1e-7  # the noise of `pretend` is uniform on 1e-4
    summary = json.loads((root / "confirm/summary.json").read_text())
    winner = next(arm for arm in summary["arms"] if arm["arm"] == "winner")
    assert winner["delta"]["df"] > 3  # more than four seeds alone give
    assert winner["shrunken"] is None


def test_a_confirmation_of_another_length_borrows_no_noise(file: Path, root: Path) -> None:
    file.write_text(file.read_text().replace("    seeds: fresh 4\n", "    seeds: fresh 4\n    set: {steps: 9}\n"))
    run(file, root)
    events = read_journal(root / "journal.jsonl")
    fresh = next(event["fresh"] for event in events if event["event"] == "phase_planned" and event["fresh"])
    assert fresh["prior"] is None and fresh["look"] == 1


def test_of_several_phases_the_noisiest_and_the_smallest_is_borrowed() -> None:
    def phase(half: float, df: float, n: int) -> PhaseSummary:
        delta = Delta(-1.0, -1.0 - half, -1.0 + half, 1e-3, 1e-3, df=df)
        return PhaseSummary(arms=(ArmSummary("a", n=n, delta=delta, verdict="better"),), winner="a", baseline="b")

    # t(0.975, 10) = 2.228139, t(0.975, 4) = 2.776445
    found = borrowed_noise([phase(2.228139, 10, 3), phase(2 * 2.776445, 4, 5)])
    assert found == pytest.approx((4 / 3, 4 * 5), rel=1e-5)
    assert borrowed_noise([PhaseSummary(winner="a")]) is None


def test_noise_is_borrowed_from_the_interval_of_a_look_at_the_level_of_this_look() -> None:
    delta = Delta(-5.0, -5.0 - 3.169273, -5.0 + 3.169273, 1e-3, 1e-3, df=10)  # t(0.995, 10) = 3.169273
    row = ArmLook("a", 3, -5.0, decision="better")
    looks = (Look(1, 3, 0.01, "a", (row,), ("b", "c")), Look(2, 4, 0.005, "a", (ArmLook("c", 4),), ()))
    arms = (ArmSummary("a", n=3, delta=delta, verdict="better"),)
    found = borrowed_noise([PhaseSummary(arms=arms, winner="a", baseline="b", looks=looks)])
    assert found == pytest.approx((10 / 3, 3.0), rel=1e-5)


def test_the_answer_shows_a_shrunken_effect_until_it_is_confirmed(tmp_path: Path, corpus: Path, root: Path) -> None:
    file = write_file(tmp_path, corpus, phases=CONFIRM[: CONFIRM.index("  - name: confirm")], seeds="[1, 2, 3]")
    summary, _, _ = run(file, root)
    answer, winner = summary.answer, summary.phases[0].winning_arm
    assert winner and winner.delta and answer.shrunken == winner.shrunken is not None
    assert abs(answer.shrunken) <= abs(winner.delta.mean)
    assert "after allowing for selection; confirm it" in answer.sentence
    assert rebuild(root).answer == answer


def test_results_of_the_versions_before_the_ledger_keep_their_seeds(file: Path, root: Path) -> None:
    first = run(file, root)
    journal = root / "journal.jsonl"
    from tune.storage.journal import line_with_crc

    old_seeds = dict(zip(first[0].phases[1].seeds, (417, 418, 419, 420), strict=True))
    lines = []
    for event in read_journal(journal):
        text = json.dumps({name: value for name, value in event.items() if name not in ("fresh", "seen")})
        for new, old in old_seeds.items():
            text = text.replace(str(new), str(old))
        lines.append(line_with_crc(json.loads(text)) + "\n")
    journal.write_text("".join(lines))
    (root.parent / LEDGER_FILE).unlink()
    assert rebuild(root).answer.confirmed
    summary, trained, _ = run(file, root)
    assert trained == [] and summary.phases[1].seeds == (417, 418, 419, 420)


def test_a_lucky_baseline_is_named(tmp_path: Path, corpus: Path, root: Path) -> None:
    summary, _, _ = run(write_file(tmp_path, corpus), root)
    assert any("its luck is in every difference" in warning for warning in summary.phases[1].warnings)
    file = write_file(tmp_path, corpus)
    file.write_text(file.read_text().replace("    seeds: [1, 2]\n", ""))
    summary, trained, _ = run(file, root.with_name("apart"))
    assert seeds_of(trained, "projection") == {1001, 1002}
    assert not any("luck" in warning for warning in summary.phases[1].warnings)


def test_a_phase_without_a_winner_to_confirm_spends_nothing(file: Path, root: Path) -> None:
    summary, _, _ = run(file, root, lambda spec: pretend(spec, gain=0.0))
    assert [arm.arm for arm in summary.phases[1].arms] == ["baseline"]
    assert SeedLedger(root.parent).entries()[1].question is None
    assert summary.phases[1].confirmation == 0


def test_a_misspelt_rule_is_refused(file: Path) -> None:
    file.write_text(file.read_text().replace("fresh 4", "frsh"))
    with pytest.raises(ConfigError, match="expected `fresh`, `fresh N`"):
        session_on(file, file.parent / "r")
