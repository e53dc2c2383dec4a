"""Live view of a running campaign, or plain lines if stderr is not a terminal.

Names and errors are untrusted text: all of them pass through `words`, which strips control characters and markup.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import floor

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from ngpt.data.text.progress import Log
from tune import format as fmt
from tune.report.wording import effect
from tune.results.snapshot import ArmSoFar, Snapshot
from tune.storage.activity import Activity, RunActivity
from tune.storage.summaries import Delta, PhaseSummary

REFRESH_PER_SECOND = 3
FACTS = ("notes", "phases", "links")  # the parts below the tables
WIDTH_OF_MEAN, WIDTH_OF_INTERVAL = 64, 50  # of a terminal that has these columns
WIDTH_OF_BARS = 70


def words(text: object, style: str = "") -> Text:
    """Returns untrusted text for the terminal, without control characters or markup."""
    return Text(fmt.plain(text), style=style)


class Portable:
    """Renders `build(width)` and replaces characters that the terminal's encoding lacks."""

    def __init__(self, build: Callable[[int], RenderableType]) -> None:
        self.build = build

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments = console.render(self.build(options.max_width), options)
        if options.encoding.lower().startswith("utf"):
            yield from segments
            return
        for text, style, control in segments:
            encodable = text.encode(options.encoding, fmt.PORTABLE).decode(options.encoding)
            yield Segment(encodable, style, control)


def live_view(snapshot: Snapshot, *, height: int = 24) -> RenderableType:
    """Returns progress, running trials, arms so far and finished phases, in fewer than `height` lines."""
    return Portable(lambda width: _live(snapshot, width, max(1, height - 1)))


def _live(snapshot: Snapshot, width: int, room: int) -> RenderableType:
    if room == 1:
        return _one_line(snapshot)
    notes, phases = _notes(snapshot), [(phase.phase, _winner(phase)) for phase in snapshot.phases]
    links = [("dashboard", words(snapshot.dashboard_url))] if snapshot.dashboard_url else []
    wanted = {"work": len(snapshot.running) or max(1, len(_activities(snapshot))), "arms": len(snapshot.arms)}
    wanted |= {"notes": len(notes), "phases": len(phases), "links": len(links)}
    rows = _share(room - 2, wanted, has_header=bool(snapshot.running))
    if snapshot.best and not rows["arms"]:
        notes = [_best(snapshot, *snapshot.best), *notes]
        rows = _share(room - 2, wanted | {"arms": 0, "notes": len(notes)}, has_header=bool(snapshot.running))
    parts: list[RenderableType] = [_header(snapshot), _progress(snapshot)]
    if rows["work"]:
        table = _running_table(snapshot, width, rows["work"]) if snapshot.running else _idle(snapshot, rows["work"])
        parts += [Text(), table]
    if rows["arms"]:
        parts += [Text(), _arms_table(snapshot, width, rows["arms"])]
    facts = [*notes[: rows["notes"]], *phases[len(phases) - rows["phases"] :], *links[: rows["links"]]]
    if facts:
        grid = Table.grid(
            Column(style="dim", no_wrap=True, max_width=18), Column(ratio=1), padding=(0, 2, 0, 0), expand=True
        )
        for name, text in facts:
            grid.add_row(_line(words(name)), _line(text))
        parts += [Text(), grid]
    return Group(*parts)


