"""Journals which versions of the code have trained the trials of a campaign."""

from collections.abc import Callable, Mapping, Sequence

from ngpt.code.digest import Code, read_code
from ngpt.config.base import flatten
from tune.planning.code_changes import CodeDecision, named
from tune.planning.plan import PlannedTrial
from tune.storage.state import CampaignState
from tune.trials.trial import TrialResult


class CodeVersions:
    """The code of a session, and what was decided about trials of other code.

    Args:
        append: appends an event with these fields to the journal.
    """

    def __init__(self, code: Code, state: CampaignState, append: Callable[..., None]) -> None:
        self._code, self._state, self._append = code, state, append
        self._decision = CodeDecision()

    def apply(self, decision: CodeDecision) -> None:
        """Forgets the results of trials that are to be trained anew; `journal` writes the whole decision."""
        self._decision = decision
        for trial_id in decision.discarded:
            self._state.results.pop(trial_id, None)

    def journal(self) -> None:
        """Journals the version of the code, and what happens to trials of other versions."""
        if self._code.digest not in self._state.code_versions:
            self._append("code_version", code_sha256=self._code.digest, files=self._code.meanings)
        decision = self._decision
        if decision.discarded:
            self._append("trials_discarded", trial_ids=list(decision.discarded), reason="--retrain")
        is_new = decision.versions or decision.continued.keys() - self._state.mixed_code.keys()
        if is_new or decision.kept != self._state.kept_code:
            self._append_kept(decision.kept, continued=decision.continued, versions=decision.versions)

    def note_edited(self, trial: PlannedTrial, result: TrialResult) -> None:
        """Marks a trial whose code differs, because a file was edited and its worker replaced while the session ran."""
        version = result.provenance.get("code_sha256")
        if version is None or version == self._code.digest:
            return
        if version not in self._state.code_versions:
            edited = read_code(self._code.folder, self._code.plugins)
            if edited is not None and edited.digest == version:
                self._append("code_version", code_sha256=version, files=edited.meanings)
        before, together = self._state.code_versions.get(version), "vectorised" in result.provenance
        changed = named(self._code.changed(before, flatten(trial.config), together=together)) if before else []
        if changed:
            self._append_kept({**self._state.kept_code, trial.trial_id: changed})

    def _append_kept(
        self,
        trials: Mapping[str, list[str]],
        *,
        continued: Mapping[str, list[str]] | None = None,
        versions: Sequence[str] = (),
    ) -> None:
        fields = {"code_sha256": self._code.digest, "versions": list(versions)}
        self._append("code_kept", **fields, trials=dict(trials), continued=dict(continued or {}))
