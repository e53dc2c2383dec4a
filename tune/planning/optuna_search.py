"""Search with optuna's TPE sampler (Bergstra et al. 2011), reproducible from the journal alone.

Optuna (extra `search`) proposes a batch of `parallel` arms, kept apart by the constant liar heuristic (Ginsbourger et
al. 2010), and is told their scores when the batch is done. No study is stored: it is replayed from the scores in the
journal. If a trial failed but succeeds after a resume, the proposals after its batch change.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tune.spec.search_space import Dimension, Search
from tune.spec.sweeps import ArmSpec


@lru_cache(maxsize=256)
def propose_arms(search: Search, scores: tuple[float, ...]) -> tuple[ArmSpec, ...]:
    """Replays all completed batches and proposes the next; returns the arms of all, at most `search.trials`.

    `scores` has one number per arm of the completed batches: lower is better, infinite if it diverged or failed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=search.seed, constant_liar=True)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    distributions = {d.setting: _distribution(optuna.distributions, d) for d in search.space}
    arms: list[ArmSpec] = []
    while len(arms) <= len(scores) and len(arms) < search.trials:
        batch = [study.ask(distributions) for _ in range(min(search.parallel, search.trials - len(arms)))]
        known = scores[len(arms) :]
        for trial in batch:
            sampled = [(d, trial.params[d.setting]) for d in search.space]
            arms.append(search.arm([d.values[x] if d.kind == "choice" else d.rounded(x) for d, x in sampled]))
        for trial, score in zip(batch, known, strict=False):
            study.tell(trial, score)
    return tuple(arms)


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
