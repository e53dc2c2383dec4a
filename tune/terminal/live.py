"""Live view of a running campaign, or plain lines if stderr is not a terminal.

Names and errors are untrusted text: all of them pass through `words`, which strips control characters and markup.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from ngpt.data.text.progress import Log
from tune import format as fmt
from tune.report.wording import effect
from tune.results.snapshot import Snapshot
from tune.storage.summaries import PhaseSummary

REFRESH_PER_SECOND = 3


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
    """Returns progress, running trials, best arm and finished phases, in fewer than `height` lines."""
    return Portable(lambda width: _live(snapshot, width, height))


def _live(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    n_looks = (snapshot.most is not None) + bool(snapshot.look)  # lines about rounds of seeds
    n_phases = min(len(snapshot.phases), max(1, (height - 12 - n_looks) // 3))
    max_running = max(1, height - n_phases - n_looks - 9)
    label = Column(style="dim", no_wrap=True, max_width=18)
    facts = Table.grid(label, Column(ratio=1), padding=(0, 2, 0, 0), expand=True)
    if snapshot.best:
        arm, loss, n = snapshot.best
        line = words(fmt.shorten(fmt.plain(arm), 36), "bold bright_blue")
        line.append(f"  {fmt.plain(snapshot.metric)} {fmt.number(loss)}  n={n}", style="default not bold")
        facts.add_row("best so far", _line(line))
    if snapshot.most is not None:
        text = f"between {snapshot.total} and {snapshot.most}, decided after each round of seeds"
        facts.add_row("trials", _line(Text(text)))
    if snapshot.look:
        facts.add_row("last look", _line(words(snapshot.look)))
    for phase in snapshot.phases[-n_phases:] if n_phases else ():
        facts.add_row(_line(words(phase.phase)), _winner(phase))
    if snapshot.dashboard_url:
        facts.add_row("dashboard", _line(words(snapshot.dashboard_url)))
    idle = Text("no trial is training right now", style="dim")
    training = _running_table(snapshot, width, max_running) if snapshot.running else idle
    return Group(_header(snapshot), _progress(snapshot), Text(), training, Text(), facts)


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
    more = "" if snapshot.total_is_final else "+"
    eta = "" if snapshot.eta is None else f"   about {fmt.duration(snapshot.eta, tenths=False)} left"
    state = Text(f"{snapshot.done}/{snapshot.total}{more}", style="bold")
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
    for name in ("seed", "step", "", "train", "val", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True, width=None if name else 8)
    name_width = max(width - 41 - max(len(f"{trial.step}/{trial.steps}") for trial in snapshot.running), 10)
    shown = snapshot.running if len(snapshot.running) <= max_rows else snapshot.running[: max_rows - 1]
    for trial in shown:
        name = trial.arm if trial.phase == snapshot.phase else f"{trial.phase}: {trial.arm}"
        progress = f"{trial.step}/{trial.steps}", _bar(trial.step, trial.steps, 8)
        numbers = fmt.number(trial.train_loss), fmt.number(trial.val_loss), fmt.count(trial.tokens_per_second)
        table.add_row(words(fmt.shorten(fmt.plain(name), name_width)), str(trial.seed), *progress, *numbers)
    if len(shown) < len(snapshot.running):
        table.add_row(Text(f"… and {len(snapshot.running) - len(shown)} more", style="dim"))
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


@contextlib.contextmanager
def live_console(snapshot: Callable[[], Snapshot], console: Console) -> Iterator[Log]:
    """Redraws `live_view` a few times a second and erases it on exit; yields a function that prints above it."""

    def message(text: str) -> None:
        with contextlib.suppress(OSError):
            console.print(words(text))

    live = Live(
        console=console,
        # The empty last line leaves room for the ^C that the terminal echoes: after a full line it would wrap, and the
        # next view would be drawn one line lower.
        get_renderable=lambda: Group(live_view(snapshot(), height=console.height - 1), Text()),
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
