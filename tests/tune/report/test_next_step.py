"""The next step after a campaign, and the phase that confirms a winner, which can be pasted into its file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tune.campaign import load_campaign
from tune.report.html import render_html
from tune.report.markdown import render_markdown
from tune.report.next_step import confirm_phase, next_step
from tune.spec.schema import FreshSeeds
from tune.storage.summaries import Answer, ArmSummary, CampaignSummary, Delta, PhaseNoise, PhaseSummary, TrialCounts
from tune.terminal.final_screen import final_screen

FILE = """\
campaign: mine
base: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16, steps: 4, batch_size: 2}
phases:
  - name: "NAME"
    vary: {alpha: [0.1, 0.2]}
"""


def finished(name: str = "alpha") -> CampaignSummary:
    arms = (ArmSummary("alpha=0.2", verdict="better", delta=Delta(-0.2, -0.3, -0.1)), ArmSummary("baseline"))
    phase = PhaseSummary(phase=name, arms=arms, baseline="baseline", winner="alpha=0.2", seeds=(1, 2, 3))
    answer = Answer("Use alpha=0.2.", name, "alpha=0.2", {"model.alpha": 0.2}, Delta(-0.2, -0.3, -0.1))
    return CampaignSummary(campaign="mine", status="finished", answer=answer, phases=(phase,))


@pytest.mark.parametrize("name", ["alpha", "1e3", "true", "a-b.c", "confirm"])
def test_the_advised_phase_can_be_appended_to_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE.replace("NAME", name) + confirm_phase(finished(name)) + "\n", encoding="utf-8")
    first, added = load_campaign(path).phases
    assert first.name == name and added.name == ("confirm-2" if name == "confirm" else "confirm")
    assert [(arm.name, arm.inherit) for arm in added.arms] == [("baseline", None), ("winner", name)]
    assert added.seeds == FreshSeeds()


def test_it_is_on_the_last_screen_without_a_frame_and_in_the_reports() -> None:
    summary = finished()
    yaml = confirm_phase(summary)
    console = Console(width=50, record=True)
    console.print(final_screen(summary, report="report.html"))
    assert f"\n{yaml}\n" in "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"
    assert f"<pre>{yaml}</pre>" in render_html(summary, [])
    assert f"```yaml\n{yaml}\n```" in render_markdown(summary)


def test_there_is_nothing_to_paste_where_there_is_nothing_to_confirm() -> None:
    summary = finished()
    assert confirm_phase(replace(summary, answer=replace(summary.answer, confirmed=True))) == ""
    assert confirm_phase(replace(summary, answer=Answer())) == ""
    assert confirm_phase(replace(summary, smoke=True)) == ""
    assert confirm_phase(replace(summary, trials=TrialCounts(failed=1))) == ""
    assert confirm_phase(replace(summary, status="interrupted")) == ""


def campaign(seeds: int = 2, **answer: Any) -> CampaignSummary:
    phase = PhaseSummary(
        phase="a",
        seeds=tuple(range(seeds)),
        min_effect=0.005,
        noise=PhaseNoise(sd=0.004, smallest_detectable=0.065, method="paired"),
        arms=(ArmSummary("x"), ArmSummary("y")),
    )
    chosen: dict[str, Any] = {"phase": "a", "winner": "x", "delta": Delta(-0.1)}
    return CampaignSummary(status="finished", answer=Answer(**(chosen | answer)), phases=(phase,))


def test_the_next_step_fits_the_state_of_the_campaign() -> None:
    assert next_step(campaign()).startswith("Confirm it on fresh seeds: add this phase to `phases:`")
    assert "change `vary:`" in next_step(campaign(confirmed=True))
    assert next_step(replace(campaign(), status="running")).startswith("It is running.")
    assert "Run the same command again" in next_step(replace(campaign(), status="interrupted"))
    assert "tries those trials again" in next_step(replace(campaign(), trials=TrialCounts(failed=1)))
    assert "Raise `budget:`" in next_step(replace(campaign(), left_out={"a": 1}))


def test_without_a_winner_the_next_step_names_the_seeds_that_would_decide() -> None:
    none: dict[str, Any] = {"winner": None, "delta": None, "phase": None}

    def step(*seeds: int | None) -> str:
        arms = tuple(ArmSummary(str(i), verdict="undecided", seeds_to_decide=n) for i, n in enumerate(seeds))
        summary = campaign(**none)
        phase = replace(summary.phases[0], arms=(ArmSummary("y", verdict="baseline"), *arms))
        return next_step(replace(summary, phases=(phase,)))

    assert step(13).startswith("1 arm of a undecided: about 13 seeds would decide.")
    assert "2 arms of a undecided: about 13 seeds would decide." in step(9, 13)
    assert "about 9 seeds would decide 1 of them." in step(9, None)
    assert "1,000 seeds would not be enough" in step(None)
    assert "change `vary:`" in step(), "all arms are decided"
    assert "One seed carries no claim" in next_step(campaign(seeds=1, **none))
