"""The phase that confirms a winner on fresh seeds, as YAML to append to the campaign file."""

import json
import re
from itertools import count

from tune.storage.summaries import CampaignSummary

_YAML_WORDS = ("null", "true", "false")


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
