"""What a run does when memory runs out, and when a loss or a gradient is not a number: ON_OOM and NONFINITE.

Whatever it does, it counts it in its `Progress`, which is saved with every checkpoint. So a run that was killed after
a setback goes on as it would have, and its result says what happened to it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from ngpt.config.base import Config, added, one_of

AVERAGED = 10  # steps whose mean is the reported training loss
Metrics = dict[str, float | None]
log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What the loop remembers between steps, besides weights and moments; saved with every checkpoint."""

    step: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the last `AVERAGED` steps
    timed_tokens: int = 0  # in steps after the warm-up of the process
    timed_seconds: float = 0.0
    last_eval: Metrics = field(default_factory=dict)
    splits: int = 0  # how often memory ran out in training; each halves the sequences at once
    eval_splits: int = 0  # the same, in evaluation
    halvings: int = 0  # of the batch itself
    left_out: int = 0  # sequences that halved batches have left out
    skipped: int = 0  # steps that were not taken, since a loss or gradient was not finite
    rollbacks: int = 0  # how often the run has gone back for that reason
    passed_over: int = 0  # batches it has left behind by that: step s reads those of s + passed_over

    @property
    def train_loss(self) -> float | None:
        """Mean over the last steps, however often rows are logged; None before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def become(self, other: "Progress") -> None:
        """Takes over all of `other`; those who hold this object see it."""
        vars(self).update(vars(other))


# ---- no memory -------------------------------------------------------------------------------------------------------


def split(progress: Progress) -> None:
    """Half as many sequences at once: the batch, and but for rounding its gradient, stay what they are."""
    progress.splits += 1


def halve_batch(progress: Progress) -> None:
    """Half the batch from here on, and half as many sequences at once (seed 000, section 8). The result is another."""
    progress.halvings += 1
    progress.splits += 1


ON_OOM: dict[str, Callable[[Progress], None] | None] = {
    "split": split,
    "halve_batch": halve_batch,
    "fail": None,
}


def halved(size: int, times: int) -> int:
    """`size` halved so often, rounded up: 5, 3, 2, 1, 1."""
    return -(-size // 2**times)


# ---- no number -------------------------------------------------------------------------------------------------------

GoBack = Callable[[], None]


def fail(progress: Progress, most: int, go_back: GoBack) -> bool:
    """The run has diverged."""
    return False


def skip(progress: Progress, most: int, go_back: GoBack) -> bool:
    """The step is not taken, the next one has other data; at most `most` times."""
    progress.skipped += 1
    progress.recent.pop()  # a mean with a NaN in it is none
    return progress.skipped <= most


def rollback(progress: Progress, most: int, go_back: GoBack) -> bool:
    """The run returns to its newest checkpoint and passes over all data since, at most `most` times.

    The way around loss spikes of PaLM (arXiv 2204.02311, section 5.1), who found that the same data do no harm to
    other weights.
    """
    if progress.rollbacks == most:
        return False
    times, next_batch = progress.rollbacks + 1, progress.step + progress.passed_over
    log.warning("step %d: not finite, going back to the newest checkpoint (%d of %d)", progress.step, times, most)
    go_back()
    progress.rollbacks, progress.passed_over = times, next_batch - progress.step
    return True


NONFINITE: dict[str, Callable[[Progress, int, GoBack], bool]] = {
    "fail": fail,
    "skip": skip,
    "rollback": rollback,
}


class NonfiniteConfig(Config):
    """What to do about a loss or a gradient that is not finite; it is never applied."""

    policy: Annotated[str, one_of(NONFINITE, "policy")] = added("fail")
    max: Annotated[int, Field(ge=1)] = added(10)  # how often in a run, before it counts as diverged
