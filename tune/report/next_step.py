"""What to do after a campaign: the next step in a sentence, and the phase that confirms a winner, as YAML to append."""

import json
import re
from itertools import count

from tune import format as fmt
from tune.analysis.power import MAX_SEEDS
from tune.storage.summaries import RUNNING, CampaignSummary, PhaseSummary

RESUME = "the same command again: it continues where it stopped and repeats nothing."
_YAML_WORDS = ("null", "true", "false")


def next_step(summary: CampaignSummary) -> str:
    """Suggests the most useful next step in one sentence."""
    answer = summary.answer
    if summary.status == RUNNING:
        return "It is running. This page is rewritten when a phase ends; that of `serve` follows it."
    if summary.left_out:
        return f"Raise `budget:` and run {RESUME}"
    if summary.status != "finished":
        return f"Run {RESUME}"
    if summary.trials.failed:
        return "See in the report what failed. The same command tries those trials again and repeats nothing else."
    if summary.smoke:
        return "It runs. For an answer, run the same command without `--smoke`."
    if answer.winner and answer.delta:
        if not answer.confirmed:
            is_short = [phase.phase for phase in summary.phases] == ["main"]  # perhaps a file without `phases:`
            first = " If the file has no `phases:`, move its sweep into `phases: [{name: main, ...}]` first."
            return f"Confirm it on fresh seeds: add this phase to `phases:` and run again.{first if is_short else ''}"
    elif summary.phases and (more := _more_seeds(summary.phases[-1])):
        return more
    return "Try your own question: change `vary:` in the campaign file and run again. Finished trials are reused."


def _more_seeds(phase: PhaseSummary) -> str | None:
    """Says how many seeds would decide the arms of a phase; None if all are decided."""
    if len(phase.seeds) == 1:
        return "One seed carries no claim. Set `seeds: [1, 2, 3]` and run again. Finished trials are reused."
    undecided = [arm for arm in phase.arms if arm.verdict == "undecided"]
    if phase.most_seeds is not None:
        used_up = [arm for arm in undecided if arm.n >= phase.most_seeds]
        text = f"undecided after {phase.most_seeds} seeds: raise `most:` and run again. Finished trials are reused."
        return f"{fmt.counted(len(used_up), 'arm')} of {fmt.plain(phase.phase)} {text}" if used_up else None
    needed = [arm.seeds_to_decide for arm in undecided if arm.seeds_to_decide]
    if not undecided:
        return None
    text = f"{fmt.counted(len(undecided), 'arm')} of {fmt.plain(phase.phase)} undecided"
    if not needed:
        return f"{text}; {MAX_SEEDS:,} seeds would not be enough to decide."
    of_all = f" {len(needed)} of them" if len(needed) < len(undecided) else ""
    return f"{text}: about {max(needed)} seeds would decide{of_all}. Finished trials are reused."


def confirm_phase(summary: CampaignSummary) -> str:
    """Returns a phase that compares the winner with the baseline on fresh seeds; empty if there is nothing to confirm.

    It is indented like the phases of the shipped campaigns, so it can be appended to a file that ends with `phases:`.
    """
    answer = summary.answer
    if not (answer.winner and answer.phase and answer.delta) or answer.confirmed or summary.smoke:
        return ""
    if summary.status != "finished" or summary.trials.failed or summary.left_out:
        return ""
    taken = {phase.phase.lower() for phase in summary.phases}
    name = next(name for i in count(1) if (name := f"confirm-{i}" if i > 1 else "confirm") not in taken)
    arm = f"{{arm: winner, inherit: {_scalar(answer.phase)}}}"
    return f"  - name: {name}\n    seeds: fresh\n    runs:\n      - {{arm: baseline}}\n      - {arm}"


def _scalar(name: str) -> str:
    """Writes a phase's name as YAML, in quotes if it would be read as something other than a text."""
    is_plain = re.fullmatch(r"[A-Za-z_][\w.-]*", name, flags=re.ASCII) and name.lower() not in _YAML_WORDS
    return name if is_plain else json.dumps(name)
