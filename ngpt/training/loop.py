"""The train loop: one generator that yields the metrics of each evaluation.

`Segment` holds what happens between two steps, and `train_step` is a step. ngpt/ensemble/train.py builds the loop for
several runs from the same parts.
"""

import contextlib
import logging
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngpt.config.base import flatten
from ngpt.data.dataset import Dataset
from ngpt.data.loader import Batch, train_batch
from ngpt.model.diagnostics import restore_counts_on_error
from ngpt.optim.optimizers import set_learning_rates
from ngpt.optim.projection import project_weights
from ngpt.optim.schedule import is_due, lr_multiplier
from ngpt.system.heartbeat import HeartbeatWriter
from ngpt.system.memory import is_out_of_memory, retry_on_oom
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.evaluation import evaluate_run
from ngpt.training.recovery import NONFINITE, ON_OOM
from ngpt.training.run import (
    Run,
    RunResult,
    progress,
    result_of,
    rollback_to_checkpoint,
    rollback_with_smaller_batches,
    set_up,
)
from ngpt.training.saving import checkpoint_on_stop, try_save_checkpoint
from ngpt.training.state import AVERAGED_STEPS, Metrics
from ngpt.training.tracker import Tracker

log = logging.getLogger(__name__)


def train(
    config: TrainConfig, out_dir: Path, *, resume: str | None = None, dataset: Dataset | None = None
) -> Generator[Metrics, None, RunResult]:
    """Trains one model; yields its metrics at each evaluation and returns the result.

    Weights and the order of the data depend on (seed, step) only. So two runs of one config on one CPU with the same
    number of threads agree bit for bit, and so does a run that was stopped at any step and resumed.

    Args:
        config: the settings of the run.
        out_dir: folder for `metrics.jsonl` and `checkpoints/`.
        resume: `"latest"` continues from the newest intact checkpoint in `out_dir`, if there is one.
        dataset: the opened corpus. If None, it is opened, and prepared if necessary.

    Raises:
        ConfigError: the data do not fit the model, or the checkpoint belongs to another config.
        RuntimeError, MemoryError: there is not enough memory for a single sequence, or `on_oom` is fail.
    """
    run = set_up(resolved(config), out_dir, resume=resume, dataset=dataset)
    while (result := (yield from train_until_rollback(run))) is None:
        pass
    return result


def train_until_rollback(run: Run) -> Generator[Metrics, None, RunResult | None]:
    """Trains a run to its end and returns its result, or returns None once it has rolled back to an earlier step."""
    with open_segment(run) as segment:
        while not segment.is_over:
            yield from segment.prepare_step()
            if not segment.is_over:
                segment.finish_step(train_step(run))
        return segment.result


# ---- between two steps -------------------------------------------------------------------------


@contextlib.contextmanager
def open_segment(run: Run) -> Iterator["Segment"]:
    """Opens the metrics and the heartbeat of a run at its current step. Metric rows after that step are dropped."""
    tracker = Tracker(run.config.tracker, run.out_dir, settings=flatten(run.config), keep_until=run.state.step or None)
    heartbeat = HeartbeatWriter(run.out_dir, began=run.state.step)
    with tracker, heartbeat, checkpoint_on_stop(run, tracker, heartbeat):
        if skipped := run.dataset.manifest["skipped"]:
            tracker.note({"skipped_shards": [f"{shard['name']}: {shard['reason']}" for shard in skipped]})
        yield Segment(run, tracker, heartbeat)


class Segment:
    """A run from a start, a resume or a rollback to the next rollback, or to its end, which sets `result`."""

    def __init__(self, run: Run, tracker: Tracker, heartbeat: HeartbeatWriter) -> None:
        self.result: RunResult | None = None
        self._run, self._tracker, self._heartbeat = run, tracker, heartbeat
        self._restored_step = run.state.step or None
        self._restarts = run.restarts

    @property
    def is_over(self) -> bool:
        """Whether the run has ended or rolled back."""
        return self.result is not None or self._run.restarts != self._restarts

    def prepare_step(self) -> Generator[Metrics, Any, None]:
        """Evaluates, saves and ends the run where that is due. Yields the metrics of an evaluation.

        After a stop request it yields the last metrics again before each step, so that the caller can close the loop.
        """
        run, state, every = self._run, self._run.state, self._run.config.checkpoint.every
        is_last = state.step == run.config.steps
        if state.step != self._restored_step:  # a restored step has been evaluated and saved
            if is_due(state.step, run.config.eval_every, last=is_last):
                yield self._evaluate(is_last)
                if state.last_eval["val_loss"] is None:  # skipping a step would not help
                    if run.config.nonfinite.policy != "rollback" or not handle_nonfinite(run):
                        self.result = result_of(run, "diverged")
                    return
            if state.step and is_due(state.step, every, last=is_last):
                try_save_checkpoint(run, self._tracker, last=is_last)
        if is_last:
            self.result = result_of(run, "finished")
            return
        self._heartbeat.beat(state.step)
        if self._heartbeat.stop_requested():
            yield state.last_eval

    def finish_step(self, metrics: dict[str, float]) -> None:
        """Logs the metrics of a training step, and applies the policy if one of them is not finite."""
        run, state = self._run, self._run.state
        is_finite = all(math.isfinite(value) for value in metrics.values())
        has_diverged = not is_finite and not handle_nonfinite(run)
        if self.is_over:  # rolled back: this step no longer counts
            return
        if not is_finite or is_due(state.step, run.config.tracker.log_every, last=state.step == run.config.steps):
            mean = {"train_loss": state.train_loss} if is_finite else {}
            self._tracker.log(progress(run) | metrics | mean)
        if has_diverged:
            self.result = result_of(run, "diverged")

    def _evaluate(self, is_last: bool) -> Metrics:
        state = self._run.state
        histograms = evaluate_run(self._run, last=is_last)
        self._tracker.log(state.last_eval)
        self._tracker.log_histograms(state.step, histograms)
        return state.last_eval


