"""The state of a training run apart from weights and optimizer moments; saved with every checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

# Fields whose name in a checkpoint differs: the format is that of the first version.
SAVED_AS = {
    "microbatch_halvings": "splits",
    "eval_halvings": "eval_splits",
    "batch_halvings": "halvings",
    "dropped_sequences": "left_out",
    "skipped_steps": "skipped",
    "skipped_batches": "passed_over",
}
AVERAGED_STEPS = 10  # in the reported training loss

Metrics = dict[str, float | None]


@dataclass
class TrainState:
    """What a run has to remember between steps. All fields are written to checkpoints."""

    step: int = 0  # optimizer updates so far
    recent: list[float] = field(default_factory=list)  # losses of the last `AVERAGED_STEPS` steps
    timed_tokens: int = 0  # in steps after the warm-up of the process
    timed_seconds: float = 0.0
    last_eval: Metrics = field(default_factory=dict)
    microbatch_halvings: int = 0  # of the micro-batch, each because memory ran out in training
    eval_halvings: int = 0  # of the evaluation batch
    batch_halvings: int = 0  # of the batch itself
    dropped_sequences: int = 0  # left out of halved batches
    skipped_steps: int = 0  # steps not taken because a loss or gradient was not finite
    rollbacks: int = 0  # for the same reason
    skipped_batches: int = 0  # by those rollbacks: step s reads batch s + skipped_batches

    @property
    def train_loss(self) -> float | None:
        """Mean over the last steps, independent of how often rows are logged; None before the first step."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def restore(self, other: "TrainState") -> None:
        """Copies all fields of `other` into this object."""
        vars(self).update(vars(other))

    def to_saved(self) -> dict[str, Any]:
        """The fields as a checkpoint holds them."""
        return {SAVED_AS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Self:
        """The state that `to_saved` wrote."""
        names = {saved_as: name for name, saved_as in SAVED_AS.items()}
        return cls(**{names.get(name, name): value for name, value in saved.items()})
