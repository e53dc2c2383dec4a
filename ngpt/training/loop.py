"""The training loop: a generator that yields the metrics of each evaluation. ngpt/ensemble/train.py drives several."""

import logging
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Never, TypeVar

import torch
from torch import Tensor

from ngpt.config.base import flatten
from ngpt.data.dataset import Dataset
from ngpt.data.loader import Batch, train_batch
from ngpt.distributed.ranks import ALONE, Ranks
from ngpt.model.diagnostics import restore_counts_on_error
from ngpt.optim.muon import Muon, step_muons
from ngpt.optim.optimizers import set_learning_rates
from ngpt.optim.projection import project
from ngpt.optim.schedule import is_due, lr_multiplier
from ngpt.system.heartbeat import HeartbeatWriter
from ngpt.system.memory import is_out_of_memory, retry_on_oom
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.evaluation import METRICS, evaluate_run
from ngpt.training.recovery import (
    can_reduce_batch,
    handle_nonfinite,
    reduce_batch,
    reduce_batches,
    rollback_with_smaller_batches,
)
from ngpt.training.run import Run, RunResult, progress, result_of, set_up
from ngpt.training.sample import write_sample
from ngpt.training.saving import checkpoint_on_stop, try_save_checkpoint
from ngpt.training.state import AVERAGED_STEPS, Metrics, StepMetrics
from ngpt.training.tracker import Tracker

log = logging.getLogger(__name__)

Waiting = TypeVar("Waiting")  # what a step yields while it waits for other runs
Sent = TypeVar("Sent")  # the reply that it receives
StepTaker = Callable[[Run], Generator[Waiting, Sent, StepMetrics]]


def train(
    config: TrainConfig,
    out_dir: str | Path,
    *,
    resume: str | None = None,
    dataset: Dataset | None = None,
    ranks: Ranks = ALONE,
) -> Generator[Metrics, None, RunResult]:
    """Trains one model; yields its metrics at each evaluation and returns the result.

    Initial weights and data order depend only on the seed and the step. So two runs of one config on one CPU with the
    same number of threads agree bit for bit, and so does a run that was stopped at any step and resumed. Raises
    ConfigError if the data do not fit the model or the checkpoint belongs to another config, and RuntimeError or
    MemoryError if memory runs out and `on_oom` is fail or the micro-batch is already one sequence.

    Args:
        out_dir: folder for `metrics.jsonl` and `checkpoints/`.
        resume: `"latest"` continues from the newest intact checkpoint in `out_dir`, if there is one. `"extend"` does
            the same for a run with other `steps` than planned, whose schedules are stretched to them from there on.
        dataset: the opened corpus. If None, the corpus of the config is opened, and prepared if necessary.
        ranks: the processes that train this model together; each calls this function, with the same arguments.
    """
    run = set_up(resolved(config), Path(out_dir), resume=resume, dataset=dataset, ranks=ranks)
    return (yield from train_run(run, _single_step))


def train_run(run: Run, take_step: StepTaker[Waiting, Sent]) -> Generator[Metrics | Waiting, Sent, RunResult]:
    """Trains a run to its end. Yields the metrics of each evaluation, and what `take_step` yields.

    After a stop request, it yields the last metrics again before each step, so that the caller can close the generator.
    """
    while (result := (yield from _train_until_rollback(run, take_step))) is None:
        pass
    return result


def _train_until_rollback(
    run: Run, take_step: StepTaker[Waiting, Sent]
) -> Generator[Metrics | Waiting, Sent, RunResult | None]:
    """Trains until the run ends or rolls back to an earlier step; returns None if it has rolled back."""
    config, state, restarts, restored_step = run.config, run.state, run.restarts, run.state.step or None
    folder = run.ranks.folder(run.out_dir)
    options: dict[str, Any] = {"keep_until": restored_step, "rolled_back": restarts > 0}
    tracker = Tracker(run.tracker_config, folder, settings=flatten(config), **options)
    heartbeat = HeartbeatWriter(folder, began=state.step)
    with tracker, heartbeat, checkpoint_on_stop(run, tracker, heartbeat):
        if skipped := run.dataset.manifest["skipped"]:
            tracker.note({"skipped_shards": [f"{shard['name']}: {shard['reason']}" for shard in skipped]})
        while True:
            is_last = state.step == config.steps
            if state.step != restored_step:  # a restored step has been evaluated and saved
                if is_due(state.step, config.eval_every, last=is_last):
                    histograms = evaluate_run(run, last=is_last)
                    tracker.log(state.last_eval)
                    tracker.log_histograms(state.step, histograms)
                    yield state.last_eval
                    if state.last_eval["val_loss"] is None:  # skipping a step would not help
                        rolled_back = config.nonfinite.policy == "rollback" and handle_nonfinite(run)
                        return None if rolled_back else _end(run, tracker, "diverged")
                if state.step and is_due(state.step, config.checkpoint.every, last=is_last):
                    try_save_checkpoint(run, tracker, last=is_last)
            if is_last:
                result = _end(run, tracker, "finished")
                write_sample(run)  # after the last metrics, among them the peak memory
                return result
            heartbeat.beat(state.step)
            if run.ranks.agree_to_stop(heartbeat.stop_requested()):
                run.replica.collect_counts()
                yield state.last_eval

            metrics = yield from take_step(run)

            is_finite = all(map(math.isfinite, metrics.values()))
            has_diverged = not is_finite and not handle_nonfinite(run)
            if run.restarts != restarts:  # rolled back, so the metrics of this step are dropped
                return None
            if not is_finite or is_due(state.step, config.tracker.log_every, last=state.step == config.steps):
                mean = {"train_loss": state.train_loss} if is_finite else {}
                tracker.log(progress(run) | metrics | mean)
            if has_diverged:
                return _end(run, tracker, "diverged")


