"""What a run does when memory runs out (`ON_OOM`) and when a loss or gradient is not finite (`NONFINITE`).

Each policy counts what it does in the `TrainState`, which is saved with every checkpoint. So a run that is killed and
resumed continues as an undisturbed one would, and its result reports what happened.
"""

import logging
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from ngpt.config.base import Config, added_setting, one_of
from ngpt.training.state import TrainState

log = logging.getLogger(__name__)

# ---- out of memory ---------------------------------------------------------------------------------------------------


def split(state: TrainState) -> None:
    """Halves the micro-batch. The batch stays the same, and so does its gradient but for rounding."""
    state.microbatch_halvings += 1


def halve_batch(state: TrainState) -> None:
    """Halves batch and micro-batch for the rest of the run, which changes its result (source report 000, section 8)."""
    state.batch_halvings += 1
    state.microbatch_halvings += 1


ON_OOM: dict[str, Callable[[TrainState], None] | None] = {"split": split, "halve_batch": halve_batch, "fail": None}


def halved(size: int, times: int) -> int:
    """`size` halved `times` times, rounded up: 5, 3, 2, 1, 1."""
    return -(-size // 2**times)


# ---- not finite ------------------------------------------------------------------------------------------------------

Rollback = Callable[[], None]  # returns the run and its state to the newest checkpoint


def fail(state: TrainState, limit: int, rollback_to_checkpoint: Rollback) -> bool:
    """The run has diverged."""
    return False


def skip(state: TrainState, limit: int, rollback_to_checkpoint: Rollback) -> bool:
    """Skips the step and continues with the next batch, at most `limit` times."""
    state.skipped_steps += 1
    state.recent.pop()  # a mean over a NaN would be NaN
    return state.skipped_steps <= limit


def rollback(state: TrainState, limit: int, rollback_to_checkpoint: Rollback) -> bool:
    """Returns to the newest checkpoint and skips the batches seen since, at most `limit` times.

    PaLM got around its loss spikes this way (arXiv 2204.02311, section 5.1). The same batches did no harm to other
    weights.
    """
    if state.rollbacks == limit:
        return False
    count, next_batch = state.rollbacks + 1, state.step + state.skipped_batches
    log.warning("step %d: not finite; rolling back to the newest checkpoint (%d of %d)", state.step, count, limit)
    rollback_to_checkpoint()
    state.rollbacks, state.skipped_batches = count, next_batch - state.step
    return True


# Each policy returns whether the run continues.
NONFINITE: dict[str, Callable[[TrainState, int, Rollback], bool]] = {"fail": fail, "skip": skip, "rollback": rollback}


class NonfiniteConfig(Config):
    """What to do about a loss or gradient that is not finite. It is never applied."""

    policy: Annotated[str, one_of(NONFINITE, "policy")] = added_setting("fail")
    max: Annotated[int, Field(ge=1)] = added_setting(10)  # skipped steps or rollbacks before the run counts as diverged
