"""What a training run remembers between steps, apart from weights and moments."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

# The names of some fields in checkpoints, which keep the format of the first version.
SAVED_AS = {
    "microbatch_halvings": "splits",
    "eval_halvings": "eval_splits",
    "batch_halvings": "halvings",
    "dropped_sequences": "left_out",
    "skipped_steps": "skipped",
    "skipped_batches": "passed_over",
}
AVERAGED = 10  # steps whose mean is the reported training loss

Metrics = dict[str, float | None]


@dataclass
class TrainState:
    """What the loop remembers between steps, besides weights and moments; saved with every checkpoint."""

    step: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the last `AVERAGED` steps
    timed_tokens: int = 0  # in steps after the warm-up of the process
    timed_seconds: float = 0.0
    last_eval: Metrics = field(default_factory=dict)
    microbatch_halvings: int = 0  # how often memory ran out in training; each halves the sequences at once
    eval_halvings: int = 0  # the same, in evaluation
    batch_halvings: int = 0  # of the batch itself
    dropped_sequences: int = 0  # sequences that halved batches have left out
    skipped_steps: int = 0  # steps that were not taken, since a loss or gradient was not finite
    rollbacks: int = 0  # how often the run has gone back for that reason
    skipped_batches: int = 0  # batches it has left behind by that: step s reads those of s + skipped_batches

    @property
    def train_loss(self) -> float | None:
        """Mean over the last steps, however often rows are logged; None before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def restore(self, other: "TrainState") -> None:
        """Takes over all of `other`; those who hold this object see it."""
        vars(self).update(vars(other))

    def to_saved(self) -> dict[str, Any]:
        """The state as a checkpoint holds it."""
        return {SAVED_AS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Self:
        """The state that `to_saved` wrote, in this version or an earlier one."""
        names = {saved_as: name for name, saved_as in SAVED_AS.items()}
        return cls(**{names.get(name, name): value for name, value in saved.items()})