def _share(room: int, wanted: Mapping[str, int], *, has_header: bool) -> dict[str, int]:
    """Shares the lines below the progress bar: how many rows of each part are shown.

    An empty line comes before each table and before the facts, which are notes, phases and links.
    """
    rows = dict.fromkeys(wanted, 0)

    def give(part: str, most: int) -> None:
        """Gives a part up to `most` lines of what is left, with the lines around it."""
        nonlocal room
        is_fact = part in FACTS
        is_open = any(rows[name] for name in FACTS) if is_fact else rows[part] > 0
        overhead = 0 if is_open else 1 + (part == "arms" or (part == "work" and has_header))
        number = min(most, wanted[part] - rows[part], room - overhead)
        if number > 0:
            rows[part] += number
            room -= number + overhead

    for part, most in (("work", 2), ("notes", len(wanted) + wanted["notes"]), ("arms", 4), ("links", 1), ("phases", 1)):
        give(part, most)
    give("work", max(room // 2, room - wanted["arms"]))
    for part in ("arms", "work", "phases"):
        give(part, room)
    return rows


def _best(snapshot: Snapshot, arm: str, mean: float, n: int) -> tuple[str, Text]:
    line = words(fmt.shorten(fmt.plain(arm), 36), "bold bright_blue")
    line.append(f"  {fmt.plain(snapshot.metric)} {fmt.number(mean)}  n={n}", style="default not bold")
    return "best so far", line


def _notes(snapshot: Snapshot) -> list[tuple[str, Text]]:
    """What is to be said beside the tables, with a label each."""
    notes = []
    if snapshot.run and not snapshot.alive:
        notes.append(("killed", words(_killed(snapshot, snapshot.run), "yellow")))
    if snapshot.most is not None:
        text = f"between {snapshot.total} and {snapshot.most}, decided after each round of seeds"
        notes.append(("trials", Text(text)))
    if snapshot.look:
        notes.append(("last look", words(snapshot.look)))
    if snapshot.waiting:
        first = snapshot.waiting[0]
        more = f" and {len(snapshot.waiting) - 1} more" if len(snapshot.waiting) > 1 else ""
        notes.append(("waiting", words(f"no room in the cluster yet for {first.arm} seed {first.seed}{more}")))
    return notes


def _killed(snapshot: Snapshot, run: RunActivity) -> str:
    """What became of a run that did not end by itself."""
    names = fmt.listing(each.name for each in run.activities)
    during = f", while {names}" if names else ""
    return f"process {run.pid} on {run.host} is gone{during}{'' if snapshot.resume else '; the same command resumes'}"


def _activities(snapshot: Snapshot) -> tuple[Activity, ...]:
    return snapshot.run.activities if snapshot.run and snapshot.alive else ()


def activity_text(activity: Activity) -> str:
    """What a run does, in one line: `preparing data, 40 %, about 12 s left: python-docs`."""
    facts = [activity.name]
    if activity.fraction is not None:
        facts.append(f"{floor(100 * activity.fraction)} %")
    if activity.seconds_left is not None:
        facts.append(f"about {fmt.duration(activity.seconds_left, tenths=False)} left")
    return ", ".join(facts) + (f": {activity.detail}" if activity.detail else "")


def _idle(snapshot: Snapshot, max_rows: int) -> RenderableType:
    """What the run does while no trial is training."""
    if activities := _activities(snapshot):
        return Group(*(_line(words(activity_text(each))) for each in activities[:max_rows]))
    return _line(Text("no trial is training right now", style="dim"))


def _one_line(snapshot: Snapshot) -> Text:
    eta = "" if snapshot.eta is None else f"  about {fmt.duration(snapshot.eta, tenths=False)} left"
    line = words(snapshot.campaign, "bold")
    return _line(line.append(f"  {_count(snapshot)}{eta}", style="default not bold"))


def _count(snapshot: Snapshot) -> str:
    """How many trials have ended, of how many: `12/29+`; `0/?` before anything is planned."""
    if not snapshot.total and not snapshot.total_is_final:
        return f"{snapshot.done}/?"
    return f"{snapshot.done}/{snapshot.total}{'' if snapshot.total_is_final else '+'}"


def _arms_table(snapshot: Snapshot, width: int, max_rows: int) -> Table:
    """The arms of the current phase, best first, without verdicts; of many, some of the best and of the worst."""
    has_mean, has_interval = width >= WIDTH_OF_MEAN, width >= WIDTH_OF_INTERVAL
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True, header_style="dim", pad_edge=False)
    table.add_column("arms so far", ratio=1, no_wrap=True, overflow="ellipsis")
    header = ["n", *([fmt.plain(snapshot.metric)[:12]] if has_mean else []), "against the baseline"]
    for name in header:
        table.add_column(Text(name), justify="left" if name == header[-1] else "right", no_wrap=True)
    cells = [
        [
            f"{arm.n}/{arm.seeds}",
            *([fmt.number(arm.mean)] if has_mean else []),
            _difference(arm, has_interval=has_interval),
        ]
        for arm in snapshot.arms
    ]
    taken = sum(max(map(len, column)) + 2 for column in zip(header, *cells, strict=True))
    shown = _shown_arms(snapshot.arms, max_rows)
    gap = next((row for row, index in enumerate(shown) if index != row), len(shown))
    for row, index in enumerate(shown):
        if row == gap:
            table.add_row(*_hidden_arms(snapshot.arms, shown, len(table.columns)), style="dim")
        arm = snapshot.arms[index]
        name = words(fmt.shorten(fmt.plain(arm.arm), max(width - taken, 10)), "bold" if arm.is_baseline else "")
        table.add_row(name, *map(Text, cells[index]), style="" if arm.n else "dim")
    if gap == len(shown) < len(cells):
        table.add_row(*_hidden_arms(snapshot.arms, shown, len(table.columns)), style="dim")
    return table


def _difference(arm: ArmSoFar, *, has_interval: bool) -> str:
    """The difference of an arm so far; of the baseline its name, and beside it what went wrong."""
    if arm.is_baseline:
        text = "baseline"
    elif arm.delta is None:
        text = fmt.MISSING
    else:
        delta = Delta(arm.delta, arm.ci_low, arm.ci_high)
        text = effect(delta) if has_interval else fmt.signed(arm.delta)
    return f"{text}  {arm.unsuccessful} failed or diverged" if arm.unsuccessful else text


def _shown_arms(arms: Sequence[ArmSoFar], max_rows: int) -> list[int]:
    """The arms that are shown, by index: all of them, or the best, the worst and the baseline.

    One row is left to say how many are not shown.
    """
    if len(arms) <= max_rows:
        return list(range(len(arms)))
    known = [index for index, arm in enumerate(arms) if arm.n or arm.unsuccessful]
    baseline = next((index for index in known if arms[index].is_baseline), None)
    room = max_rows - 1
    if baseline is not None and room > 1:
        known.remove(baseline)
        room -= 1
    n_worst = room // 3 if len(known) > room else 0
    chosen = known[: room - n_worst] + known[len(known) - n_worst :]
    return sorted(chosen if baseline is None or baseline in chosen or max_rows < 3 else [*chosen, baseline])


def _hidden_arms(arms: Sequence[ArmSoFar], shown: Sequence[int], n_columns: int) -> list[Text]:
    """A row that says how many arms are not shown."""
    hidden = [arm for index, arm in enumerate(arms) if index not in shown]
    without = sum(not arm.n and not arm.unsuccessful for arm in hidden)
    about = f"{without} without a result" if without else ""
    return [Text(f"… {len(hidden)} more"), *[Text()] * (n_columns - 2), Text(about)]


def _line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _header(snapshot: Snapshot) -> Text:
    header = Text("SMOKE ", "bold yellow") if snapshot.smoke else Text()
    header.append_text(words(snapshot.campaign, "bold"))
    if snapshot.phase:
        header.append(f"   phase {snapshot.phase_number} of {snapshot.n_phases}   ", style="dim")
        header.append_text(words(snapshot.phase))
    if snapshot.status != "running":
        header.append("   ").append_text(words(snapshot.status, "yellow"))
    if snapshot.unsuccessful:
        header.append(f"   {snapshot.unsuccessful} failed or diverged", style="magenta")
    if snapshot.reused:
        header.append(f"   {snapshot.reused} reused", style="dim")
    return _line(header)


def _progress(snapshot: Snapshot) -> Table:
    grid = Table.grid(Column(ratio=1), Column(no_wrap=True), padding=(0, 2, 0, 0), expand=True)
    eta = "" if snapshot.eta is None else f"   about {fmt.duration(snapshot.eta, tenths=False)} left"
    state = Text(_count(snapshot), style="bold")
    state.append(f"   {fmt.duration(snapshot.elapsed, tenths=False)}{eta}", style="default not bold")
    grid.add_row(_bar(snapshot.done, snapshot.total), state)
    return grid


def _bar(done: int, total: int, width: int | None = None) -> ProgressBar:
    bar = ProgressBar(total=max(total, 1), completed=min(done, total), width=width)
    bar.style, bar.complete_style, bar.finished_style = "bright_black", "blue", "blue"
    return bar


def _running_table(snapshot: Snapshot, width: int, max_rows: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True, header_style="dim", pad_edge=False)
    table.add_column("training now", ratio=1, no_wrap=True, overflow="ellipsis")
    has_bars = width >= WIDTH_OF_BARS
    for name in ("seed", "step", *([""] if has_bars else []), "train", "val", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True, width=None if name else 8)
    steps = max(len(f"{trial.step}/{trial.steps}") for trial in snapshot.running)
    seeds = max(4, *(len(str(trial.seed)) for trial in snapshot.running))
    name_width = max(width - 27 - 10 * has_bars - steps - seeds, 10)
    shown = snapshot.running if len(snapshot.running) <= max_rows else snapshot.running[: max_rows - 1]
    for trial in shown:
        name = trial.arm if trial.phase == snapshot.phase else f"{trial.phase}: {trial.arm}"
        progress = [f"{trial.step}/{trial.steps}", *([_bar(trial.step, trial.steps, 8)] if has_bars else [])]
        numbers = fmt.number(trial.train_loss), fmt.number(trial.val_loss), fmt.count(trial.tokens_per_second)
        table.add_row(words(fmt.shorten(fmt.plain(name), name_width)), str(trial.seed), *progress, *numbers)
    if len(shown) < len(snapshot.running):
        table.add_row(Text(f"… {len(snapshot.running) - len(shown)} more", style="dim"))
    return table


def _winner(phase: PhaseSummary) -> Text:
    arm = phase.winning_arm
    if arm is None:
        return Text("no winner")
    line = words(fmt.shorten(fmt.plain(arm.arm), 36))
    return _line(line.append("  baseline kept" if arm.verdict == "baseline" else f"  {effect(arm.delta)}", style="dim"))


def open_console(snapshot: Callable[[], Snapshot]) -> contextlib.AbstractContextManager[Log]:
    """Returns a live view if stderr is a terminal with cursor control, otherwise plain lines.

    Entering it gives a function that prints one event and ignores a closed terminal, since the journal has the event.
    """
    console = Console(stderr=True, highlight=False)
    is_live = sys.stderr.isatty() and not console.is_dumb_terminal
    return live_console(snapshot, console) if is_live else contextlib.nullcontext(print_plainly)


class View:
    """What `Live` draws. It knows the lines on the screen, which a terminal wraps when it gets narrower."""

    def __init__(self, console: Console, build: Callable[[], RenderableType]) -> None:
        self._console, self._build, self._width = console, build, console.width
        self._content: RenderableType = Text()
        self._drawn: list[int] = []  # widths of the lines on the screen

    def __call__(self) -> RenderableType:
        """Returns the next view; erases the lines that have been wrapped, since Rich would erase too few."""
        width = self._console.width
        height = sum(max(1, -(-drawn // width)) for drawn in self._drawn)
        if width < self._width and height > len(self._drawn):
            # Up to the first line, erase all below, and down to where Rich expects the cursor.
            codes = f"\r\x1b[{height - 1}A\x1b[J" + "\n" * (len(self._drawn) - 1)
            with contextlib.suppress(OSError):
                self._console.file.write(codes)
        self._width, self._content = width, self._build()
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)
        self._drawn = [cell_len("".join(segment.text for segment in line).rstrip()) for line in lines]
        for line, drawn in zip(lines, self._drawn, strict=True):
            yield from Segment.adjust_line_length(line, drawn, pad=False)
            yield Segment.line()


@contextlib.contextmanager
def live_console(snapshot: Callable[[], Snapshot], console: Console) -> Iterator[Log]:
    """Redraws `live_view` a few times a second and erases it on exit; yields a function that prints above it."""

    def message(text: str) -> None:
        with contextlib.suppress(OSError):
            console.print(words(text))

    # The empty last line leaves room for the ^C that the terminal echoes: after a full line it would wrap, and the next
    # view would be drawn one line lower.
    view = View(console, lambda: Group(live_view(snapshot(), height=console.height - 1), Text()))
    live = Live(
        console=console,
        get_renderable=view,
        refresh_per_second=REFRESH_PER_SECOND,
        transient=True,
        redirect_stdout=False,  # stdout is for data
    )
    live.start(refresh=True)
    try:
        yield message
    finally:
        with contextlib.suppress(OSError):
            live.stop()


def print_plainly(text: str) -> None:
    """Prints one event as a line on stderr."""
    with contextlib.suppress(OSError):
        print(fmt.plain(text), file=sys.stderr, flush=True)
