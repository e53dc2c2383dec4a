"""What a run does when memory runs out, and when a loss or a gradient is not a number: ON_OOM and NONFINITE.

Whatever it does, it counts it in its `TrainState`, which is saved with every checkpoint. So a run that was killed after
a setback goes on as it would have, and its result says what happened to it.
"""

import logging
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from ngpt.config.base import Config, added, one_of
from ngpt.training.state import TrainState

log = logging.getLogger(__name__)


# ---- no memory -------------------------------------------------------------------------------------------------------


def split(state: TrainState) -> None:
    """Half as many sequences at once: the batch, and but for rounding its gradient, stay what they are."""
    state.microbatch_halvings += 1


def halve_batch(state: TrainState) -> None:
    """Half the batch from here on, and half as many sequences at once (seed 000, section 8). The result is another."""
    state.batch_halvings += 1
    state.microbatch_halvings += 1


ON_OOM: dict[str, Callable[[TrainState], None] | None] = {
    "split": split,
    "halve_batch": halve_batch,
    "fail": None,
}


def halved(size: int, times: int) -> int:
    """`size` halved so often, rounded up: 5, 3, 2, 1, 1."""
    return -(-size // 2**times)


# ---- no number -------------------------------------------------------------------------------------------------------

Rollback = Callable[[], None]


def fail(state: TrainState, most: int, rollback_to_checkpoint: Rollback) -> bool:
    """The run has diverged."""
    return False


def skip(state: TrainState, most: int, rollback_to_checkpoint: Rollback) -> bool:
    """The step is not taken, the next one has other data; at most `most` times."""
    state.skipped_steps += 1
    state.recent.pop()  # a mean with a NaN in it is none
    return state.skipped_steps <= most


def rollback(state: TrainState, most: int, rollback_to_checkpoint: Rollback) -> bool:
    """The run returns to its newest checkpoint and passes over all data since, at most `most` times.

    The way around loss spikes of PaLM (arXiv 2204.02311, section 5.1), who found that the same data do no harm to
    other weights.
    """
    if state.rollbacks == most:
        return False
    times, next_batch = state.rollbacks + 1, state.step + state.skipped_batches
    log.warning("step %d: not finite, going back to the newest checkpoint (%d of %d)", state.step, times, most)
    rollback_to_checkpoint()
    state.rollbacks, state.skipped_batches = times, next_batch - state.step
    return True


NONFINITE: dict[str, Callable[[TrainState, int, Rollback], bool]] = {
    "fail": fail,
    "skip": skip,
    "rollback": rollback,
}


class NonfiniteConfig(Config):
    """What to do about a loss or a gradient that is not finite; it is never applied."""

    policy: Annotated[str, one_of(NONFINITE, "policy")] = added("fail")
    max: Annotated[int, Field(ge=1)] = added(10)  # how often in a run, before it counts as diverged
