"""Search with optuna's TPE sampler (Bergstra et al. 2011), reproducible from the journal alone.

Optuna (extra `search`) proposes a batch of `parallel` arms, kept apart by the constant liar heuristic (Ginsbourger et
al. 2010), and is told their scores when the batch is done. No study is stored: it is replayed from the arms and scores
in the journal. What optuna proposes depends on its version, and on scores that a retried trial may change. So an arm
that has been proposed stays: where the replay proposes another one, optuna is told the score of the arm in the journal.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from tune.spec.search_space import Dimension, Search
from tune.spec.sweeps import ArmSpec
from tune.storage.records import SearchRecord


@lru_cache(maxsize=256)
def propose_arms(
    search: Search, scores: tuple[float, ...], given: tuple[tuple[Any, ...], ...] = ()
) -> tuple[ArmSpec, ...]:
    """Replays all completed batches and proposes the next; returns the arms of all, at most `search.trials`.

    Args:
        scores: one number per arm of the completed batches: lower is better, infinite if it diverged or failed.
        given: the values of the arms proposed so far, see `Search.values_of`. They come first, and the next batch is
            proposed when all of them have scores.
    """
    given = given[: search.trials]
    if len(scores) < len(given) or len(given) == search.trials:
        return tuple(map(search.arm, given))
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=search.seed, constant_liar=True)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    distributions = {d.setting: _distribution(optuna.distributions, d) for d in search.space}
    arms: list[ArmSpec] = []
    while len(arms) <= len(scores) and len(arms) < search.trials:
        known = given[len(arms) :][: search.parallel]
        size = len(known) or min(search.parallel, search.trials - len(arms))
        batch = [study.ask(distributions) for _ in range(size)]
        values = [_values(search, trial.params) for trial in batch]
        told = scores[len(arms) :]
        arms += map(search.arm, known or values)
        for trial, value, kept, score in zip(batch, values, known or values, told, strict=False):
            if value == kept:
                study.tell(trial, score)
                continue
            study.tell(trial, state=optuna.trial.TrialState.FAIL)  # was never trained
            chosen = zip(search.space, kept, strict=True)
            params = {d.setting: d.values.index(x) if d.kind == "choice" else x for d, x in chosen}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    return tuple(arms)


def reusable_arms(search: Search, record: SearchRecord | None) -> tuple[tuple[Any, ...], ...]:
    """The values of the arms that the journal has of the same search, in order; none if it asked something else."""
    if record is None or record.question not in (None, search.question):
        return ()
    values = [search.values_of(overrides) for overrides in record.proposed]
    return tuple(value for value in values if value is not None)


def optuna_version() -> str | None:
    """The version of the installed optuna."""
    return version("optuna") if find_spec("optuna") else None


def _values(search: Search, params: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values that optuna proposed, in the order of the space."""
    sampled = [(d, params[d.setting]) for d in search.space]
    return tuple(d.values[x] if d.kind == "choice" else d.rounded(x) for d, x in sampled)


def arm_score(values: Sequence[float | None], goal: str) -> float:
    """The mean over the seeds, negated if `goal` is maximize; infinite if a seed has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return math.inf
    return math.fsum(known) / len(known) * (1 if goal == "minimize" else -1)


def _distribution(kinds: Any, dimension: Dimension) -> Any:
    if dimension.kind == "choice":  # by index, since optuna does not accept lists as choices
        return kinds.CategoricalDistribution(list(range(len(dimension.values))))
    low, high = dimension.values
    kind = kinds.IntDistribution if dimension.is_whole else kinds.FloatDistribution
    return kind(low, high, log=dimension.kind == "log")