def _end(run: Run, tracker: Tracker, status: Literal["finished", "diverged"]) -> RunResult:
    """Returns the result of a run, and tells the tracker. Metrics from before a divergence would mislead."""
    result = result_of(run, status)
    if status == "diverged":
        result = replace(result, metrics=result.metrics | dict.fromkeys(METRICS))
    tracker.end(status, result.metrics)
    return result


def _single_step(run: Run) -> Generator[Never, None, StepMetrics]:
    yield from ()
    return train_step(run)


def train_step(run: Run) -> StepMetrics:
    """Takes one step. Applies only finite gradients; retries with half the micro-batch if memory runs out."""
    with run.clock.step(run.batch_size * run.config.model.block_size):
        set_schedules(run)
        number = run.state.step + run.state.skipped_batches
        loss, norm = retry_on_oom(lambda: gradients(run, number), lambda: reduce_batch(run), run.device)
        count_step(run, loss)
        if math.isfinite(loss) and math.isfinite(norm):
            update([run])
    return step_metrics(run, loss, norm)


def set_schedules(run: Run) -> None:
    """Sets the scheduled values of the next step: learning rates, alpha and stochastic norms."""
    config, step = run.config, run.state.step
    run.model.prepare_step(step, config.steps, seed=config.seed)
    set_learning_rates(run.optimizers, lr_multiplier(step, config.steps, config.schedule))


def count_step(run: Run, loss: float) -> None:
    """Updates the counters of the state, before the weights are updated."""
    state = run.state
    state.step += 1
    state.dropped_sequences += run.config.batch_size - run.batch_size
    state.recent = [*state.recent, loss][-AVERAGED_STEPS:]


def step_metrics(run: Run, loss: float, norm: float) -> StepMetrics:
    """Returns loss, gradient norm, and the learning rate of each parameter group under the name of its setting."""
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    rates = {"lr" if group["kind"] == "matrices" else f"lr_{group['kind']}": group["lr"] for group in groups}
    return {"train_loss": loss, "grad_norm": norm} | rates


def gradients(run: Run, number: int) -> tuple[float, float]:
    """Computes and clips the gradients of batch `number`; returns the loss, and the gradient norm before clipping.

    Only here does a step wait for the GPU: no gradient may be applied before it is known to be finite.
    """
    idx, targets = run.upcoming[1] if run.upcoming and run.upcoming[0] == number else batch(run, number)
    with restore_counts_on_error(run.model):
        # A halved batch is the first half of the full batch, so that the data order does not change.
        rows = run.ranks.share(run.batch_size)
        loss = backward(run, idx[rows], targets[rows])
        total_norm = run.replica.gradient_norm()
        run.upcoming = number + 1, batch(run, number + 1)  # prefetched while the GPU computes
        loss, norm = run.ranks.mean(torch.stack((loss, total_norm))).tolist()
        max_norm = run.config.optim.grad_clip or math.inf
        if norm > max_norm:  # otherwise clipping would multiply all gradients by 1
            torch.nn.utils.clip_grads_with_norm_(run.replica.parameters(), max_norm, total_norm)
        return loss, norm


def batch(run: Run, number: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and targets (B, T) of batch `number`, on the device."""
    parts = read_batch(run.config, run.dataset, number)
    if run.device.type == "cuda":  # a copy overlaps with computation only if it starts from pinned memory
        parts = (part.pin_memory() for part in parts)
    idx, targets = (part.to(run.device, non_blocking=True) for part in parts)
    return idx, targets


def read_batch(config: TrainConfig, dataset: Dataset, number: int) -> Batch:
    """Returns tokens and targets (B, T) of batch `number` in the configured data order, int64 on the CPU."""
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
    """Accumulates the gradients of the mean loss over a batch, one micro-batch at a time; returns that loss.

    The ranks average their gradients during the last backward pass.
    """
    run.model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.device)
    size = run.micro_batch_size
    *others, last = zip(idx.split(size), targets.split(size), strict=True)

    def forward(part: Batch) -> Tensor:
        """The loss of one micro-batch, weighted by its share of the batch."""
        nonlocal total
        with run.autocast:
            loss = run.replica.loss(*part)
        share = len(part[0]) / len(idx)
        total += loss.detach() * share
        return loss * share

    with run.ranks.agreement_on_memory(can_shrink=can_reduce_batch(run)) as agree:
        if run.replica.exchanges_weights:
            agree()
        with run.replica.keep_gradients():
            for part in others:
                forward(part).backward()
        loss = forward(last)
        if not run.replica.exchanges_weights:
            agree()
        loss.backward()
    return total


def update(runs: Sequence[Run]) -> None:
    """Steps the optimizers of runs of one graph, and projects the weights of each run whose projection is due.

    An optimizer that runs out of memory may have updated some of the weights already, so the step cannot be repeated.
    All runs then roll back to their newest checkpoints and continue with smaller micro-batches.
    """
    optimizers = [optimizer for run in runs for optimizer in run.optimizers]
    try:
        with runs[0].autocast:  # for Muon's matrix products
            step_muons(optimizer for optimizer in optimizers if isinstance(optimizer, Muon))
            for optimizer in optimizers:
                if not isinstance(optimizer, Muon):
                    optimizer.step()
        due = [run.replica for run in runs if is_due(run.state.step, run.config.project_every)]
        project(entry for replica in due for entry in replica.sphere_weights())
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not reduce_batches(runs):
            raise
    for run in runs:
        log.warning("step %d: no memory for the optimizer; rolling back to the newest checkpoint", run.state.step)
        rollback_with_smaller_batches(run)