def handle_nonfinite(run: Run) -> bool:
    """Applies the policy for a loss or gradient that is not finite; returns whether the run continues."""
    policy = run.config.nonfinite
    return NONFINITE[policy.policy](run.state, policy.max, lambda: rollback_to_checkpoint(run))


# ---- one step ----------------------------------------------------------------------------------


def train_step(run: Run) -> dict[str, float]:
    """One optimizer update; returns loss, gradient norm and learning rates. A gradient is only applied if it is finite.

    If memory runs out, the step is repeated with half the micro-batch.
    """
    with run.clock.step(run.batch_size * run.config.model.block_size):
        set_schedules(run)
        number = run.state.step + run.state.skipped_batches
        loss, norm = retry_on_oom(lambda: gradients(run, number), lambda: reduce_batch(run), run.device)
        count_step(run, loss)
        if math.isfinite(loss) and math.isfinite(norm):
            update(run)
    return step_metrics(run, loss, norm)


def set_schedules(run: Run) -> None:
    """Sets what changes from step to step without being learned: learning rates, alpha, stochastic norms."""
    config, step = run.config, run.state.step
    run.model.prepare_step(step, config.steps, seed=config.seed)
    set_learning_rates(run.optimizers, lr_multiplier(step, config.steps, config.schedule))


def count_step(run: Run, loss: float) -> None:
    """Counts a step in the state, before its update is applied."""
    state = run.state
    state.step += 1
    state.dropped_sequences += run.config.batch_size - run.batch_size
    state.recent = [*state.recent, loss][-AVERAGED_STEPS:]


def step_metrics(run: Run, loss: float, norm: float) -> dict[str, float]:
    """Loss, gradient norm and the learning rate of each kind of parameter, by the name of its setting."""
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    rates = {"lr" if group["kind"] == "matrices" else f"lr_{group['kind']}": group["lr"] for group in groups}
    return {"train_loss": loss, "grad_norm": norm} | rates


def gradients(run: Run, number: int) -> tuple[float, float]:
    """Fills and clips the gradients of batch `number`; returns its loss, and the gradient norm before clipping.

    This is the only place of a step that waits for a GPU: no gradient may be applied before it is known to be finite.
    """
    idx, targets = run.upcoming[1] if run.upcoming and run.upcoming[0] == number else batch(run, number)
    with restore_counts_on_error(run.model):
        # A halved batch is the first half of the full one, so that the order of the data stays the same.
        loss = backward(run, idx[: run.batch_size], targets[: run.batch_size])
        given = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
        total = torch.nn.utils.get_total_norm(given)
        run.upcoming = number + 1, batch(run, number + 1)  # made while a GPU computes
        loss, norm = torch.stack((loss, total)).tolist()
        largest = run.config.optim.grad_clip or math.inf
        if norm > largest:  # otherwise clipping would pass over all gradients to multiply them by 1
            torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), largest, total)
        return loss, norm


def batch(run: Run, number: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T) of batch `number`, on the device."""
    parts = read_batch(run.config, run.dataset, number)
    if run.device.type == "cuda":  # a copy overlaps with computation only if it starts from pinned memory
        parts = (part.pin_memory() for part in parts)
    idx, targets = (part.to(run.device, non_blocking=True) for part in parts)
    return idx, targets


def read_batch(config: TrainConfig, dataset: Dataset, number: int) -> Batch:
    """Tokens and targets (B, T) of batch `number`, int64, in the configured order."""
    return train_batch(
        dataset,
        seed=config.seed,
        step=number,
        batch_size=config.batch_size,
        block_size=config.model.block_size,
        order=config.data.order,
        reservoir=config.data.reservoir,
    )


def backward(run: Run, idx: Tensor, targets: Tensor) -> Tensor:
    """Fills the gradients of the mean loss over a batch, one micro-batch at a time, and returns that loss."""
    run.model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.device)
    size = run.micro_batch_size
    for idx_part, targets_part in zip(idx.split(size), targets.split(size), strict=True):
        with run.autocast:
            loss = run.model(idx_part, targets_part)
        share = len(idx_part) / len(idx)
        (loss * share).backward()
        total += loss.detach() * share
    return total


def update(run: Run) -> None:
    """Applies the optimizers' steps, and projects the weights if that is due.

    An optimizer in which memory runs out has changed some weights and not others, so the step cannot be repeated. The
    run then rolls back to its newest checkpoint and continues with a smaller micro-batch.
    """
    try:
        with run.autocast:  # for Muon's matrix products
            for optimizer in run.optimizers:
                optimizer.step()
        if is_due(run.state.step, run.config.project_every):
            project_weights(run.model)
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not reduce_batch(run):
            raise
    log.warning("step %d: no memory for the optimizer; rolling back to the newest checkpoint", run.state.step)
    rollback_with_smaller_batches(run)


def reduce_batch(run: Run) -> bool:
    """Applies the policy for training that runs out of memory; False if it cannot reduce the batch."""
    reduce, before = ON_OOM[run.config.on_oom], run.micro_batch_size
    if reduce is None or before == 1:
        return False
    reduce(run.state)
    run.model.zero_grad(set_to_none=True)
    run.clock.discard_step()
    now = f"{run.micro_batch_size}, in batches of {run.batch_size}"
    log.warning("step %d: out of memory with micro-batches of %d; now %s", run.state.step, before, now)
    return True
