"""The state of a training run apart from weights and optimizer moments; saved with every checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

# Fields that have another name in checkpoints, whose format has not changed since the first version.
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
StepMetrics = dict[str, float]


@dataclass
class TrainState:
    """Counters and recent metrics of a run. All fields are written to checkpoints."""

    step: int = 0  # optimizer updates so far
    recent: list[float] = field(default_factory=list)  # losses of the last `AVERAGED_STEPS` steps
    timed_tokens: int = 0  # in timed steps, which follow the warm-up of each process
    timed_seconds: float = 0.0
    train_seconds: float = 0.0  # in all steps, with those that warm up
    seconds: float = 0.0  # since training began, with evaluations and checkpoints, without the time between attempts
    last_eval: Metrics = field(default_factory=dict)
    initial_val_loss: float | None = None  # at step 0; None in checkpoints of older versions
    eval_blocks: dict[str, Any] | None = None  # see ngpt/training/text_blocks.py; None before the last evaluation
    microbatch_halvings: int = 0  # times the micro-batch was halved because training ran out of memory
    eval_halvings: int = 0  # the same for the evaluation batch
    batch_halvings: int = 0  # the same for the whole batch, if `on_oom` is halve_batch
    dropped_sequences: int = 0  # not trained on, because the batch was halved
    skipped_steps: int = 0  # steps without an update, because a loss or gradient was not finite
    rollbacks: int = 0  # rollbacks for the same reason
    skipped_batches: int = 0  # batches that rollbacks skipped: step s reads batch s + skipped_batches
    # (step, steps planned until then) of each resume with other `steps`, whose schedules are stretched from there
    extended: list[tuple[int, int]] = field(default_factory=list)

    @property
    def train_loss(self) -> float | None:
        """Mean over the last `AVERAGED_STEPS` steps, however often rows are logged; None before the first step."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def restore(self, other: "TrainState") -> None:
        """Copies all fields of `other` into this object."""
        vars(self).update(vars(other))

    def to_saved(self) -> dict[str, Any]:
        """Returns the fields under their names in checkpoints."""
        return {SAVED_AS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Self:
        """The inverse of `to_saved`."""
        names = {saved_as: name for name, saved_as in SAVED_AS.items()}
        return cls(**{names.get(name, name): value for name, value in saved.items()})
