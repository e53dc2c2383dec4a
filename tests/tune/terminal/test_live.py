"""The terminal: what fits, what is said, and that text from outside cannot do anything to it."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group, RenderableType
from rich.text import Text

from tests.helpers.summaries import from_json
from tune import format as fmt
from tune.results.snapshot import ArmSoFar, Running, Snapshot
from tune.storage.summaries import ArmSummary, CampaignSummary, Delta, PhaseSummary
from tune.terminal import final_screen as screen
from tune.terminal.final_screen import forest
from tune.terminal.live import View, live_console, live_view, open_console, print_plainly, words

Summary = dict[str, Any]
DELTA = "-0.0349 [-0.0379, -0.0319]".replace("-", fmt.MINUS)
REPORT = Path("results/c/report.html")
HOSTILE = ("[red]x[/]", "[/]", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07t", "a\rb\nc", "[link=http://a]y", "\u202eevil")


def final_screen(summary: Summary, *, report: Path) -> RenderableType:
    return screen.final_screen(from_json(CampaignSummary, summary), report=report)


def phase_table(own: Summary, *, width: int = 100) -> RenderableType:
    return screen.phase_table(from_json(PhaseSummary, own), width=width)


def printed(view: RenderableType, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=stream, width=width, height=24, force_terminal=False, color_system=None)
    console.print(view)
    stream.flush()
    return raw.getvalue().decode(encoding).splitlines()


def arm(name: str, verdict: str, mean: float | None, delta: float | None = None) -> Summary:
    spread = {"mean": mean, "sd": 0.1, "ci_low": mean and mean - 0.01, "ci_high": mean and mean + 0.01}
    effect = {"mean": delta, "ci_low": delta and delta - 0.003, "ci_high": delta and delta + 0.003, "p": 0.01}
    return {"arm": name, "n": 3, "score": spread, "delta": effect if delta else None, "verdict": verdict} | {
        "overrides": {},
        "tokens_per_second": mean and 41234.0,
        "tied_with_winner": verdict == "undecided",
    }


def phase(name: str = "alpha", **more: Any) -> Summary:
    arms = [
        arm("alpha=0.15", "better", 4.3771, -0.0349),
        arm("alpha=0.28", "undecided", 4.3794, -0.0326),
        arm("baseline", "baseline", 4.412),
        arm("alpha=0.6", "diverged", None),
    ]
    noise = {"sd": 0.0041, "method": "paired", "correlation": 0.87, "df": 8, "smallest_detectable": 0.0063}
    trials = {"total": 12, "finished": 11, "diverged": 1, "failed": 0, "stopped": 0, "reused": 0}
    metric = {"name": "val_loss", "goal": "minimize"}
    return (
        {"phase": name, "arms": arms, "noise": noise, "trials": trials, "metric": metric, "inherit": None}
        | {
            "winner": "alpha=0.15",
            "baseline": "baseline",
            "why": "alpha=0.15 is better by 0.0349",
            "seeds": [1, 2, 3],
            "warnings": ["edge of the range"],
            "min_effect": 0.005,
        }
        | more
    )


def campaign(*phases: Summary) -> Summary:
    delta = {"mean": -0.0349, "ci_low": -0.0379, "ci_high": -0.0319, "p": 0.01}
    answer = {
        "sentence": "Use alpha=0.15.",
        "phase": "alpha",
        "winner": "alpha=0.15",
        "delta": delta,
        "confirmed": False,
    }
    chosen = list(phases or [phase()])
    return {"campaign": "ngpt-gh200", "status": "finished", "answer": answer | {"overrides": {"model.alpha": 0.15}}} | {
        "phases": chosen,
        "trials": chosen[0]["trials"],
        "tokens": 62_914_560,
        "seconds": 83.0,
        "trial_seconds": 240.7,
        "problems": [],
        "warnings": [f"{p['phase']}: {w}" for p in chosen for w in p.get("warnings") or []] + ["two torch versions"],
    }


def running(n: int = 1, name: str = "alpha=0.15") -> Running:
    return Running(f"t{n}", "alpha", name, 2, 20, 200, 4.5, None, 41234.0)


def snapshot(**more: Any) -> Snapshot:
    facts: dict[str, Any] = {
        "campaign": "ngpt-gh200",
        "status": "running",
        "phase": "alpha",
        "phase_number": 2,
        "n_phases": 3,
        "done": 12,
        "total": 29,
        "total_is_final": False,
        "reused": 4,
        "unsuccessful": 1,
        "elapsed": 83.0,
        "eta": 125.0,
        "running": (running(),),
        "waiting": (),
        "best": ("alpha=0.15", 4.3771, 3),
        "metric": "val_loss",
        "dashboard_url": "http://127.0.0.1:8265",
        "phases": (from_json(PhaseSummary, phase("first")),),
    }
    return Snapshot(**(facts | more))


def test_live_view_says_what_runs_and_how_far_it_is() -> None:
    text = "\n".join(printed(live_view(snapshot())))
    said = ("ngpt-gh200", "phase 2 of 3", "12/29+", "1 m 23 s", "about 2 m 05 s left", "20/200", "4.5000", "41.2k")
    for part in (*said, "4.3771", "first", "http://127.0.0.1:8265", "4 reused", "1 failed or diverged"):
        assert part in text


@pytest.mark.parametrize("slots", [0, 1, 6, 64])
@pytest.mark.parametrize("n_phases", [0, 1, 20])
def test_live_view_fits_a_terminal_of_80_by_24(slots: int, n_phases: int) -> None:
    long = "project_every=10, alpha_kind=vector, optim.muon.learning_rate=0.00012345"
    view = snapshot(
        campaign="a-campaign-with-a-name-that-somebody-made-very-long-indeed-" * 2,
        running=tuple(running(n, long) for n in range(slots)),
        phases=tuple(from_json(PhaseSummary, phase(f"phase-{n}-{long}")) for n in range(n_phases)),
        best=(long, 4.3, 3),
    )
    lines = printed(live_view(view))
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    assert ("more" in "\n".join(lines)) == (slots == 64)


def so_far(name: str, delta: float | None = None, *, n: int = 3, **more: Any) -> ArmSoFar:
    facts: dict[str, Any] = {"is_baseline": False, "seeds": 3, "unsuccessful": 0, "mean": 4.4 if n else None}
    low, high = (None, None) if delta is None or n < 2 else (delta - 0.003, delta + 0.003)
    return ArmSoFar(arm=name, n=n, delta=delta, ci_low=low, ci_high=high, **(facts | more))


ARMS = (
    so_far("alpha=0.15", -0.0349, n=2),
    so_far("alpha=0.1", None, n=3, is_baseline=True),
    so_far("alpha=0.28", 0.0126, n=1),
    so_far("alpha=0.6", None, n=1, unsuccessful=1),
    so_far("alpha=0.8", None, n=0),
)
VERDICTS = ("better", "worse", "equivalent", "undecided", "incomplete", "no claim", "winner")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_arms_so_far_have_their_differences_and_no_verdict(width: int) -> None:
    lines = printed(live_view(snapshot(arms=ARMS, phases=())), width)
    table = lines[next(n for n, line in enumerate(lines) if "arms so far" in line) :]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in table if line.startswith("alpha")}
    mean = "" if width < 64 else "4.4000 "
    assert rows["alpha=0.15"] == f"2/3 {mean}{DELTA}"
    assert rows["alpha=0.1"] == f"3/3 {mean}baseline"
    assert rows["alpha=0.28"] == f"1/3 {mean}+0.0126"
    assert rows["alpha=0.6"] == f"1/3 {mean}{fmt.MISSING} 1 failed or diverged"
    assert rows["alpha=0.8"] == "0/3" + f" {fmt.MISSING}" * (2 if mean else 1)
    assert not [word for word in VERDICTS if word in "\n".join(lines)]
    assert "best so far" not in "\n".join(lines)  # the table says it


@pytest.mark.parametrize("n_results", [60, 40])
def test_of_many_arms_the_best_the_worst_and_the_baseline_are_shown(n_results: int) -> None:
    arms = [so_far(f"a={n}", 0.001 * n, is_baseline=n == 25) for n in range(n_results)]
    arms += [so_far(f"a={n}", None, n=0) for n in range(n_results, 60)]
    lines = printed(live_view(snapshot(arms=tuple(arms), phases=())), 80)
    assert len(lines) <= 23
    shown = [line.split()[0] for line in lines if line.startswith("a=")]
    assert shown[0] == "a=0" and shown[-1] == f"a={n_results - 1}" and "a=25" in shown
    without = "" if n_results == 60 else " 20 without a result"
    assert any(" ".join(line.split()) == f"… {60 - len(shown)} more{without}" for line in lines)


@pytest.mark.parametrize("height", range(1, 45))
@pytest.mark.parametrize("slots", [0, 1, 64])
def test_live_view_fits_every_height(height: int, slots: int) -> None:
    view = snapshot(
        arms=ARMS * 4,
        running=tuple(running(n) for n in range(slots)),
        phases=tuple(from_json(PhaseSummary, phase(f"phase-{n}")) for n in range(3)),
        look="look 2, 4 seeds: 2 arms go on",
    )
    for width in (20, 60, 80):
        lines = printed(live_view(view, height=height), width)
        assert 0 < len(lines) <= max(1, height - 1)
        assert "12/29+" in "\n".join(lines) or width == 20


def test_without_room_for_the_arms_the_leader_is_named() -> None:
    lines = printed(live_view(snapshot(arms=ARMS), height=8), 80)
    assert any("best so far  alpha=0.15" in line for line in lines)


def test_a_terminal_that_gets_narrower_keeps_nothing_of_the_wrapped_view() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=24, color_system=None)
    view = View(console, lambda: Group(Text("a" * 100), Text("b" * 51), Text("c" * 20 + " " * 80), Text()))
    console.print(view())
    drawn = stream.getvalue()
    assert drawn == f"{'a' * 100}\n{'b' * 51}\n{'c' * 20}\n\n"  # blanks at an end would wrap, too
    console.width = 50
    view()
    # The terminal shows 2 + 2 + 1 + 1 lines, and Rich expects the cursor three lines below the first one.
    assert stream.getvalue()[len(drawn) :] == "\r\x1b[5A\x1b[J\n\n\n"
    console.width = 100
    view()
    assert len(stream.getvalue()) == len(drawn) + len("\r\x1b[5A\x1b[J\n\n\n")  # lines are not joined again


def test_live_view_marks_what_is_not_known_yet() -> None:
    empty = Running("t", "p", "a", 1, 0, 0, None, None, None)
    view = snapshot(phase=None, total=0, done=0, eta=None, best=None, dashboard_url=None, phases=(), running=(empty,))
    assert fmt.MISSING in "\n".join(printed(live_view(view)))


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_final_screen_fits_its_width_and_says_every_number(width: int) -> None:
    lines = printed(final_screen(campaign(), report=REPORT), width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    if width >= 80:
        for part in ("4.3771 ± 0.0100", DELTA, "better", "diverged", "baseline", "41.2k"):
            assert part in text
        for part in ("alpha=0.15 is better by 0.0349.", "edge of the range.", "12 trials", "62.9M tokens", "1 m 23 s"):
            assert part in text
    assert "Use alpha=0.15." in text


@pytest.mark.parametrize("width", [61, 66])
def test_a_narrow_final_screen_still_says_which_arm_has_which_number(width: int) -> None:
    names = ["alpha=0.1696, optim.lr=0.009307", "alpha=0.3152, optim.lr=0.006957", "baseline"]
    verdicts = [("better", -0.0349), ("undecided", -0.0326), ("baseline", None)]
    arms = [arm(name, verdict, 9.4312, delta) for name, (verdict, delta) in zip(names, verdicts, strict=True)]
    lines = printed(phase_table(phase(arms=arms), width=width), width)
    assert max(map(len, lines)) <= width
    for name, (verdict, _) in zip(names, verdicts, strict=True):
        first, *rest = name.split()
        row = next(n for n, line in enumerate(lines) if line.startswith(first))
        assert "9.4312" in lines[row] and verdict in lines[row]
        assert all(word in lines[row + n] for n, word in enumerate(rest, 1))


def test_where_room_is_short_a_long_name_is_shown_and_the_speed_is_not() -> None:
    arms = [arm("an arm of eight short words in all", "better", 4.3771, -0.0349), arm("baseline", "baseline", 4.412)]
    lines = printed(phase_table(phase(arms=arms), width=76), 76)
    assert "tok/s" not in lines[0] and any("an arm of eight" in line for line in lines)


def test_the_seeds_that_an_undecided_arm_needs_are_shown_where_there_is_room() -> None:
    needs = phase(arms=[arm("a", "undecided", 4.3794, -0.0326) | {"seeds_to_decide": 9}, arm("b", "baseline", 4.412)])
    assert "undecided, about 9 seeds" in printed(phase_table(needs, width=120), 120)[2]
    narrow = printed(phase_table(needs, width=70), 70)
    assert any("undecided" in line for line in narrow) and not any("seeds" in line for line in narrow)


def test_final_screen_ends_with_the_answer_the_report_and_what_to_do_next() -> None:
    text = " ".join(printed(final_screen(campaign(), report=REPORT), 120))
    order = ["is better by", "Use alpha=0.15.", "not distinguishable", "12 trials", "two torch versions"]
    order += [str(REPORT), "seeds: fresh"]
    places = [text.rindex(part) for part in order]
    assert places == sorted(places)
    assert text.count("edge of the range") == 1


def test_the_winner_is_named_by_its_settings_and_a_baseline_that_stays_by_its_name() -> None:
    summary = campaign()
    summary["answer"]["winner"] = "winner"  # as `runs: [{arm: winner, ...}]` calls it
    text = "\n".join(printed(final_screen(summary, report=REPORT), 120))
    assert re.search(r"winner +model\.alpha=0\.15 ", text) and re.search(r"arm +winner +in phase alpha", text)
    summary["answer"] |= {"winner": "baseline", "overrides": {}}
    assert re.search(r"winner +baseline +in phase alpha", "\n".join(printed(final_screen(summary, report=REPORT), 120)))


def test_picture_of_the_intervals_needs_room() -> None:
    assert "better ←" not in " ".join(printed(phase_table(phase(), width=80), 80))
    rows = printed(phase_table(phase(), width=120), 120)
    assert "better ←" in rows[0]
    assert re.search(r"─●─+ +│", rows[2])


def test_the_pictures_of_the_intervals_share_a_scale_and_the_zero() -> None:
    arms = [
        ArmSummary("a", verdict="better", delta=Delta(-0.2, -0.3, -0.1)),
        ArmSummary("b", verdict="baseline"),
        ArmSummary("c", verdict="diverged"),
        ArmSummary("d", verdict="worse", delta=Delta(0.1)),
    ]
    assert forest(arms, 9) == ["──●── │  ", "      ●  ", "      │  ", "      │ ●"]
    assert forest(arms[1:3], 5) == [" " * 5, " " * 5]


def test_arrow_points_to_larger_values_where_those_are_better() -> None:
    arms = [arm("a", "better", 0.6, 0.1), arm("baseline", "baseline", 0.5)]
    table = phase_table(phase(arms=arms, metric={"name": "accuracy", "goal": "maximize"}), width=120)
    assert "→ better" in printed(table, 120)[0]


def test_large_phase_shows_its_best_arms_and_the_baseline() -> None:
    arms = [arm(f"a={n}", "worse", 5.0 + n, 0.1) for n in range(100)] + [arm("baseline", "baseline", 200.0)]
    text = "\n".join(printed(phase_table(phase(arms=arms)), 100))
    assert "a=11 " in text and "a=12 " not in text
    assert "baseline" in text and "88 more" in text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "own",
    [
        phase(arms=[], winner=None, why="", noise=None, trials=None),
        phase(arms=[arm("baseline", "baseline", None)], seeds=[1]),
        phase(arms=[arm("a", "failed", None)], winner=None, metric=None, warnings=None),
    ],
)
def test_final_screen_prints_no_none_where_a_summary_says_little(own: Summary, width: int) -> None:
    bare = {"campaign": "c", "status": "incomplete", "phases": [own]}
    for summary in (campaign(own), bare, {"campaign": "c"}):
        text = "\n".join(printed(final_screen(summary, report=REPORT), width))
        assert "None" not in text and str(REPORT) in text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_printed_and_do_nothing(name: str) -> None:
    own = phase(name, why=name, warnings=[name], winner=name, inherit=name, metric={"name": name, "goal": name})
    own["arms"][0] |= {"arm": name, "verdict": name}
    summary = campaign(own) | {"campaign": name, "warnings": [name], "status": name}
    summary["answer"] |= {"sentence": name, "winner": name, "overrides": {name: name}, "phase": name}
    view = snapshot(campaign=name, status=name, phase=name, running=(running(1, name),), best=(name, 1.0, 1))
    for shown in (final_screen(summary, report=REPORT), live_view(view)):
        text = "\n".join(printed(shown, 100))
        assert words(name).plain in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_screens_can_be_written_in_any_encoding(encoding: str) -> None:
    for view in (final_screen(campaign(phase("日本")), report=REPORT), live_view(snapshot(campaign="日本"))):
        assert "alpha=0.15" in "\n".join(printed(view, 120, encoding))


def test_plain_console_writes_a_line_for_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    print_plainly("one \x1b[31mred\x1b[0m [bold]thing[/]")
    print_plainly("two\nlines")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "one \\x1b[31mred\\x1b[0m [bold]thing[/]\ntwo lines\n")


def test_lines_that_nobody_reads_any_more_end_no_campaign(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb", buffering=0) as raw:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
        os.close(reader)
        print_plainly("one")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread that draws may end
def test_a_terminal_that_is_gone_ends_no_campaign() -> None:
    master, slave = os.openpty()
    terminal = os.fdopen(slave, "w")
    console = Console(file=terminal, force_terminal=True, width=80, height=24)
    with live_console(snapshot, console) as message:
        os.close(master)
        message("one")
    with contextlib.suppress(OSError):  # what could not be written is still in its buffer
        terminal.close()


def test_console_is_plain_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with open_console(snapshot) as message:
        assert message is print_plainly


def test_console_is_live_on_a_terminal_that_can_redraw(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    with open_console(snapshot):
        assert "phase 2 of 3" in terminal.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    with open_console(snapshot) as message:
        assert message is print_plainly


def test_live_console_draws_the_snapshot_and_prints_messages_above_it() -> None:
    stream = io.StringIO()
    seen: list[int] = []

    def state() -> Snapshot:
        seen.append(1)
        return snapshot(done=len(seen))

    with live_console(state, Console(file=stream, force_terminal=True, width=80, height=24)) as message:
        message("trial [red]t1[/] done")
    text = stream.getvalue()
    assert seen and "phase 2 of 3" in text
    assert text.index("trial [red]t1[/] done") > 0


def test_what_a_terminal_echoes_at_the_cursor_does_not_break_the_view() -> None:
    stream = io.StringIO()
    with live_console(snapshot, Console(file=stream, force_terminal=True, width=80, height=24)):
        drawn = stream.getvalue()
    assert Text.from_ansi(drawn).plain.endswith("\n")  # the cursor is on a line of its own, with room for ^C


def test_live_console_leaves_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with live_console(snapshot, Console(file=io.StringIO(), force_terminal=True, width=80, height=24)):
        print("data")
    assert capsys.readouterr().out == "data\n"
