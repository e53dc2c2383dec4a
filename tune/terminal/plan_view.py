"""Terminal view of `--plan`."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tune import format as fmt
from tune.machine.estimate import Estimate, PhaseEstimate


def plan_view(estimated: Estimate) -> RenderableType:
    """Returns the estimate as a table with notes."""
    table = Table(title=f"plan of {fmt.plain(estimated.campaign)}", title_justify="left", box=None, pad_edge=False)
    header, *rows = plan_rows(estimated)
    for name in header:
        table.add_column(name, justify="left" if name == "phase" else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return Group(table, Text(), *(Text(line) for line in plan_notes(estimated)))


def plan_rows(estimated: Estimate) -> list[list[str]]:
    """Returns the header, a row for each phase, and the total."""
    rows = [["phase", "arms", "seeds", "trials", "to run", "tokens", "disk", "time"]]
    for row in estimated.phases:
        name = fmt.plain(row.phase) + (" *" if row.guessed else "")
        rows.append([name, str(row.arms), str(row.seeds), *_sizes(row)])
    rows.append(["total", "", "", *_sizes(estimated)])
    if estimated.noise:
        effects = [row.smallest_detectable for row in estimated.phases]
        finds = [fmt.MISSING if effect is None else f"{effect:.2g}" for effect in effects]
        rows = [[*row, cell] for row, cell in zip(rows, ["finds", *finds, ""], strict=True)]
    return rows


def _sizes(row: PhaseEstimate | Estimate) -> list[str]:
    sizes = [fmt.count(row.tokens), fmt.size(row.disk_bytes), fmt.duration(row.seconds)]
    return [str(row.trials), str(row.to_run), *sizes]


def plan_notes(estimated: Estimate) -> list[str]:
    """Returns what is to be said about the numbers, a line each."""
    concurrency = f"{fmt.counted(estimated.workers, 'trial')} at once"
    if estimated.together > 1:
        concurrency = f"{estimated.together} trials at once in each of {fmt.counted(estimated.workers, 'worker')}"
    if estimated.ranks > 1:
        concurrency += f", each on {estimated.ranks} ranks ({estimated.strategy})"
    lines = [f"{concurrency}; time {estimated.seconds_source}"]
    if shared := sum(row.trials for row in estimated.phases) - estimated.trials:
        singular = "1 trial of a later phase is the same as an earlier one and is trained once"
        plural = f"{shared} trials of later phases are the same as earlier ones and are trained once"
        lines.append(singular if shared == 1 else plural)
    by_seeds: dict[str, list[str]] = {}
    for row in estimated.phases:
        by_seeds.setdefault(row.which_seeds, []).append(row.phase)
    seeds = "; ".join(f"{fmt.listing(phases)} {which}" for which, phases in by_seeds.items() if which)
    lines += [f"seeds: {seeds}"] if seeds else []
    open_ended = [row for row in estimated.phases if row.most_trials > row.trials]
    if ranges := "; ".join(f"{row.phase} {row.trials} to {row.most_trials} trials" for row in open_ended):
        lines.append(f"seeds until decided: {ranges}; tokens, disk and time are those of the next round")
    if noise := estimated.noise:
        spread = f"a spread between seeds of {noise.sd:.2g}, {noise.source}"
        lines.append(f"finds: the smallest effect that 4 of 5 such phases would find, from {spread}")
    if estimated.budget:
        lines.append(f"budget: no trial begins after {estimated.budget}; the numbers above ignore it")
    lines += [f"evaluation: {estimated.evaluation}"] if estimated.evaluation else []
    if any(row.guessed for row in estimated.phases):
        guess = "the first arm of that phase, or its last winner, is assumed"
        lines.append(f"* starts from a winner that is not known yet; {guess}")
    lines += estimated.memory
    lines += [estimated.slow_dtype] if estimated.slow_dtype else []
    lines += [f"warning: {text}" for text in estimated.advice]
    lines += [*estimated.devices, *estimated.code, f"results in {estimated.results}"]
    return list(map(fmt.plain, lines))
