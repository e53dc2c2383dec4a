"""Finds results that other code computed than the code that would run now, and applies `--retrain` and `--keep`.

Code is part of a result: an edited formula makes the old numbers those of another experiment. So nothing that other
code computed is reused in silence. The run stops and names the files; `--retrain` trains such trials anew, `--keep`
reuses them and marks it in the report. What counts as other code is decided for each trial by its settings, see
ngpt/code/digest.py. A checkpoint of an unfinished trial counts like a result. `--retrain` also gives back the
curve and the model of a trial whose folder was removed.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ngpt.code.digest import Code
from ngpt.config.base import ConfigError, flatten, unknown_message
from tune import format as fmt
from tune.planning.forecast import expected_phases
from tune.planning.plan import PlannedPhase
from tune.spec.schema import Campaign
from tune.storage.state import DONE, CampaignState, read_replayed
from tune.trials.trial import has_checkpoint

RETRAIN, KEEP = "--retrain", "--keep"
LOST = "its folder is gone"
MAX_LISTED_ARMS = 4
MAX_LISTED_CHANGES = 8


@dataclass(frozen=True)
class OldTrial:
    """A trial that other code, or code that is not known, has computed, or has begun if it is not a result."""

    trial_id: str
    arms: tuple[str, ...]  # `phase/arm` of each arm that needs it; empty if the campaign does not need it now
    version: str | None  # of the code that computed it
    changed: tuple[str, ...]  # what differs, as `ngpt/model/residual.py (lerp)`; empty if that is not known
    is_result: bool


@dataclass(frozen=True)
class CodeChanges:
    """The trials in a results directory that other code has computed than the version `now`."""

    now: str
    arms: tuple[str, ...] = ()  # all arms of the campaign, as `phase/arm`
    differing: tuple[OldTrial, ...] = ()
    accepted: tuple[OldTrial, ...] = ()  # they differ, but `--keep` has accepted that in an earlier run
    unknown: tuple[OldTrial, ...] = ()
    lost: tuple[OldTrial, ...] = ()  # the code is the same, but the trial's folder is gone
    unneeded: tuple[OldTrial, ...] = ()  # they differ, and no phase needs them, as far as is known now
    inherited: tuple[str, ...] = ()  # a line for each inherited winner that other code has chosen

    def lines(self) -> list[str]:
        """What `--plan` says about trials of other code."""
        lines = [f"other code: {line}" for line in _summaries(self.differing)]
        if lines:
            lines.append(f"the run stops because of them, unless {RETRAIN} or {KEEP} is given")
        return [*lines, *self.remarks(self.unknown, self.accepted, self.lost)]

    def remarks(self, unknown: Sequence[OldTrial], accepted: Sequence[OldTrial], lost: Sequence[OldTrial]) -> list[str]:
        """The sentences about trials that are reused without a question, printed at each start."""
        lines = []
        if unknown:
            text = "an earlier version of this program, or another machine, trained them"
            lines.append(f"the code of {_trials(unknown)} is not known: {text}")
        lines += [f"reused although the code differs, since {KEEP} was given before: {s}" for s in _summaries(accepted)]
        lines += [f"{line}; the result counts, and {RETRAIN} trains it anew" for line in _summaries(lost)]
        return [*lines, *self.inherited]


@dataclass(frozen=True)
class CodeDecision:
    """What a run does with trials of other code."""

    discarded: tuple[str, ...] = ()  # trained anew
    kept: Mapping[str, list[str]] = field(default_factory=dict)  # reused results: what differs, by trial id
    continued: Mapping[str, list[str]] = field(default_factory=dict)  # the same of checkpoints
    versions: tuple[str, ...] = ()  # of the code of the trials that `--keep` accepts in this run
    unneeded: frozenset[str] = frozenset()  # trials to train anew if a phase turns out to need them
    lines: tuple[str, ...] = ()


def find_code_changes(campaign: Campaign, state: CampaignState, root: Path, code: Code) -> CodeChanges:
    """Compares the code behind each result and checkpoint in `root` with `code`.

    Raises:
        ConfigError: the corpus is missing.
    """
    if not state.results and not state.code_of_start:
        return CodeChanges(code.digest)
    phases = expected_phases(campaign, state)
    arms, settings = _needed(phases)
    compare, found = _Comparer(state, code), defaultdict[str, list[OldTrial]](list)
    for trial_id, result in state.results.items():
        if result["status"] in DONE:
            version = result["provenance"].get("code_sha256")
            kind, changed = compare.of_result(result)
            if kind == "same" and not (root / "trials" / trial_id).is_dir():
                kind, changed = "lost", (LOST,)
            found[kind].append(OldTrial(trial_id, arms.get(trial_id, ()), version, changed, True))
    for trial_id, version in state.code_of_start.items():
        is_done = state.results.get(trial_id, {}).get("status") in DONE
        if not is_done and has_checkpoint(root / "trials" / trial_id):
            kind, changed = compare(version, settings.get(trial_id, {}), together=True)
            found[kind].append(OldTrial(trial_id, arms.get(trial_id, ()), version, changed, False))
    return CodeChanges(
        now=code.digest,
        arms=tuple(f"{phase.name}/{arm.name}" for phase in phases for arm in phase.arms),
        differing=tuple(trial for trial in found["differs"] if trial.arms),
        accepted=tuple(found["accepted"]),
        unknown=tuple(trial for trial in found["unknown"] if trial.arms),
        lost=tuple(trial for trial in found["lost"] if trial.arms),
        unneeded=tuple(trial for trial in found["differs"] if not trial.arms),
        inherited=tuple(_inherited(campaign, code)),
    )


def decide(changes: CodeChanges, *, retrain: Sequence[str] | None, keep: bool) -> CodeDecision:
    """Decides what happens to trials of other code.

    Args:
        retrain: None without `--retrain`; the arms to train anew, as `arm` or `phase/arm`; empty means all that differ.
        keep: whether `--keep` is given.

    Raises:
        ConfigError: trials of other code are neither trained anew nor kept, or `retrain` names an unknown arm.
    """
    _check_arms(retrain or (), changes.arms)
    retrainable = (*changes.differing, *changes.accepted, *changes.unknown, *changes.lost)
    discarded = [trial for trial in retrainable if retrain is not None and _is_named(trial, retrain)]
    gone = {trial.trial_id for trial in discarded}
    differing, accepted, unknown, unneeded, lost = (
        [trial for trial in trials if trial.trial_id not in gone]
        for trials in (changes.differing, changes.accepted, changes.unknown, changes.unneeded, changes.lost)
    )
    if differing and not keep:
        listed = "\n".join(f"  {line}" for line in _summaries(differing))
        advice = f"train them anew with {RETRAIN} [ARM ...], keep them with {KEEP} (marked in the report)"
        text = f"the code has changed since these trials were trained:\n{listed}\n"
        raise ConfigError(f"{text}{advice}, undo the change, or choose another --out")
    new = [*differing, *unneeded] if keep else []
    reused = [*new, *accepted]
    lines = [f"trained anew: {line}" for line in _summaries(discarded)]
    if retrain is not None and not discarded:
        lines.append(f"{RETRAIN}: no trial {'of these arms ' if retrain else ''}was trained by other code")
    lines += [f"kept although the code differs: {line}" for line in _summaries(new)]
    return CodeDecision(
        discarded=tuple(trial.trial_id for trial in discarded),
        kept={trial.trial_id: list(trial.changed) for trial in reused if trial.is_result},
        continued={trial.trial_id: list(trial.changed) for trial in reused if not trial.is_result},
        versions=tuple(sorted({trial.version for trial in new if trial.version})),
        unneeded=frozenset() if keep else frozenset(trial.trial_id for trial in unneeded),
        lines=(*lines, *changes.remarks(unknown, accepted, lost)),
    )


class _Comparer:
    """Compares versions of the code in a journal with the code that would run now, for the settings of trials."""

    def __init__(self, state: CampaignState, code: Code) -> None:
        self._state, self._code = state, code
        self._known: dict[tuple[str, bool, frozenset[tuple[str, str]]], tuple[str, ...]] = {}

    def __call__(
        self, version: str | None, settings: Mapping[str, Any], *, together: bool
    ) -> tuple[str, tuple[str, ...]]:
        """Whether a version is the same for a trial, differs, is accepted or unknown; and what differs."""
        if version == self._code.digest:
            return "same", ()
        if version is None or version not in self._state.code_versions:
            return "unknown", ()
        texts = frozenset((name, value) for name, value in settings.items() if isinstance(value, str))
        key = (version, together, texts)
        if key not in self._known:
            before = self._state.code_versions[version]
            self._known[key] = tuple(named(self._code.changed(before, settings, together=together)))
        if not (changed := self._known[key]):
            return "same", ()
        return "accepted" if (version, self._code.digest) in self._state.accepted_code else "differs", changed

    def of_result(self, result: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        """The same for a result in the journal."""
        version, together = result["provenance"].get("code_sha256"), "vectorised" in result["provenance"]
        return self(version, result.get("config", {}), together=together)


def named(changed: Mapping[str, Sequence[str]]) -> list[str]:
    """Names changed code: `ngpt/model/residual.py (lerp, slerp)`."""
    return [f"{file} ({', '.join(names)})" if names[0][0] != "(" else file for file, names in changed.items()]


def _needed(phases: Iterable[PlannedPhase]) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, Any]]]:
    """The arms, as `phase/arm`, and the settings of every trial that the campaign needs, by trial id."""
    arms, settings = defaultdict[str, list[str]](list), {}
    for phase in phases:
        for trial in phase.trials:
            arms[trial.trial_id].append(f"{phase.name}/{trial.arm}")
            settings.setdefault(trial.trial_id, flatten(trial.config))
    return {trial_id: tuple(names) for trial_id, names in arms.items()}, settings


def _check_arms(names: Iterable[str], arms: Sequence[str]) -> None:
    short = [arm.partition("/")[2] for arm in arms]
    for name in names if arms else ():
        if name not in arms and name not in short:
            message = unknown_message("arm", name, sorted({*arms, *short} if "/" in name else {*short}))
            raise ConfigError(f"{RETRAIN}: {message}")


def _is_named(trial: OldTrial, names: Sequence[str]) -> bool:
    """Whether an arm of the trial is among `names`, which may be empty for all; a trial without an arm is not."""
    wanted = [arm for arm in trial.arms if not names or arm in names or arm.partition("/")[2] in names]
    return bool(wanted)


def _summaries(trials: Iterable[OldTrial]) -> Iterator[str]:
    """A line for each set of changes: `ngpt/model/residual.py (lerp): 4 results of alpha/alpha=0.4`."""
    groups = defaultdict[tuple[str, ...], list[OldTrial]](list)
    for trial in trials:
        groups[tuple(trial.changed)].append(trial)
    for names, group in groups.items():
        changed = _shortened(names) if names else "code that is not known"
        arms = Counter(fmt.plain(trial.arms[0]) for trial in group if trial.arms)
        of = f" of {fmt.listing(arms, MAX_LISTED_ARMS)}" if arms else " that no arm needs now"
        yield f"{changed}: {_trials(group)}{of}"


def _shortened(names: Sequence[str]) -> str:
    """The first names of changed definitions, and how many there are besides."""
    rest = len(names) - MAX_LISTED_CHANGES
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:MAX_LISTED_CHANGES])} and {rest} more definitions"


def _trials(trials: Sequence[OldTrial]) -> str:
    counts = {"result": sum(trial.is_result for trial in trials), "checkpoint": sum(not t.is_result for t in trials)}
    texts = {noun: fmt.counted(count, noun) for noun, count in counts.items() if count}
    return " and ".join(
        f"{text} of an unfinished trial" if noun == "checkpoint" else text for noun, text in texts.items()
    )


def _inherited(campaign: Campaign, code: Code) -> Iterator[str]:
    """Yields a line for each winner of another results directory that other code has chosen.

    Such a winner is settings, not numbers, so it is reused.
    """
    for path in campaign.inherited:
        root, name = Path(path).expanduser().parent, Path(path).name
        state = read_replayed(root)
        phase = state.phases.get(name)
        results = [state.results[i] for i in phase.trial_ids if i in state.results] if phase else []
        compare = _Comparer(state, code)
        changed = dict.fromkeys(name for result in results for name in compare.of_result(result)[1])
        if changed:
            yield f"inherit: {fmt.plain(path)} was decided by other code: {_shortened([*changed])}"
